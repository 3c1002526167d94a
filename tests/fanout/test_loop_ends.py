"""How the loop's clients end: once, and told."""

import contextlib
import fcntl
import logging
import os
import socket
import struct
import termios
import time

import pytest

from syncstream.runtime.process import Process
from syncstream.runtime.sockets import is_hung_up
from tests.fanout.peers import (
    HEAD,
    RETRY,
    ended,
    settle,
    texts_until,
)
from tests.support.pairs import check_script, leave
from tests.support.waits import await_true

pytestmark = pytest.mark.usefixtures("nothing_is_left_behind")


@pytest.mark.parametrize("is_chunked", [True, False])
@pytest.mark.parametrize("reason", ["shutdown", "kicked", "closed", "denied"])
def test_farewells(hub, peers, reason, is_chunked):
    """A whole response; and when to come back, where many may."""
    peer = peers(hub, is_chunked=is_chunked)
    hub.publish("a", "1")
    texts_until(peer, "1")
    if reason == "kicked":
        assert hub.kick(lambda s: s is peer.subscription) == 1
    elif reason == "closed":
        hub.close()
    else:
        peer.client.stop(reason)
    found, body, is_whole, is_reset = ended(peer)
    assert (found, is_whole, is_reset) == (reason, is_chunked, False)
    retry = RETRY.search(body)
    if reason == "closed":
        assert retry is None
    else:
        least = 1000 if reason == "shutdown" else 5000
        assert least <= int(retry[1]) <= 3 * least


@pytest.mark.parametrize("is_chunked", [True, False])
@pytest.mark.parametrize("reason", ["finished", "closed", "shutdown"])
def test_a_finished_client_gets_the_applications_last_event(
    hub, peers, reason, is_chunked
):
    """And the id by which it stays away; no other end has them."""
    last = b"data: [DONE]\n\nid: syncstream-end\n\n"
    peer = peers(hub, finish=last, is_chunked=is_chunked)
    hub.publish("a", "1")
    texts_until(peer, "1")
    peer.client.stop(reason)
    found, body, is_whole, _ = ended(peer)
    assert (found, is_whole) == (reason, is_chunked)
    assert body.endswith(last) is (reason == "finished")


@pytest.mark.parametrize("reason", ["shutdown", "kicked", "closed"])
def test_no_other_client_gets_a_retry(hub, peers, reason):
    """Whoever is no EventSource makes an event of a block without data."""
    peer = peers(hub, comes_back=False)
    hub.publish("a", "1")
    texts_until(peer, "1")
    peer.client.stop(reason)
    found, body, _, _ = ended(peer)
    assert (found, RETRY.search(body)) == (reason, None)


@pytest.mark.parametrize("is_chunked", [True, False])
@pytest.mark.parametrize("reason", ["shutdown", "kicked", "denied", "closed"])
def test_who_does_not_come_back_is_cut(hub, peers, reason, is_chunked):
    """An end would look like that of the answer, but where the application ended it."""
    peer = peers(hub, is_chunked=is_chunked, is_tcp=True, comes_back=False)
    hub.publish("a", "1")
    texts_until(peer, "1")
    peer.client.stop(reason)
    found, _, is_whole, is_reset = ended(peer)
    is_cut = reason != "closed"
    assert found == reason
    assert is_whole == (is_chunked and not is_cut)
    assert is_reset == (is_cut and not is_chunked)


@pytest.mark.parametrize("is_chunked", [True, False])
def test_an_error_is_no_end_in_good_order(hub, peers, caplog, is_chunked):
    """The client can tell; the log has it, once, with its traceback."""

    def authorize(subscription):
        if subscription.who == "broken":
            raise ZeroDivisionError
        return True

    peer = peers(
        hub,
        is_chunked=is_chunked,
        is_tcp=True,
        who="well",
        authorize=(authorize, 0.1),
    )
    settle(peer.loop)
    peer.subscription.who = "broken"
    reason, _, is_whole, is_reset = ended(peer)
    assert (reason, is_whole, is_reset) == ("error", False, not is_chunked)
    settle(peer.loop)  # its line comes later
    (record,) = caplog.records
    assert record.exc_info[0] is ZeroDivisionError


