"""The fan-out loop: who holds no thread gets all, in order, once, and has one end."""

import _thread
import gc
import json
import logging
import os
import random
import re
import socket
import threading
import time
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from syncstream import BrokerError, Denied, Hub, Subscription, Unavailable
from syncstream.brokers import log as log_module
from syncstream.brokers.log import Entry
from syncstream.brokers.memory import MemoryBroker
from syncstream.channels import limits
from syncstream.fanout import connection as connection_module
from syncstream.fanout import group as group_module
from syncstream.fanout import lanes as lanes_module
from syncstream.fanout.client import Client, Terms
from syncstream.fanout.group import Group
from syncstream.fanout.loop import fanout
from syncstream.runtime.process import Process, Served
from syncstream.runtime.sockets import native
from syncstream.runtime.watch import watch
from syncstream.streams.stream import Stream
from tests.fanout.peers import HEAD, Peer, settle
from tests.support.pairs import EVENTS, Threads, check_script
from tests.support.waits import TIMEOUT, await_true

PLACE = Threads()
RETRY = re.compile(rb"retry: ([0-9]+)\n\n")


@pytest.fixture(scope="module", autouse=True)
def loop():
    """The process's own; its thread has begun, and its lanes', and the watch's."""
    watch()
    loop = fanout()
    settle(loop)
    return loop


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(loop):
    """No descriptor, no client, no group, no timer."""
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    yield
    settle(loop)
    assert (loop._clients, loop._lagging, loop.meeting.groups) == ({}, {}, {})
    assert not any(loop.wheel._buckets.values())
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture
def peers(loop):
    """Make clients; whoever is left at the end is hung up."""
    made = []

    def join(hub, *channels, **options):
        peer = Peer(loop, hub, *channels, **options)
        made.append(peer)
        return peer

    yield join
    for peer in made:
        peer.leave()
        await_true(lambda peer=peer: peer.ends)


def texts_until(peer, text):
    """Read up to an event with this data; return the data of all."""
    events = peer.read_until(lambda events: any(e.data == text for e in events))
    return [event.data for event in events]


def seen(*peers):
    """Have all of them be where the channel is, those of one kind in one group."""

    def are_together():
        groups = {peer: peer.client.group for peer in peers}
        keys = [group and group.key for group in groups.values()]
        alone = [
            peer
            for peer, group in groups.items()
            if not (is_shared(group) or (group and keys.count(group.key) == 1))
            or group.key is None
        ]
        for peer in alone:
            # Who came before the others had their turn joins them by the next one.
            peer.client.wake()
        return not alone

    await_true(are_together)


def is_shared(group):
    return group is not None and group.is_shared


# What they get.


@pytest.mark.parametrize("is_chunked", [True, False])
def test_all_get_every_event(hub, peers, is_chunked):
    """Those who were there and those who join, in one group or by themselves."""
    here = [peers(hub, is_chunked=is_chunked) for _ in range(5)]
    for n in range(100):
        hub.publish("a", str(n))
        if n % 10 == 0:
            here.append(peers(hub, is_chunked=is_chunked))
    for k, peer in enumerate(here):
        first = 0 if k < 5 else 10 * (k - 5) + 1
        found = texts_until(peer, "99")
        assert found == [str(n) for n in range(first, 100)]
    seen(*here)
    assert len({id(peer.client.group) for peer in here}) == 1


def test_framings_do_not_mix(hub, peers):
    """Chunked and raw, tagged and not: none shares what is not the same."""
    chunked, raw = peers(hub), peers(hub, is_chunked=False)
    tagged = peers(hub, tags=["vip"])
    hub.publish("a", "1")
    hub.publish("a", "2", only=["vip"])
    hub.publish("a", "3", exclude=["vip"])
    hub.publish_many("a", ["4", "5"])
    assert texts_until(chunked, "5") == ["1", "3", "4", "5"]
    assert texts_until(raw, "5") == ["1", "3", "4", "5"]
    assert texts_until(tagged, "5") == ["1", "2", "4", "5"]
    seen(chunked, raw, tagged)
    assert len({id(p.client.group) for p in (chunked, raw, tagged)}) == 3


def test_resume_from_any_id(hub, peers):
    """All that follows, once; with what comes meanwhile."""
    ids = [hub.publish("a", str(n)) for n in range(20)]
    here = [peers(hub, after=id) for id in ids]
    for n in range(20, 40):
        hub.publish("a", str(n))
    for k, peer in enumerate(here):
        assert texts_until(peer, "39") == [str(n) for n in range(k + 1, 40)]
    (last,) = {peer.events()[-1].id for peer in here}
    assert last == hub.head("a")


def test_an_id_that_is_not_kept(peers):
    """A reset, then what is kept."""
    hub = Hub(capacity=5)
    try:
        ids = [hub.publish("a", str(n)) for n in range(20)]
        peer, strange = peers(hub, after=ids[3]), peers(hub, after="abc")
        for each in (peer, strange):
            texts_until(each, "19")
            reset, *rest = each.events()
            assert (reset.event, reset.json()["reason"]) == ("reset", "unknown")
            assert reset.id == ids[14]
            assert [event.data for event in rest] == ["15", "16", "17", "18", "19"]
    finally:
        hub.close()


def test_a_snapshot_by_a_callable(hub, peers):
    """Run in a lane, where the client begins; then what came since."""
    peer = peers(hub, after="abc", on_gap=lambda: ["snapshot"])
    texts_until(peer, "snapshot")
    hub.publish("a", "next")
    assert texts_until(peer, "next")[1:] == ["snapshot", "next"]


def test_several_channels_and_patterns(hub, peers):
    """Each channel's events in order; the ids hold all of the places."""
    two, wild = peers(hub, "a", "b"), peers(hub, "x:*")
    settle(two.client._loop)
    for n in range(50):
        hub.publish("ab"[n % 2], str(n))
        hub.publish(f"x:{n % 5}", str(n))
    for peer in (two, wild):
        found = peer.read_until(lambda events: len(events) == 50)
        assert sorted(int(e.data) for e in found) == list(range(50))
        for k in range(2 if peer is two else 5):
            step = 2 if peer is two else 5
            mine = [int(e.data) for e in found if int(e.data) % step == k]
            assert mine == sorted(mine)
    middle = two.events()[25].id
    again = peers(hub, "a", "b", after=middle)
    rest = [e.data for e in again.read_until(lambda events: len(events) == 24)]
    assert sorted(rest) == sorted(e.data for e in two.events()[26:])


