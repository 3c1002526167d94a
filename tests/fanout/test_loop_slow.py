"""Clients of the loop that are slow, or stop reading."""

import socket
import time

import pytest

from syncstream import Hub
from syncstream.fanout import loop as loop_module
from tests.fanout.peers import (
    HEAD,
    full,
    seen,
    settle,
    texts_until,
)
from tests.support.waits import TIMEOUT, await_true

pytestmark = pytest.mark.usefixtures("nothing_is_left_behind")


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


def test_a_loop_without_events_looks_at_who_lags(hub, peers, loop, monkeypatch):
    """A client that stops is dropped in time, though nothing else wakes the loop."""
    monkeypatch.setattr(loop_module, "MAX_PAUSE", 3600.0)
    settle(loop)
    peer = peers(hub, send_timeout=2.0)
    full(hub, peer)
    await_true(lambda: peer.ends)
    assert peer.ends == ["send_timeout"]


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
    loop = peer.loop
    full(hub, peer)

    def stand_still():
        peer.client.since = time.monotonic() - 60
        peer.client.acknowledged = None  # nor has anybody before
        loop._looked_at = 0.0

    began = time.monotonic()  # before it can be looked at
    loop.call(stand_still)
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
    settle(peer.loop)
    last = str(n + 399)
    found = texts_until(peer, last)
    resets = [e for e in peer.events() if e.event == "reset"]
    assert [e.json()["reason"] for e in resets] == ["lagged"]
    assert found[-10:] == [str(n + 390 + k) for k in range(10)]
    hub.close()


def test_who_may_lag_for_ever_shields_nobody(hub, peers):
    """Each who lags is looked at, whatever the time of the one before."""
    endless, timed = peers(hub), peers(hub, send_timeout=0.2)
    seen(endless)
    for _ in range(8):
        hub.publish("a", "x" * 500_000)
    await_true(lambda: timed.ends)
    assert (timed.ends, endless.ends) == (["send_timeout"], [])


def test_a_lag_begins_when_a_client_takes_no_more(hub, peers):
    """Not when it was last sent something, however long ago."""
    peer = peers(hub, send_timeout=60.0)
    texts = hub.publish("a", "1") and texts_until(peer, "1")
    assert texts == ["1"]
    time.sleep(0.05)
    began = time.monotonic()
    full(hub, peer)
    assert began <= peer.client.since <= time.monotonic()