def test_who_is_denied_later(hub, peers):
    """When the application is asked again, and says no."""
    allowed = [True]
    peer = peers(hub, authorize=(lambda s: allowed[0], 0.1))
    other = peers(hub)
    hub.publish("a", "1")
    texts_until(peer, "1")
    allowed[0] = False
    assert ended(peer)[0] == "denied"
    hub.publish("a", "2")
    assert texts_until(other, "2") == ["1", "2"]


def test_max_duration(hub, peers):
    """At the time, with a word when to come back."""
    began = time.monotonic()
    peer = peers(hub, deadline=began + 0.3, retry=20_000)
    reason, body, is_whole, _ = ended(peer)
    assert (reason, is_whole) == ("max_duration", True)
    assert 0.3 <= time.monotonic() - began < 5
    assert 20_000 <= int(RETRY.search(body)[1]) <= 60_000


@pytest.mark.parametrize("how", ["FIN", "half-close", "with bytes"])
def test_who_leaves(hub, peers, how):
    """Is known at once; presence, its place, its callbacks."""
    peer = peers(hub, who="ann")
    hub.publish("a", "1")
    texts_until(peer, "1")
    assert hub.presence("a") == ["ann"]
    if how == "half-close":
        peer.socket.shutdown(socket.SHUT_WR)
    else:
        if how == "with bytes":
            peer.socket.sendall(b"GET / HTTP/1.1\r\n\r\n")
        peer.leave()
    await_true(lambda: peer.ends)
    assert peer.ends == ["disconnected"]
    assert hub.presence("a") == []


def test_who_writes_no_more_may_read_what_was_sent(hub, peers):
    """A client closes its half, after bytes that nobody reads, and reads slowly."""
    peer = peers(hub, is_tcp=True)
    hub.publish_many("a", ["x" * 1000] * 40)
    await_true(lambda: hub.stats()["delivered"] == 40)
    peer.socket.sendall(b"\r\n")
    peer.socket.shutdown(socket.SHUT_WR)
    await_true(lambda: peer.ends)
    body, _, is_reset = peer.read_all()
    assert (body.count(b"data: xxx"), is_reset) == (40, False)


def test_a_last_event_that_cannot_be_written_is_no_whole_end(hub, peers):
    """Without chunks only a reset tells: the kernel took none of it."""
    peer = peers(hub, is_chunked=False, is_tcp=True, finish=b"data: [DONE]\n\n")
    hub.publish("a", "1")
    texts_until(peer, "1")
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(peer.client.fd, b": x\n\n" * 1000)
    peer.client.stop("finished")
    await_true(lambda: peer.ends)
    _, _, is_reset = peer.read_all()
    assert is_reset


def test_its_end_is_counted_and_logged_once(hub, peers, caplog):
    """By its one reason, with what it got; callbacks run once, whatever one raises."""
    caplog.set_level(logging.DEBUG, "syncstream.fanout")

    def broken():
        raise ZeroDivisionError

    process = Process()
    peer = peers(hub, process=process, callbacks=[broken], is_chunked=False)
    assert peer.client in peer.served.parked
    hub.publish_many("a", ["1", "2", "3"])
    texts_until(peer, "3")
    for reason in ("kicked", "shutdown", "closed"):
        peer.client.stop(reason)
    reason, body, _, _ = ended(peer)
    assert reason == "kicked"
    settle(peer.loop)
    (total,) = process.stats()["ended"].values()
    assert process.stats()["ended"].keys() == {"kicked"}
    assert (total["streams"], total["events"]) == (1, 3)
    assert len(body) - 20 < total["bytes"] <= len(body) + len(HEAD)
    assert not peer.served.parked
    levels = [(r.levelname, r.getMessage().partition(":")[0]) for r in caplog.records]
    assert levels == [
        ("ERROR", "an on_close callback of GET '/a' failed"),
        ("DEBUG", "GET '/a' ended"),
    ]