def test_throttle_and_the_latest_of_a_key(hub, peers):
    """Not oftener than asked for; of each key the newest is there."""

    def key(event):
        return event.data.partition(":")[0]

    peer = peers(hub, throttle=0.1, conflate=key)
    began = time.monotonic()
    hub.publish("a", "x:0")
    assert texts_until(peer, "x:0") == ["x:0"]
    for n in range(1, 100):
        hub.publish("a", f"{'xy'[n % 2]}:{n}")
    found = texts_until(peer, "y:99")
    times = (time.monotonic() - began) / 0.1  # so often, at most, after the first
    assert times >= 1
    assert found[-2:] == ["x:98", "y:99"]
    assert len(found) <= 1 + 2 * times


def test_a_keepalive_comes_in_silence(hub, peers):
    """To a group, and to whoever is by himself; not beside events."""
    together = [peers(hub, keepalive=0.2) for _ in range(2)]
    alone = peers(hub, "a", "b", keepalive=0.2, is_chunked=False)
    for peer in (*together, alone):
        began = time.monotonic()
        while peer.body()[0].count(b": keepalive\n\n") < 3:
            peer.data += peer.socket.recv(1 << 20)
        assert peer.body()[0] == b": keepalive\n\n" * peer.body()[0].count(b":")
        assert time.monotonic() - began < 10
    began = time.monotonic()
    together[0].read()
    before = together[0].body()[0].count(b": keepalive")
    for n in range(20):
        hub.publish("a", str(n))
    texts_until(together[0], "19")
    more = together[0].body()[0].count(b": keepalive") - before
    assert more <= 1 + (time.monotonic() - began) / 0.2


def test_a_keepalive_comes_in_the_form_that_a_client_reads(hub, peers):
    """Those who read by lines and those who split at blank lines share no group."""
    forms = {b": keepalive\n": [], b": keepalive\n\n": []}
    for comment in (*forms, *forms):
        forms[comment].append(peers(hub, keepalive=0.2, comment=comment))
    hub.publish("a", "0")
    for comment, here in forms.items():
        for peer in here:
            texts_until(peer, "0")
            while peer.body()[0].count(b": keepalive") < 3:
                peer.data += peer.socket.recv(1 << 20)
            before, event, after = peer.body()[0].partition(
                b"id: %b\ndata: 0\n\n" % hub.head("a").encode()
            )
            assert event
            for part in (before, after):
                assert part == comment * part.count(b":")


# Who is slow.


def full(hub, peer, channel="a"):
    """Publish until a client does not take any more."""
    settle(peer.client._loop)  # it has its head
    n = 0
    while peer.client.rest is None:
        hub.publish(channel, f"{n} {'x' * 10_000}")
        n += 1
        settle(peer.client._loop)
        assert n < 2000
    return n


def test_who_lags_goes_on_by_himself(hub, peers, loop):
    """The others do not wait for him; he gets all, and is with them again."""
    slow, *others = [peers(hub) for _ in range(4)]
    seen(slow, *others)
    n = 0
    while slow.client.rest is None:
        hub.publish("a", f"{n} {'x' * 10_000}")
        n += 1
        for peer in others:
            texts_until(peer, f"{n - 1} {'x' * 10_000}")
    assert not slow.client.group.is_shared
    hub.publish("a", "last")
    for peer in others:
        assert len(texts_until(peer, "last")) == n + 1
    found = texts_until(slow, "last")
    assert [text.partition(" ")[0] for text in found[:-1]] == list(map(str, range(n)))
    seen(slow, *others)
    assert len({id(peer.client.group) for peer in (slow, *others)}) == 1
    hub.publish("a", "together")
    for peer in (slow, *others):
        assert texts_until(peer, "together")[-2:] == ["last", "together"]


def test_who_stops_is_dropped(hub, peers):
    """After send_timeout, and not before; twenty others get everything."""
    stuck = [peers(hub, is_tcp=True, send_timeout=1.0) for _ in range(3)]
    stuck.append(peers(hub, is_tcp=True, send_timeout=1.0, is_chunked=False))
    others = [peers(hub, send_timeout=1.0) for _ in range(20)]
    for peer in stuck:
        peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    began = time.monotonic()
    n = 0
    while not all(peer.ends for peer in stuck):
        hub.publish("a", f"{n} {'x' * 10_000}")
        n += 1
        for peer in others:
            texts_until(peer, f"{n - 1} {'x' * 10_000}")
            peer.data = HEAD
        assert time.monotonic() - began < TIMEOUT
    assert time.monotonic() - began >= 1.0
    assert [peer.ends for peer in stuck] == [["send_timeout"]] * 4
    assert not any(peer.ends for peer in others)


def test_who_may_stop_for_ever_shields_nobody(hub, peers):
    """Without a send_timeout one is kept, and another is dropped after its own."""
    patient = peers(hub, is_tcp=True)
    stuck = peers(hub, is_tcp=True, send_timeout=0.5)
    for peer in (patient, stuck):
        peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    for n in range(1000):
        hub.publish("a", f"{n} {'x' * 10_000}")
    await_true(lambda: stuck.ends)
    assert stuck.ends == ["send_timeout"]
    assert patient.ends == []


@pytest.mark.parametrize("is_tcp", [True, False], ids=["TCP", "Unix"])
def test_who_reads_a_little_is_kept(hub, peers, is_tcp):
    """What he takes counts, though there is never room for all."""
    # A busy machine may pause us; and the kernel opens a window late (0.9 s measured).
    peer = peers(hub, is_tcp=is_tcp, send_timeout=3.0)
    if is_tcp:
        peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    n = full(hub, peer)
    for _ in range(40):  # 64 KiB had room before: no more comes until they are read
        peer.read(2000)
    most = 2000 if is_tcp else 500  # a Unix socket has room again at a quarter
    began = time.monotonic()
    while time.monotonic() - began < 5:
        peer.read(most)
        time.sleep(0.02)
    assert peer.ends == []
    hub.publish("a", "last")
    assert len(texts_until(peer, "last")) == n + 1


