"""`Windows`: what the broker tells, late, twice or never, and how much is kept."""

import json
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from syncstream import Gap, Hub, Unavailable
from syncstream.brokers.log import START
from syncstream.brokers.memory import MemoryBroker
from syncstream.channels import limits, windows
from syncstream.channels.presence import PRESENCE
from syncstream.runtime.journal import journal
from tests.channels.readers import data, in_place, read_all
from tests.support.removable import untold


def test_what_was_told_in_disorder_is_not_waited_for(hub, place):
    """A window that may lack the newest is asked about before a response's wait."""
    hub.publish("a", "0")
    subscription = hub.subscribe("a")
    subscription.begin()
    sink = hub.sink
    with untold(hub):
        hub.publish_many("a", "1234")
    entries = hub.broker.read("a", START).entries

    def read():
        frames = subscription.frames(True, json.dumps, None)
        sink.deliver("a", entries[4])
        sink.deliver("a", entries[1])  # late
        chunks = [next(frames)]
        sink.deliver("a", entries[2])
        chunks += [next(frames), next(frames)]
        subscription.close()
        return chunks

    chunks = in_place(place, read)
    assert b"".join(chunks) == b"".join(entry.wire for entry in entries[1:])


class Told(MemoryBroker):
    """A broker that tells only what it is made to."""

    def __init__(self, **options):
        super().__init__(**options)
        self.sinks = []
        self.reads = 0
        self.is_down = self.is_deaf = False

    def attach(self, sink):
        self.sinks.append(sink)

    def read(self, channel, after, limit=1000):
        self.reads += 1
        if self.is_down:
            raise Unavailable("down")
        return super().read(channel, after, limit)

    def watch(self, channel):
        if self.is_deaf:
            raise Unavailable("down")
        super().watch(channel)

    def tell(self, channel, *places):
        entries = MemoryBroker.read(self, channel, "0").entries
        for place in places:
            self.sinks[0].deliver(channel, entries[place])


@pytest.mark.parametrize(
    "places",
    [
        [0, 1, 2, 3],
        [3],
        [0, 3],
        [1, 0, 3, 2],
        [3, 2, 1, 0],
        [0, 0, 1, 1, 3, 3, 0],
        [2, 3, 0],
        [0, 1, 2, 3, 1],
    ],
    ids=str,
)
@pytest.mark.parametrize("is_read_between", [False, True])
def test_word_may_be_late_twice_or_never(places, is_read_between):
    """The chain shows it: no hole, nothing twice; and nobody looks without end."""
    broker = Told()
    hub = Hub(broker=broker)
    subscription = hub.subscribe("a")
    subscription.read(0)
    found = []
    hub.publish_many("a", "0123")
    for place in places:
        broker.tell("a", place)
        if is_read_between:
            found += data(read_all(subscription))
    found += data(read_all(subscription))
    assert found == ["0", "1", "2", "3"]
    before = broker.reads
    assert subscription.read(0.05) == []
    assert broker.reads - before < 3
    hub.publish("a", "4")
    broker.tell("a", 4)
    assert data(read_all(subscription)) == ["4"]
    hub.close()


def test_a_hole_in_what_is_told_is_read(hub):
    """Who was at the end of a window is behind the hole, not beyond it."""
    broker = Told()
    hub = Hub(broker=broker)
    subscription = hub.subscribe("a")
    subscription.read(0)
    hub.publish("a", "0")
    broker.tell("a", 0)
    assert data(subscription.read(0)) == ["0"]
    hub.publish_many("a", "12")
    broker.tell("a", 2)
    assert data(read_all(subscription)) == ["1", "2"]
    hub.publish("a", "3")
    hub.sink.resync(["a", "never heard of"])
    assert data(read_all(subscription)) == ["3"]
    hub.close()