def test_its_end_is_logged_though_the_process_ends():
    """By a handler that takes its time; and nobody waits for that but the exit."""
    out = check_script(
        """
import logging, sys, threading, time
from tests.fanout.peers import Peer, settle
from syncstream import Hub
from syncstream.fanout.loop import fanout

class Slow(logging.Handler):
    def emit(self, record):
        is_logging.set()
        go_on.wait(15)
        print(record.getMessage().partition(",")[0].rpartition(":")[0])
        time.sleep(0.05)

go_on, is_logging = threading.Event(), threading.Event()
log = logging.getLogger("syncstream")
log.addHandler(Slow())
log.setLevel(logging.DEBUG)
hub, loop = Hub(), fanout()
peers = [Peer(loop, hub) for _ in range(5)]
peers[0].client.stop("kicked")
assert is_logging.wait(15)
for peer in peers[1:]:
    peer.client.stop("shutdown")
while any(peer.served.parked for peer in peers):
    time.sleep(0.01)
go_on.set()
for peer in peers:
    peer.leave()
"""
    )
    assert out.count("GET '/a' ended") == 5


def test_joins_and_leaves_are_announced(hub, peers):
    """As of those who hold a thread."""
    watching = peers(hub)
    peer = peers(hub, who="ann", announce=True)
    texts_until(watching, '{"who":"ann"}')
    peer.leave()
    found = watching.read_until(lambda events: len(events) == 2)
    assert [event.event for event in found] == ["join", "leave"]


@pytest.mark.parametrize("size", [100, 300_000])
def test_what_a_client_has_sent_resets_nothing(loop, hub, peers, size):
    """Nobody has read it; all that the client was sent arrives, and the end."""
    peer = peers(hub, is_tcp=True, add=False)
    with socket.socket(fileno=os.dup(peer.client.fd)) as ours:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        peer.socket.sendall(b"x" * size)
        await_true(lambda: unread(ours) == size)
    peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    loop.add(peer.client, HEAD)
    hub.publish("a", "y" * 60_000)
    settle(loop)
    peer.client.stop("closed")
    await_true(lambda: peer.ends)
    body, is_whole, is_reset = peer.read_all()
    assert (body.count(b"y"), is_whole, is_reset) == (60_000, True, False)


def unread(sock):
    """Return how many bytes the kernel has for a reader."""
    return struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, bytes(4)))[0]


def test_who_is_reset_before_the_loop_has_it_has_left(loop, hub, peers):
    """It is no failure: the head cannot be sent."""
    peer = peers(hub, is_tcp=True, add=False)
    leave(peer.socket, "RST")
    await_true(lambda: is_hung_up(peer.client.fd))
    loop.add(peer.client, HEAD)
    await_true(lambda: peer.ends)
    assert peer.ends == ["disconnected"]


QUIT = """
import threading, time
from syncstream.fanout.loop import Fanout

loop, begun, done = Fanout(), threading.Event(), []
loop.call(lambda: (begun.set(), time.sleep(0.1), done.append(1)))
assert begun.wait(10)
loop.quit()
assert done == [1]
"""


def test_the_exit_waits_for_the_loop():
    """For what it is in the middle of; a thread that went on would bring all down."""
    assert check_script(QUIT) == ""


def test_who_leaves_at_once_is_noticed_at_once(hub, peers):
    """Though the loop is not woken for it, and may see its end before itself."""
    for _ in range(30):
        began = time.monotonic()
        peer = peers(hub, keepalive=60.0)
        peer.leave()
        await_true(lambda peer=peer: peer.ends)
        assert peer.ends == ["disconnected"]
        assert time.monotonic() - began < 3  # the loop looks every 4 s by itself