def test_no_client_is_dropped_for_a_loop_that_stood_still(hub, peers):
    """Nobody has looked how much it takes: half of its time is left, at least."""
    peer = peers(hub, is_tcp=True, send_timeout=2.0)
    loop = peer.client._loop
    full(hub, peer)

    def stand_still():
        peer.client.since = time.monotonic() - 60
        peer.client.acknowledged = None  # nor has anybody before
        loop._looked_at = 0.0

    loop.call(stand_still)
    began = time.monotonic()
    settle(loop)
    assert peer.ends == []
    await_true(lambda: peer.ends)
    assert peer.ends == ["send_timeout"]
    assert time.monotonic() - began >= 1.0


@pytest.mark.parametrize("is_conflated", [False, True])
def test_a_lag_is_told(peers, is_conflated):
    """And it goes on with what is kept, or with the newest of each key."""
    hub = Hub(capacity=10)
    key = (lambda event: event.data.partition(" ")[0]) if is_conflated else None
    peer = peers(hub, conflate=key)
    n = full(hub, peer)
    for k in range(400):  # more than the window has
        hub.publish("a", f"{n + k}")
    settle(peer.client._loop)
    last = str(n + 399)
    found = texts_until(peer, last)
    resets = [e for e in peer.events() if e.event == "reset"]
    assert [e.json()["reason"] for e in resets] == ["lagged"]
    assert found[-10:] == [str(n + 390 + k) for k in range(10)]
    hub.close()


# How it ends.


