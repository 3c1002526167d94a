"""Who holds up whom in the loop: only those with code of their own."""

import _thread
import gc
import threading
import time
import weakref

import pytest

from syncstream import Hub
from syncstream.brokers.memory import MemoryBroker
from syncstream.channels import limits
from syncstream.fanout import group as group_module
from syncstream.fanout import lanes as lanes_module
from syncstream.fanout import loop as loop_module
from syncstream.fanout.client import Client, Terms
from syncstream.runtime.process import Process, Served
from syncstream.runtime.sockets import native
from syncstream.streams.stream import Stream
from tests.brokers.sinks import MuteBroker
from tests.fanout.peers import (
    HEAD,
    Peer,
    ended,
    full,
    seen,
    settle,
    texts_until,
)
from tests.support.pairs import EVENTS, Threads
from tests.support.waits import TIMEOUT, await_true

pytestmark = pytest.mark.usefixtures("nothing_is_left_behind")


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
    settle(leaver.loop)
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
    monkeypatch.setattr(limits, "ANSWER", 1.0)
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
    monkeypatch.setattr(lanes_module, "MOST_ASKING", 1)
    go_on, are_here, asked = threading.Event(), threading.Event(), []

    def authorize(subscription):
        if are_here.is_set():
            asked.append(subscription.who)
            assert go_on.wait(TIMEOUT)
        return True

    both = [peers(hub, who=n, authorize=(authorize, 0.1)) for n in range(2)]
    monkeypatch.setattr(limits, "ANSWER", 0.4)
    are_here.set()
    try:
        assert [ended(peer)[0] for peer in both] == ["denied", "denied"]
        assert len(asked) == 1
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
        settle(here[0].loop)
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


def test_a_gap_of_many_at_one_place(peers):
    """Each is told as it has asked for: its own snapshot, or none, or what is kept."""
    broker = MuteBroker(capacity=5)
    hub = Hub(broker=broker)
    try:
        asked = ["live", lambda: ["ann"], lambda: ["bob"], "replay"]
        here = [peers(hub, on_gap=on_gap) for on_gap in asked]
        hub.publish("a", "0")
        for peer in here:
            texts_until(peer, "0")
        seen(*here)
        assert here[1].client.group is here[2].client.group
        broker.is_mute = True
        hub.publish_many("a", [str(n) for n in range(1, 10)])
        broker.is_mute = False
        hub.sink.resync(None)
        for peer in here:
            peer.read_until(lambda events: any(e.event == "reset" for e in events))
        settle(here[0].loop)
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
        peer.loop,
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
        with pytest.raises(RuntimeError, match="a subscription has one reader"):
            use()
    hub.publish("a", "1")
    assert texts_until(peer, "1") == ["1"]


def test_a_hub_that_closes_while_a_client_comes(hub, peers):
    """Its end is an end as others; nothing is subscribed any more by then."""
    peer = peers(hub, add=False)
    hub.windows.is_closed = True  # as in the midst of close()
    peer.loop.add(peer.client, HEAD)
    seen(peer)
    hub.windows.is_closed = False
    hub.close()
    assert ended(peer)[0] == "closed"


def test_calls_that_may_wait_do_not_pile_up(loop, monkeypatch):
    """A client takes more memory until it has joined: a crowd of them joins early."""
    monkeypatch.setattr(loop_module, "MAX_PAUSE", 3600.0)
    settle(loop)
    calls = []
    for n in range(loop_module.MOST_CALLS):
        loop.call(lambda n=n: calls.append(n), by=time.monotonic() + 3600)
    await_true(lambda: len(calls) == loop_module.MOST_CALLS)


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


def test_a_lane_is_started_once(monkeypatch):
    """Two that come at once would do their things at once."""
    starting, tried, starts = threading.Event(), threading.Event(), []

    def start(function, args):
        starts.append(function)
        starting.set()
        tried.wait(0.1)

    monkeypatch.setattr(lanes_module, "native", lambda module, name: start)
    monkeypatch.setattr(lanes_module, "native_lock", threading.Lock)
    lane = lanes_module.Lane()
    join = Threads().start(lane.start)
    assert starting.wait(TIMEOUT)
    lane.start()
    tried.set()
    join()
    assert len(starts) == 1


def test_what_was_taken_to_answer_is_given_back(hub, peers):
    """Each time that an application was asked, not at the end alone."""
    asked, given = [], []
    peers(
        hub,
        authorize=(lambda subscription: asked.append(1) or True, 0.02),
        before_wait=[lambda: given.append(len(asked))],
    )
    await_true(lambda: len(asked) > 3 and len(given) > 1)
    assert given[-1] > given[0]