def test_a_window_that_was_not_told_for_long(hub):
    """A pattern's window, left untold: a subscriber reads the broker, and waits."""
    with_pattern = hub.subscribe("a:*")
    with_pattern.read(0)
    hub.publish("a:1", "0")
    with_pattern.close()
    hub.publish("a:1", "1")
    subscription = hub.subscribe("a:1")
    assert subscription.read(0.01) == []
    began = time.process_time()
    assert subscription.read(0.3) == []
    assert time.process_time() - began < 0.15
    hub.publish("a:1", "2")
    assert data(subscription.read(0)) == ["2"]


@pytest.mark.parametrize("what", ["is_down", "is_deaf"])
def test_a_broker_that_is_down(what):
    """Who reads waits, and is not there yet; who begins is told. Then it goes on."""
    broker = Told()
    hub = Hub(broker=broker)
    setattr(broker, what, True)
    subscription = hub.subscribe("a", "b", announce=True)
    assert subscription.read(0) == []
    with pytest.raises(Unavailable):
        subscription.begin()
    assert hub.stats()["subscribers"] == 0
    assert all(not record.subscriptions for record in hub.windows.channels.values())
    setattr(broker, what, False)
    assert not broker.read(PRESENCE, START).entries  # nobody has come, or left
    assert read_all(subscription) == []
    broker.tell(PRESENCE, 0, 1, 0)
    assert [event.event for event in read_all(subscription)] == ["join", "join"]
    assert hub.stats()["subscribers"] == 1
    subscription.close()
    hub.close()


def test_a_broker_that_goes_down_later(monkeypatch):
    """Who is there stays, waits without haste, and loses nothing of what it has."""
    monkeypatch.setattr(limits, "RETRY", 0.1)
    broker = Told()
    hub = Hub(broker=broker)
    subscription = hub.subscribe("a", "b")
    subscription.read(0)
    hub.publish_many("a", "01")
    broker.tell("a", 0, 1)
    hub.publish("b", "2")
    hub.sink.resync(["b"])
    broker.is_down = True
    assert data(subscription.read(0)) == ["0", "1"]
    looks = [0]
    while looks[-1] < 2 and len(looks) < 9:  # one that a busy machine held up has one
        before = broker.reads
        assert subscription.read(0.5) == []
        looks.append(broker.reads - before)
    assert 2 <= looks[-1] <= 12
    assert hub.stats()["subscribers"] == 1
    broker.is_down = False
    assert data(subscription.read(5)) == ["2"]
    hub.close()


def test_idle_channels_are_forgotten(hub, monkeypatch):
    """A window without subscribers goes, and is no more told of."""
    monkeypatch.setattr(limits, "IDLE", 0.0)
    for number in range(10):
        subscription = hub.subscribe(f"c{number}")
        subscription.read(0)
        subscription.close()
        time.sleep(0.001)
    assert hub.stats()["channels"] <= 1
    assert len(hub.broker.watched.names - {PRESENCE}) <= 1


def test_forgotten_and_wanted_at_once(monkeypatch):
    """A broker's unwatch that comes after another's watch costs nothing."""
    monkeypatch.setattr(limits, "IDLE", -1.0)

    class Late(MemoryBroker):
        def unwatch(self, channel):
            found.append(hub.subscribe("a"))
            found[-1].read(0)
            super().unwatch(channel)
            hub.publish("a", "untold")

    found = []
    hub = Hub(broker=Late())
    first = hub.subscribe("a")
    first.read(0)
    first.close()
    assert data(found[0].read(0)) == ["untold"]
    hub.publish("a", "told")
    assert data(found[0].read(0)) == ["told"]


def test_state(hub, caplog):
    """Down and back are said once each."""
    hub.sink.state(True, "as it was")
    hub.sink.state(False, "no route")
    hub.sink.state(False, "no route")
    assert hub.stats()["up"] is False
    hub.sink.state(True, "connected")
    journal().flush()
    assert [record.message for record in caplog.records] == [
        "the broker is down: no route",
        "the broker is back: connected",
    ]