def ended(peer):
    """Wait for a client's end; return why, and all that it has got."""
    body, is_whole, is_reset = peer.read_all()
    await_true(lambda: peer.ends)
    (reason,) = peer.ends
    return reason, body, is_whole, is_reset


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
    settle(peer.client._loop)
    peer.subscription.who = "broken"
    reason, _, is_whole, is_reset = ended(peer)
    assert (reason, is_whole, is_reset) == ("error", False, not is_chunked)
    settle(peer.client._loop)  # its line comes later
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
    settle(peer.client._loop)
    (total,) = process.stats()["ended"].values()
    assert process.stats()["ended"].keys() == {"kicked"}
    assert (total["streams"], total["events"]) == (1, 3)
    assert len(body) - 20 < total["bytes"] <= len(body) + len(HEAD)
    assert not peer.served.parked
    levels = [(r.levelname, r.getMessage().partition(":")[0]) for r in caplog.records]
    assert levels == [
        ("ERROR", "a callback at the end of GET '/a' failed"),
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


# Who holds up whom.


class Place:
    """One of a capacity's, which says so when it is given back."""

    def __init__(self):
        self.released = threading.Event()

    def release(self):
        self.released.set()


def test_an_application_that_blocks_holds_up_nobody_else(hub, peers):
    """Not what others read, not their places, their presence, nor their end."""
    is_blocking, go_on = threading.Event(), threading.Event()

    def authorize(subscription):
        if subscription.who == "slow":
            is_blocking.set()
            assert go_on.wait(TIMEOUT)
        return True

    place, process = Place(), Process()
    others = {
        "plain": peers(hub, "a"),
        "tagged": peers(hub, "a", tags=["t"]),
        "two": peers(hub, "a", "b"),
        "throttled": peers(hub, "a", throttle=0.01),
        "pattern": peers(hub, "*"),
        "retried": peers(hub, "a", on_gap="live", after="now"),
    }
    leaver = peers(hub, "a", who="ann", place=place, process=process)
    settle(leaver.client._loop)
    slow = peers(hub, "x", who="early", authorize=(authorize, 0.1))
    slow.subscription.who = "slow"
    try:
        assert is_blocking.wait(TIMEOUT)
        hub.publish("a", "0", only=["nobody"])
        hub.publish("a", "1", only=["t"])
        hub.publish("a", "2", exclude=["t"])
        hub.publish("a", "3")
        for name, peer in others.items():
            between = "1" if name == "tagged" else "2"
            assert texts_until(peer, "3") == [between, "3"]
        assert hub.presence("a").count("ann") == 1
        leaver.leave()
        assert place.released.wait(TIMEOUT)
        await_true(lambda: "ann" not in hub.presence("a"))
        assert process.stats()["ended"]["disconnected"]["streams"] == 1
        await_true(lambda: leaver.ends)
    finally:
        go_on.set()


@pytest.mark.parametrize("hung", [3, 100])
def test_an_authorize_that_hangs_lets_nobody_go_on(hub, peers, loop, monkeypatch, hung):
    """Who gets no answer in time is denied; the others are asked all the same."""
    monkeypatch.setattr(limits, "ANSWER", 1.0)
    go_on, answers = threading.Event(), {"revoked": True, "well": True}
    given_back = []

    def authorize(subscription):
        if subscription.who == "hung":
            assert go_on.wait(TIMEOUT)
            return True
        return answers[subscription.who]

    asked = {
        "authorize": (authorize, 0.2),
        "before_wait": [lambda: given_back.append(1)],
    }
    stuck = [peers(hub, who="well", **asked) for _ in range(hung)]
    well = peers(hub, who="well", **asked)
    revoked = peers(hub, who="revoked", **asked)
    for peer in stuck:
        peer.subscription.who = "hung"
    answers["revoked"] = False
    began = time.monotonic()
    try:
        assert ended(revoked)[0] == "denied"
        assert {ended(peer)[0] for peer in stuck} == {"denied"}
        assert time.monotonic() - began < 5
        hub.publish("a", "1")
        assert texts_until(well, "1") == ["1"]
    finally:
        go_on.set()
    crew = loop.lanes().asks
    await_true(lambda: crew._threads - crew._idle == 0)
    assert len(given_back) >= hung
    settle(loop)  # answers that come late bring nobody back
    assert hub.presence("a") == ["well"]


def test_who_cannot_be_asked_is_denied(hub, peers, monkeypatch):
    """When so many hang that there is nobody left to ask."""
    monkeypatch.setattr(limits, "ANSWER", 0.4)
    monkeypatch.setattr(lanes_module, "MOST_ASKING", 1)
    go_on, is_hung, asked = threading.Event(), threading.Event(), []

    def authorize(subscription):
        asked.append(subscription.who)
        if len(asked) > 2:
            is_hung.set()
            assert go_on.wait(TIMEOUT)
        return True

    both = [peers(hub, who=n, authorize=(authorize, 0.1)) for n in range(2)]
    try:
        assert is_hung.wait(TIMEOUT)
        assert [ended(peer)[0] for peer in both] == ["denied", "denied"]
        assert len(asked) == 3
    finally:
        go_on.set()


class Mute(MemoryBroker):
    """One that takes its time to publish who leaves."""

    def __init__(self):
        super().__init__()
        self.is_asked, self.go_on = threading.Event(), threading.Event()

    def publish(self, items, *, connection=None):
        if any(b"event: leave" in payload for _, payload in items):
            self.is_asked.set()
            assert self.go_on.wait(TIMEOUT)
        return super().publish(items, connection=connection)


def test_a_broker_that_is_slow_holds_up_no_place(peers):
    """Nor the counting of an end, nor the presence of who is not announced."""
    broker = Mute()
    hub = Hub(broker=broker)
    try:
        process, places = Process(), [Place(), Place(), Place()]
        told = [{"announce": True}, {"announce": True}, {}]
        here = [
            peers(hub, who=n, place=place, process=process, **more)
            for n, (place, more) in enumerate(zip(places, told, strict=True))
        ]
        settle(here[0].client._loop)
        for peer in here:
            peer.leave()
        assert broker.is_asked.wait(TIMEOUT)
        for place in places:
            assert place.released.wait(TIMEOUT)
        await_true(lambda: 2 not in hub.presence("a"))
        await_true(lambda: process.stats()["ended"]["disconnected"]["streams"] == 3)
        await_true(lambda: here[2].ends)
        assert here[1].ends == []
        broker.go_on.set()
        await_true(lambda: here[0].ends and here[1].ends)
        assert hub.presence("a") == []
    finally:
        broker.go_on.set()
        hub.close()


def test_tags_are_told_apart_by_the_loop(hub, peers):
    """No lane is asked: not one of them is free."""
    peer, tagged = peers(hub), peers(hub, tags=["t"])
    hub.publish("a", "0")
    for each in (peer, tagged):
        texts_until(each, "0")
    seen(peer, tagged)
    lanes, go_on = peer.client.terms.lanes, threading.Event()
    try:
        for lane in (lanes.reads, lanes.users, lanes.ends):
            lane.do(lambda: go_on.wait(TIMEOUT))
        for n in range(1, 30):  # all of them in the window
            hub.publish("a", str(n), only=["t"] if n % 2 else ["nobody"])
        hub.publish("a", "last", exclude=["nobody"])
        odd = [str(n) for n in range(1, 30, 2)]
        assert texts_until(tagged, "last") == ["0", *odd, "last"]
        assert texts_until(peer, "last") == ["0", "last"]
    finally:
        go_on.set()


class Deaf(MemoryBroker):
    """One that does not tell of its events, for a while."""

    is_deaf = False

    def is_watched(self, channel):
        return not self.is_deaf and super().is_watched(channel)


def test_a_gap_of_many_at_one_place(peers):
    """Each is told as it has asked for: its own snapshot, or none, or what is kept."""
    broker = Deaf(capacity=5)
    hub = Hub(broker=broker)
    try:
        asked = ["live", lambda: ["ann"], lambda: ["bob"], "replay"]
        here = [peers(hub, on_gap=on_gap) for on_gap in asked]
        hub.publish("a", "0")
        for peer in here:
            texts_until(peer, "0")
        seen(*here)
        assert here[1].client.group is here[2].client.group
        broker.is_deaf = True
        hub.publish_many("a", [str(n) for n in range(1, 10)])
        broker.is_deaf = False
        hub.sink.resync(None)
        for peer in here:
            peer.read_until(lambda events: any(e.event == "reset" for e in events))
        settle(here[0].client._loop)
        hub.publish("a", "last")
        found = [texts_until(peer, "last")[2:-1] for peer in here]
        assert found == [[], ["ann"], ["bob"], ["5", "6", "7", "8", "9"]]
        seen(*here)
    finally:
        hub.close()


def test_a_lane_that_cannot_be_started(loop, monkeypatch):
    """Another does what it should do; the next time it is tried again."""
    start, is_full = native(_thread, "start_new_thread"), True

    def maybe(function, *args):
        if is_full:
            raise RuntimeError("can't start new thread")
        return start(function, *args)

    real = lanes_module.native
    monkeypatch.setattr(
        lanes_module,
        "native",
        lambda module, name: maybe if module is _thread else real(module, name),
    )
    monkeypatch.setattr(loop, "_lanes", {})
    with pytest.raises(RuntimeError):  # before anything is taken from its server
        loop.lanes()
    is_full = False
    lanes = loop.lanes()
    is_full = True
    assert len(idents(lanes.users, lanes.reads, lanes.ends)) == 1
    is_full = False
    assert len(idents(lanes.users, lanes.reads, lanes.ends)) == 3


def idents(*lanes):
    """Return the threads that these run in."""
    found = set()
    for lane in lanes:
        done = threading.Event()
        lane.do(lambda: found.add(threading.get_ident()))
        lane.do(done.set)
        assert done.wait(TIMEOUT)
    return found


def test_hooks_that_cannot_be_compared(loop, hub, peers):
    """Are no reason to fail after a connection was taken: they are not asked then."""

    class Hook:
        __hash__ = None
        calls = 0

        def __call__(self):
            self.calls += 1

    hook = Hook()
    peer = peers(hub, before_wait=[hook])
    hub.publish("a", "1")
    assert texts_until(peer, "1") == ["1"]
    peer.leave()
    await_true(lambda: hook.calls)


def test_a_subscription_of_two_responses(hub, peers):
    """The second is told so, before anything is sent; the first goes on."""
    peer = peers(hub)
    second = Client(
        peer.client._loop,
        -1,
        peer.subscription,
        peer.client.terms,
        label="GET '/a'",
        began=0.0,
    )
    for use in (
        peer.subscription.begin,
        lambda: peer.subscription.detach(second),
        lambda: peer.subscription.read(0),
    ):
        with pytest.raises(RuntimeError, match="one for each response"):
            use()
    hub.publish("a", "1")
    assert texts_until(peer, "1") == ["1"]


def test_a_hub_that_closes_while_a_client_comes(hub, peers):
    """Its end is an end as others; nothing is subscribed any more by then."""
    peer = peers(hub, add=False)
    hub.windows.is_closed = True  # as in the midst of close()
    peer.client._loop.add(peer.client, HEAD)
    seen(peer)
    hub.windows.is_closed = False
    hub.close()
    assert ended(peer)[0] == "closed"


@pytest.mark.parametrize("channels", ["a", "ab"])
def test_nothing_stays_until_a_collection(hub, peers, loop, channels):
    """What has ended is freed at once, with what it had not sent, and its server."""
    alive = weakref.WeakSet()
    kinds = (Client, group_module.Group, type(hub.subscribe("a")), Terms, Served)
    gc.collect()
    others = {id(o): o for o in gc.get_objects() if type(o) in kinds}
    gc.disable()
    try:
        for _ in range(20):
            here = [Peer(loop, hub, *channels) for _ in range(3)]
            hub.publish("a", "1")
            for peer in here:
                texts_until(peer, "1")
                alive.add(peer.subscription)
            full(hub, here[0])
            await_true(lambda here=here: here[0].client.rest is not None)
            for peer in here:
                peer.leave()
            for peer in here:
                await_true(lambda peer=peer: peer.ends)
            settle(loop)
            del here, peer
        assert len(alive) == 0
        left = [o for o in gc.get_objects() if type(o) in kinds]
        assert [o for o in left if id(o) not in others] == []
    finally:
        gc.enable()


def test_nothing_stays_of_a_stream_that_kept_its_thread(hub):
    """It is freed by its end, too."""
    alive = weakref.WeakSet()
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            stream = Stream(hub.subscribe("a"), EVENTS, handover=False)
            body = iter(stream)
            alive.add(stream)
            assert next(body) == b": ok\n\n"
            hub.publish("a", "1")
            assert b"data: 1" in next(body)
            stream.close()
            del stream, body
        assert len(alive) == 0
    finally:
        gc.enable()


# What could go wrong.


def test_what_comes_while_a_lane_reads(hub, peers):
    """Told between the lane's last look and the loop's hearing of it: not missed."""
    rounds = iter(range(1, 50))

    def publish():
        # The lane runs this when it has read, before it says so.
        for n in rounds:
            hub.publish("a", str(n))
            return

    two = peers(hub, "a", "b", before_wait=[publish], on_gap=list)
    found = texts_until(two, "49")
    assert found == [str(n) for n in range(int(found[0]), 50)]


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_group_whose_timer_is_not_removed_at_once(
    hub, peers, loop, is_shared, monkeypatch
):
    """Its client, that goes to another, is cut; it is forgotten all the same."""
    remove, left = loop.wheel.remove, []

    def fail_once(item):
        is_left = isinstance(item, Group) and not item.clients and item.bucket
        if is_left and item.is_shared == is_shared and not left:
            left.append(item)
            raise MemoryError
        remove(item)

    monkeypatch.setattr(loop.wheel, "remove", fail_once)
    two = [peers(hub, keepalive=TIMEOUT) for _ in range(2)]
    if is_shared:
        seen(*two)
        for _ in range(12):  # more than the kernel takes
            hub.publish("a", "x" * 100_000)
    await_true(lambda: any(peer.ends for peer in two))
    assert sorted(peer.ends for peer in two) == [[], ["error"]]
    (group,) = left
    assert not group.bucket
    await_true(lambda: group.leader.waiter is None)


def test_an_end_that_comes_first(hub, peers, loop):
    """Stopped or kicked by another thread while it is on its way to the loop."""
    for end in (
        lambda peer: peer.client.stop("shutdown"),
        lambda peer: loop.call(peer.client.turn) or peer.subscription.close("kicked"),
    ):
        peer = peers(hub, add=False)
        end(peer)
        settle(loop)
        loop.add(peer.client, HEAD)
        reason, body, is_whole, _ = ended(peer)
        assert reason in ("shutdown", "kicked")
        assert peer.data.startswith(HEAD)
        assert RETRY.fullmatch(body)
        assert is_whole


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_an_application_that_exits_in_a_lane(hub, peers, error, caplog):
    """Its client has an end; the lane goes on for the others."""
    is_quiet = threading.Event()

    def authorize(subscription):
        if is_quiet.is_set():
            raise error
        return True

    def callback():
        raise error

    peer = peers(hub, authorize=(authorize, 0.1), callbacks=[callback])
    settle(peer.client._loop)
    is_quiet.set()
    assert ended(peer)[0] == "error"
    other = peers(hub, "a", "b")
    settle(other.client._loop)
    hub.publish("a", "1")
    assert texts_until(other, "1") == ["1"]


def test_an_application_that_blocks(hub, peers):
    """Others get their events, and theirs ends when its time is over."""
    is_blocking, go_on = threading.Event(), threading.Event()
    asked = []

    def authorize(subscription):
        asked.append(1)
        if len(asked) > 1:
            is_blocking.set()
            assert go_on.wait(TIMEOUT)
        return True

    other = peers(hub)
    seen(other)
    deadline = time.monotonic() + 2  # it is asked before that
    peer = peers(hub, authorize=(authorize, 0.1), deadline=deadline)
    try:
        assert is_blocking.wait(TIMEOUT)
        for n in range(10):
            hub.publish("a", str(n))
            assert texts_until(other, str(n))[-1] == str(n)
        body, is_whole, _ = peer.read_all()
        assert is_whole
        assert RETRY.search(body)
    finally:
        go_on.set()
    await_true(lambda: peer.ends)
    assert peer.ends == ["max_duration"]


class Failing(MemoryBroker):
    """One that is down for a while."""

    is_down = False
    refused = ""
    failure = None

    def read(self, channel, after, limit=1000):
        if self.is_down:
            raise Unavailable("down")
        if channel == self.refused:
            raise Denied("no permission")
        if self.failure is not None:
            raise self.failure
        return super().read(channel, after, limit)


@pytest.mark.parametrize("channels", ["a", "ab"])
def test_a_broker_that_is_down_for_a_while(peers, channels, monkeypatch):
    """Its clients wait; then they get what they have missed."""
    monkeypatch.setattr(group_module, "RETRY_EVERY", 0.1)
    broker = Failing()
    hub = Hub(broker=broker)
    try:
        here = [peers(hub, *channels) for _ in range(2)]
        hub.publish("a", "0")
        for peer in here:
            texts_until(peer, "0")
        broker.is_down = True
        hub.sink.resync(None)
        hub.publish("a", "1")
        settle(here[0].client._loop)
        hub.publish("a", "2")
        settle(here[0].client._loop)
        broker.is_down = False
        for peer in here:
            assert texts_until(peer, "2") == ["0", "1", "2"]
    finally:
        hub.close()


@pytest.mark.parametrize("channels", ["a", "ab"])
def test_what_is_malformed_silences_nobody(hub, peers, channels):
    """Told, it is dropped; stored, it is a reset; what follows it comes."""
    here = [peers(hub, *channels) for _ in range(2)]
    hub.publish("a", "0")
    for peer in here:
        texts_until(peer, "0")
    for payload in (b"\0nope", b"", b"event: reset\ndata: {}\n\n"):
        hub.sink.deliver("a", Entry("7-7", hub.head("a"), payload))
        settle(here[0].client._loop)
    hub.publish("a", "1")
    for peer in here:
        assert texts_until(peer, "1") == ["0", "1"]
    hub.broker.publish([("a", b"\0nope")])
    hub.publish("a", "2")
    for peer in here:
        events = peer.read_until(lambda events: events[-1].data == "2")
        assert [event.event for event in events] == [None, None, "reset", None]
    late = peers(hub, *channels, after=events[1].id)
    late.read_until(lambda events: [e.event for e in events] == ["reset", None])


@pytest.mark.parametrize("what", ["poll", "step"])
@pytest.mark.parametrize("channels", ["a", "ab"])
def test_a_turn_that_raises_ends_its_clients(hub, peers, channels, what, monkeypatch):
    """They come back; others go on, and so does whoever comes then."""
    here = [peers(hub, *channels) for _ in range(3)]
    other = peers(hub, "c")
    hub.publish("a", "0")
    hub.publish("c", "0")
    for peer in (*here, other):
        texts_until(peer, "0")
    found = getattr(Subscription, what)

    def fail(subscription):
        if "a" in subscription.channels and (what == "step" or subscription.is_plain):
            raise ZeroDivisionError
        return found(subscription)

    is_asked = what == "step" or channels == "a"
    monkeypatch.setattr(Subscription, what, fail)
    if what == "step":
        hub.sink.resync(["a"])
    hub.publish("a", "1")
    for peer in here if is_asked else ():
        await_true(lambda peer=peer: peer.ends)
        assert peer.ends == ["error"]
        _, is_whole, _ = peer.read_all()
        assert not is_whole
    hub.publish("c", "1")
    assert texts_until(other, "1") == ["0", "1"]
    monkeypatch.undo()
    again = peers(hub, *channels, after="start")
    texts_until(again, "1")


class Hanging(MemoryBroker):
    """One that does not answer of one channel, until it is let."""

    def __init__(self):
        super().__init__()
        self.hung = ""
        self.is_asked, self.go_on = threading.Event(), threading.Event()

    def read(self, channel, after, limit=1000):
        if channel == self.hung:
            self.is_asked.set()
            assert self.go_on.wait(TIMEOUT)
        return super().read(channel, after, limit)


def test_a_lane_that_hangs_keeps_nobody_for_ever(peers, monkeypatch):
    """Who waits for it, or behind it, is ended, and may come back; it is said."""
    monkeypatch.setattr(group_module, "STUCK", 0.2)
    broker = Hanging()
    hub = Hub(broker=broker)
    try:
        hung, behind = [peers(hub) for _ in range(2)], peers(hub, "b")
        other = peers(hub, "c")
        for name in "abc":
            hub.publish(name, "0")
        for peer in (*hung, behind, other):
            texts_until(peer, "0")
        seen(other)  # at the end of its channel: nothing is to be read for it
        settle(other.client._loop)
        broker.hung = "a"
        hub.sink.resync(["a"])
        assert broker.is_asked.wait(TIMEOUT)
        hub.sink.resync(["b"])
        for peer in (*hung, behind):
            await_true(lambda peer=peer: peer.client.reason == "error")
        hub.publish("c", "1")
        assert texts_until(other, "1") == ["0", "1"]
        assert other.client.reason is None
    finally:
        broker.go_on.set()
        hub.close()


def test_a_broker_that_fails_is_not_one_that_is_away(peers, monkeypatch):
    """An error that does not pass by waiting ends those who would wait for it."""
    broker = Failing()
    hub = Hub(broker=broker)
    try:
        peer = peers(hub)
        hub.publish("a", "0")
        texts_until(peer, "0")
        monkeypatch.setattr(broker, "failure", BrokerError("another version's"))
        hub.sink.resync(None)
        await_true(lambda: peer.ends)
        assert peer.ends == ["error"]
    finally:
        hub.close()


@pytest.mark.parametrize("how", ["told", "read"])
@pytest.mark.parametrize("channels", ["a", "ab"])
def test_a_name_that_is_refused_ends_its_clients(peers, channels, how):
    """Those of that name alone, and they come back late; it is not asked again."""
    broker = Failing()
    hub = Hub(broker=broker)
    try:
        here = [peers(hub, *channels) for _ in range(2)]
        other = peers(hub, "c")
        hub.publish("a", "0")
        for peer in here:
            texts_until(peer, "0")
        if how == "told":
            hub.sink.deny("a", "NOPERM")
        else:
            broker.refused = "a"
            hub.sink.resync(["a"])
        for peer in here:
            await_true(lambda peer=peer: peer.ends)
            assert peer.ends == ["denied"]
            assert RETRY.search(peer.read_all()[0])
        hub.publish("c", "1")
        assert texts_until(other, "1") == ["1"]
        assert hub.presence("a") == []
    finally:
        hub.close()


def test_joins_and_leaves_while_others_publish(loop):
    """Four threads publish, four come and go: nothing lost, doubled, out of order."""
    hub = Hub(capacity=1_000_000)
    stop = threading.Event()
    problems, visits = [], []

    def publish(k):
        n = 0
        while not stop.is_set():
            hub.publish("a", f"{k} {n}")
            n += 1
            if n % 20 == 0:
                time.sleep(0.001)

    def visit():
        while not stop.is_set():
            peer = Peer(loop, hub, is_chunked=random.random() < 0.5)
            try:
                wanted = random.randrange(1, 40)
                events = peer.read_until(lambda e, wanted=wanted: len(e) >= wanted)
                visits.append([event.id for event in events])
            except BaseException as error:
                problems.append(error)
                return
            finally:
                peer.leave()

    threads = [threading.Thread(target=publish, args=(k,)) for k in range(4)]
    threads += [threading.Thread(target=visit) for _ in range(4)]
    for thread in threads:
        thread.start()
    least = time.monotonic() + 2
    try:
        await_true(lambda: problems or (visits[20:] and time.monotonic() > least))
    finally:
        stop.set()
    while any(thread.is_alive() for thread in threads):
        hub.publish("a", "for those who still wait")
        threads[-1].join(0.01)
    assert problems == []
    ids, last = [], "0"
    while entries := hub.broker.read("a", last).entries:
        ids += [entry.id for entry in entries]
        last = ids[-1]
    places = {id: place for place, id in enumerate(ids)}
    for visit in visits:
        first = places[visit[0]]
        assert visit == ids[first : first + len(visit)]
    await_true(lambda: not hub.presence("a"))
    hub.close()


def test_a_child_lets_go():
    """Once: a child's child closes nothing, and clients see an end by the parent's."""
    out = check_script(
        """
import os, socket, time
from tests.fanout.peers import HEAD, Peer, settle
from syncstream import Hub
from syncstream.fanout.loop import fanout

hub, loop = Hub(), fanout()
peer = Peer(loop, hub)
settle(loop)
fd = peer.client.fd
reader, writer = os.pipe()
pid = os.fork()
if not pid:
    status = 1
    try:
        # Its numbers are free here; somebody else takes them.
        null = os.open(os.devnull, os.O_RDONLY)
        taken = [null]
        for number in (fd, loop._event_fd):
            if number > 0 and number not in taken:
                taken.append(os.dup2(null, number))
        inner = os.fork()
        if not inner:
            for number in taken:
                os.fstat(number)
            own = fanout()
            assert own is not loop
            here = Hub()
            mine = Peer(own, here)
            settle(own)
            here.publish("a", "child")
            mine.read_until(lambda events: events)
            os._exit(0)
        assert os.waitpid(inner, 0)[1] == 0
        os.write(writer, b"x")
        time.sleep(60)
    finally:
        os._exit(status)
assert os.read(reader, 1) == b"x"
hub.publish("a", "parent")
peer.read_until(lambda events: events)
peer.client.stop("shutdown")
body, is_whole, _ = peer.read_all()
assert is_whole, body
os.kill(pid, 9)
os.waitpid(pid, 0)
peer.leave()
print("done")
"""
    )
    assert out == "done\n"


@pytest.mark.parametrize("where", ["in a swap", "on its way"])
def test_a_child_lets_go_of_who_is_not_there_yet(where):
    """Of a connection that has left its server, and is in no table of the loop's."""
    out = check_script(
        """
import os, sys, threading
from tests.fanout.peers import Peer, settle
from syncstream import Hub
from syncstream.fanout.loop import fanout
from syncstream.runtime.sockets import hold

hub, loop = Hub(), fanout()
settle(loop)
peer = Peer(loop, hub, add=False)
fd, go_on = peer.client.fd, threading.Event()
if sys.argv[1] == "in a swap":
    hold(fd)
else:
    is_held = threading.Event()
    loop.call(lambda: is_held.set() or go_on.wait(15))
    assert is_held.wait(15)
    loop.add(peer.client, b"")
pid = os.fork()
if not pid:
    try:
        os.fstat(fd)
    except OSError:
        os._exit(0)
    os._exit(1)
assert os.waitpid(pid, 0)[1] == 0
os.fstat(fd)
go_on.set()
if sys.argv[1] == "in a swap":
    loop.add(peer.client, b"")
peer.leave()
settle(loop)
print("done")
""",
        where,
    )
    assert out == "done\n"


GREENLETS = """
import gevent
from gevent import monkey
monkey.patch_all()
import threading
from syncstream.fanout.loop import fanout
from syncstream.runtime.sockets import native
"""


def test_lanes_of_a_hub():
    """A greenlet each: one that waits holds up neither the others nor the hub."""
    out = check_script(
        GREENLETS
        + """
from gevent.event import Event

lanes, go_on, order = fanout().lanes(), Event(), []
assert fanout().lanes() is lanes
is_waiting, are_done = Event(), [Event(), Event(), Event()]
lanes.users.do(lambda: is_waiting.set() or go_on.wait(15) or order.append("late"))
lanes.users.do(lambda: order.append("users") or are_done[0].set())
assert is_waiting.wait(15)
lanes.reads.do(lambda: order.append("reads") or are_done[1].set())
assert are_done[1].wait(15)
lanes.ends.do(lambda: order.append("ends") or are_done[2].set())
assert are_done[2].wait(15)
assert not are_done[0].is_set()
go_on.set()
assert are_done[0].wait(15)
print(*order)
"""
    )
    assert out == "reads ends users\n"


def test_the_crew_of_a_hub():
    """One that hangs holds up no other, though all are greenlets of one hub."""
    out = check_script(
        GREENLETS
        + """
from gevent.event import Event

crew, go_on, hung, done = fanout().lanes().asks, Event(), Event(), Event()
crew.do(lambda: hung.set() or go_on.wait(15) or done.clear())
assert hung.wait(15)
crew.do(done.set)
gevent.sleep(0)
assert not done.is_set()
import _thread
native(_thread, "start_new_thread")(crew.hurry, ())
assert done.wait(15)
go_on.set()
while crew._greenlets:
    gevent.sleep(0.001)
print("done")
"""
    )
    assert out == "done\n"


def test_lanes_of_a_hub_that_was_destroyed():
    """Threads do what is left: the ends of its clients are counted."""
    out = check_script(
        """
import threading
import gevent
from syncstream.fanout.loop import fanout

found, ready, is_over = [], threading.Event(), threading.Event()

def serve():
    def begin():
        found.append(fanout().lanes())

    gevent.spawn(begin).join()
    ready.set()
    gevent.get_hub().destroy()
    is_over.set()

threading.Thread(target=serve).start()
assert is_over.wait(15)
(lanes,) = found
assert lanes is not fanout().lanes()
for lane in (lanes.ends, lanes.reads, lanes.users):
    done = threading.Event()
    lane.do(done.set)
    assert done.wait(15)
print("done")
"""
    )
    assert out == "done\n"


# Whatever happens.

OPS = st.one_of(
    st.tuples(st.just("publish"), st.integers(1, 12), st.sampled_from([1, 50, 3000])),
    st.tuples(st.just("publish"), st.integers(1, 12), st.sampled_from([1, 50, 3000])),
    st.tuples(st.just("tagged"), st.integers(0, 2), st.integers(1, 50)),
    st.tuples(st.just("join"), st.integers(0, 7), st.integers(0, 40)),
    st.tuples(st.just("join"), st.integers(0, 7), st.integers(0, 40)),
    st.tuples(st.just("read"), st.integers(0, 30), st.sampled_from([10, 3000, 10**6])),
    st.tuples(st.just("leave"), st.integers(0, 30), st.just(0)),
    st.tuples(st.just("kick"), st.integers(0, 30), st.just(0)),
    st.tuples(st.just("resync"), st.just(0), st.just(0)),
    st.tuples(st.just("settle"), st.just(0), st.just(0)),
)


class Story:
    """A channel, what was published to it, and who was there for how long."""

    def __init__(self, loop):
        self.loop = loop
        self.hub = Hub(capacity=20)
        self.published = []  # (id, tags only, or None)
        self.here = []
        self.all = []

    def publish(self, count, size):
        start = len(self.published)
        items = [f"{start + k} {'x' * size}" for k in range(count)]
        self.published += [(id, ()) for id in self.hub.publish_many("a", items)]

    def tagged(self, kind, size):
        only = [None, ("t",), ("nobody",)][kind]
        text = f"{len(self.published)} {'x' * size}"
        id = self.hub.publish("a", text, only=only)
        self.published.append((id, only))

    def join(self, kind, back):
        place = max(0, len(self.published) - back)
        options, first = {}, len(self.published)
        if kind & 1 and place:
            options["after"], first = self.published[place - 1][0], place
        if kind & 2:
            options["tags"] = ["t"]
        if kind & 4:
            options["is_chunked"] = False
        peer = Peer(self.loop, self.hub, **options)
        peer.first, peer.tags = first, options.get("tags", [])
        self.here.append(peer)
        self.all.append(peer)

    def read(self, which, most):
        if self.here:
            self.here[which % len(self.here)].read(most)

    def leave(self, which, _):
        if self.here:
            peer = self.here.pop(which % len(self.here))
            peer.read()
            peer.leave()

    def kick(self, which, _):
        if self.here:
            peer = self.here.pop(which % len(self.here))
            assert self.hub.kick(lambda s: s is peer.subscription) == 1

    def resync(self, *_):
        self.hub.sink.resync(None)

    def settle(self, *_):
        settle(self.loop)

    def check(self, peer, is_whole):
        """It was given, or told of, all; in order; once."""
        places = {id: place for place, (id, _) in enumerate(self.published)}
        expected = peer.first
        for event in peer.events():
            if event.event == "reset":
                reason = json.loads(event.data)["reason"]
                # A resume may be too old; else only who is slow loses anything.
                assert reason in ("unknown", "lagged")
                after = places[event.id] + 1 if event.id in places else 0
                assert after > expected
                expected = after
                continue
            place = places[event.id]
            assert event.data.startswith(f"{place} ")
            missed = self.published[expected:place]
            assert place >= expected, (place, expected)
            assert not [only for _, only in missed if is_for(only, peer.tags)]
            assert is_for(self.published[place][1], peer.tags)
            expected = place + 1
        if is_whole:
            assert expected == len(self.published)


def is_for(only, tags):
    return not only or bool(set(only) & set(tags))


@pytest.mark.parametrize("seed", [0])
@settings(max_examples=60)
@given(st.lists(OPS, min_size=5, max_size=60))
def test_whatever_happens(seed, ops):
    """Given or announced is what was published: in order, once, by whatever way."""
    loop = fanout()
    before = {
        (connection_module, "SEND_BUFFER"): 4096,
        (limits, "WINDOW"): 8,
        (limits, "READ"): 5,
        (log_module, "JOIN"): 6000,
    }
    kept = {key: getattr(*key) for key in before}
    for key, value in before.items():
        setattr(*key, value)
    story = Story(loop)
    try:
        for name, *words in ops:
            getattr(story, name)(*words)
        story.publish(1, 1)  # for all, and the last
        last = len(story.published) - 1
        for peer in story.here:
            texts_until(peer, f"{last} x")
        for peer in story.here:
            peer.leave()
        for peer in story.all:
            await_true(lambda peer=peer: peer.ends)
            if peer.socket.fileno() >= 0:
                peer.read_all()
                peer.leave()
            story.check(peer, peer in story.here)
    finally:
        for peer in story.all:
            peer.leave()
        story.hub.close()
        for key, value in kept.items():
            setattr(*key, value)
        for peer in story.all:
            await_true(lambda peer=peer: peer.ends)
