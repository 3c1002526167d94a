"""What the loop's clients get: all, in order, once."""

import os
import time

import pytest

from syncstream import Hub, Subscription
from syncstream.fanout import loop as loop_module
from tests.fanout.peers import (
    HEAD,
    seen,
    settle,
    texts_until,
)
from tests.support.waits import TIMEOUT, await_true

pytestmark = pytest.mark.usefixtures("nothing_is_left_behind")


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
    settle(two.loop)
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


def test_the_loop_sleeps_on_while_nothing_is_there(hub, peers, loop, monkeypatch):
    """A client gets its head without the loop, and its first event all the same."""
    settle(loop)
    woken, write = [], os.eventfd_write

    def eventfd_write(fd, n):
        woken.append(fd)
        write(fd, n)

    monkeypatch.setattr(os, "eventfd_write", eventfd_write)
    here = [peers(hub, keepalive=60.0, add=False) for _ in range(3)]
    for peer in here:
        assert peer.subscription.step() == (b"", 0, None)  # as in its request
        loop.add(peer.client, HEAD)
        peer.read()
        assert peer.data == HEAD
    assert loop._event_fd not in woken
    hub.publish("a", "1")
    for peer in here:
        assert texts_until(peer, "1") == ["1"]
    assert loop._event_fd in woken


@pytest.mark.parametrize("what", ["an event", "a kick", "a stop", "a failure"])
def test_what_comes_just_before_its_client_waits_for_no_round(
    hub, peers, loop, monkeypatch, what
):
    """It is woken for, and has found no client: the client's arrival wakes again."""
    monkeypatch.setattr(loop_module, "MAX_PAUSE", 3600.0)
    peer, awaits = peers(hub, add=False), Subscription.awaits
    client = peer.client
    assert peer.subscription.step() == (b"", 0, None)  # as in its request
    happen = {
        "an event": lambda: hub.publish("a", "1"),
        "a kick": lambda: peer.subscription.close("kicked"),
        "a stop": lambda: client.stop("kicked"),
        "a failure": lambda: loop.call(lambda: 1 / 0, client),
    }

    def await_and_let_happen(subscription, waiter):
        assert awaits(subscription, waiter)
        happen[what]()
        settle(loop)
        await_true(lambda: loop._next_look > time.monotonic() + TIMEOUT)
        return True

    monkeypatch.setattr(Subscription, "awaits", await_and_let_happen)
    loop.add(client, HEAD)
    if what == "an event":
        assert texts_until(peer, "1") == ["1"]
    else:
        peer.read_all()
        await_true(lambda: peer.ends)
        assert peer.ends == ["error" if what == "a failure" else "kicked"]