# Size.

SIZES = st.lists(
    st.one_of(
        st.tuples(
            st.just("publish"), st.sampled_from("abcdef"), st.integers(0, 30_000)
        ),
        st.tuples(st.just("read"), st.integers(0, 3), st.just(0)),
        st.tuples(st.just("renew"), st.integers(0, 3), st.just(0)),
        st.tuples(st.just("resync"), st.sampled_from("abcdef"), st.just(0)),
        st.tuples(st.just("hole"), st.sampled_from("abcdef"), st.just(0)),
        st.tuples(st.just("age"), st.just(0), st.just(0)),
    ),
    max_size=80,
)


NAMES = [("a",), ("a", "b", "c"), ("#",), ("*", "f")]


@contextmanager
def tight_windows():
    """Let windows have little room, and be forgotten at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "IDLE", -1.0)
        patch.setattr(limits, "WINDOW", 5)
        patch.setattr(limits, "WINDOW_SIZE", 50_000)
        patch.setattr(limits, "BUDGET", 100_000)
        yield


@settings(max_examples=150)
@given(SIZES)
def test_windows_have_a_budget(steps):
    """Their sizes are known exactly, and bounded together; and nothing is lost."""
    with tight_windows():
        check_budget(steps)


def check_budget(steps):
    # Windows forget what is too old; the broker does not, or it were a gap.
    broker = Told(capacity=10_000, max_age=None)
    hub = Hub(broker=broker)
    subscriptions = [hub.subscribe(*names) for names in NAMES]
    found = [[] for _ in NAMES]
    published = []
    # In the end of what was not told, too.
    last = [("resync", name, 0) for name in "abcdef"]
    last += [("read", number, 0) for number in range(len(NAMES))]
    for action, what, size in steps + last:
        if action in ("publish", "hole"):
            hub.publish(what, f"{len(published)}:{what}:" + "x" * size)
            published.append(what)
            if action == "publish" and what in broker.watched:
                broker.tell(what, -1)
        elif action == "read":
            found[what] += read_all(subscriptions[what])
        elif action == "renew":
            subscriptions[what].close()
            subscriptions[what] = hub.subscribe(*NAMES[what])
            found[what] = []
        elif action == "resync":
            hub.sink.resync([what])
        else:
            for record in hub.windows.channels.values():
                for entry in record.log.read(record.log.first, 1):
                    entry.time -= 2e6
        sizes = [
            sum(entry.size for entry in record.log.read(record.log.first, 100))
            for record in hub.windows.channels.values()
        ]
        assert hub.stats()["bytes"] == hub.windows.budget.size == sum(sizes) <= 100_000
        assert all(size <= 50_000 + 30_000 * 2 for size in sizes)
        assert len(hub.windows.budget.filled) == len([size for size in sizes if size])
    for subscription, names, events in zip(subscriptions, NAMES, found, strict=True):
        numbers = {}
        for event in events:
            if not isinstance(event, Gap):
                number, channel, _ = event.data.split(":")
                numbers.setdefault(channel, []).append(int(number))
        for channel, mine in numbers.items():
            assert mine == sorted(set(mine))
            # By its name nothing is lost from the first that it got on.
            if channel in names:
                rest = range(mine[0], len(published))
                assert mine == [n for n in rest if published[n] == channel]
        subscription.close()
    hub.close()


def test_the_window_that_is_quiet_for_longest_makes_room(hub, monkeypatch):
    """Who is behind in it reads the broker; who is at its end does not notice."""
    monkeypatch.setattr(limits, "BUDGET", 9_000)
    quiet, behind, busy = (hub.subscribe(name) for name in ("quiet", "quiet", "busy"))
    for subscription in (quiet, behind, busy):
        subscription.read(0)
    hub.publish_many("quiet", ["x" * 100] * 10)
    assert len(quiet.read(0)) == 10
    hub.publish_many("busy", ["x" * 100] * 12)
    assert not len(hub.windows.channels["quiet"].log)
    assert len(hub.windows.channels["busy"].log) == 12
    assert quiet.read(0) == []
    hub.publish("quiet", "more")
    assert data(quiet.read(0)) == ["more"]
    assert data(read_all(behind)) == ["x" * 100] * 10 + ["more"]
    assert len(busy.read(0)) == 12


def test_a_window_holds_nothing_that_is_too_old():
    """What is older than ``max_age`` goes when its channel is touched."""
    hub = Hub(max_age=60)
    subscription = hub.subscribe("a")
    subscription.read(0)
    record = hub.windows.channels["a"]

    def pass_a_minute():
        for entry in record.log.read(record.log.first, 10):
            entry.time -= 61

    hub.publish("a", "old")
    pass_a_minute()
    hub.publish("a", "new")
    assert len(record.log) == 1
    pass_a_minute()
    hub.subscribe("a").read(0)
    assert len(record.log) == hub.windows.budget.size == 0
    hub.close()


def test_who_waits_is_woken_where_a_head_was_missed(hub):
    """By whoever has found it: nobody is told of what has been."""
    woken = []

    class Waiting:
        gevent_hub = None

        def wake(self):
            woken.append(1)

    record = hub.windows.watch("a")
    record.waiters[Waiting()] = None
    hub.windows.settle(record, "9-9", record.log.end)
    assert woken == [1]
    hub.windows.unwatch("a")


@pytest.mark.parametrize("name", ["a", "#"])
def test_a_subscription_may_come_while_others_are_looked_through(hub, name):
    """In the middle of any loop over them: a garbage collection may run code."""

    def come():
        newcomer = hub.subscribe(name)
        newcomer.begin()
        come_so_far.append(newcomer)

    come_so_far = []
    come()
    hub.windows.open[-1] = come
    for listeners in hub.windows.listeners.values():
        listeners[-1] = come
    assert hub.kick(lambda subscription: False) == 0
    assert hub.presence("a") == [None] * (len(come_so_far) - 1)
    hub.publish("a", "x")
    hub.sink.resync(None)
    hub.sink.resync(["a"])
    hub.sink.deny("b", "no rights")
    assert len(come_so_far) > 3
    del hub.windows.open[-1]


def test_a_window_is_doubted_after_it_was_left(hub):
    """Of a name whose subscribers were ended, the next one asks the broker again."""
    first = hub.subscribe("a")
    first.read(0)
    record = hub.windows.channels["a"]
    assert (record.is_watched, record.is_doubtful) == (True, False)
    hub.sink.deny("a", "no rights")
    assert first.reason == "denied"
    assert (record.is_watched, record.is_doubtful) == (False, True)
    second = hub.subscribe("a")
    hub.publish("a", "1")
    assert second.read(0) == []
    assert record.is_watched
    hub.publish("a", "2")
    assert [event.data for event in second.read(0)] == ["2"]


@pytest.mark.parametrize("is_watched", [True, False])
def test_an_idle_window_is_kept_for_its_time(is_watched, monkeypatch):
    """Just as long; of those that nobody's name watches, the broker is not told."""
    clock = SimpleNamespace(now=1000.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(windows, "time", clock)
    hub = Hub()
    if is_watched:
        hub.windows.watch("a")
        hub.windows.unwatch("a")
    else:
        listener = hub.subscribe("#")
        listener.begin()
        hub.publish("a", "x")
    record = hub.windows.channels["a"]
    clock.now += limits.IDLE
    hub.windows.watch("b")
    hub.windows.unwatch("b")
    assert "a" in hub.windows.channels
    clock.now += limits.IDLE / 4
    hub.windows.watch("b")
    hub.windows.unwatch("b")
    assert set(hub.windows.channels) == {"b"}
    assert hub.broker.watched.names - {PRESENCE} == {"b"}
    assert len(record.log) == hub.windows.budget.size == 0
    hub.close()
