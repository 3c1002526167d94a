"""`Patterns`: the channels that match, and what they cost."""

import gc
import sys

import pytest

from syncstream import Gap
from syncstream.channels import limits
from syncstream.channels.cursor import Cursor
from syncstream.channels.patterns import Patterns
from tests.channels.readers import data, read_all, resume
from tests.support.removable import untold


@pytest.mark.parametrize(
    ("pattern", "heard"),
    [
        ("chat:*", ["chat:1"]),
        ("chat:#", ["chat", "chat:1", "chat:1:2"]),
        ("*", ["chat"]),
        ("#", ["chat", "chat:1", "chat:1:2", "logs:x"]),
    ],
)
def test_patterns(hub, pattern, heard):
    """By them come the channels that match, of which somebody has heard or not."""
    names = ["chat", "chat:1", "chat:1:2", "logs:x"]
    by_name = [hub.subscribe(name) for name in names[:2]]
    for subscription in by_name:
        subscription.read(0)
    hub.publish("chat:1", "before")
    subscription = hub.subscribe(pattern)
    assert subscription.read(0) == []
    for _ in range(2):
        for name in names:
            hub.publish(name, name)
        assert sorted(data(read_all(subscription))) == heard
    later = hub.subscribe(pattern, "other")
    assert later.read(0) == []
    hub.publish(heard[0], "last")
    assert data(subscription.read(0)) == data(later.read(0)) == ["last"]
    for one in (*by_name, subscription, later):
        one.close()
    assert not hub.windows.patterns
    assert not hub.windows.listeners
    assert not hub.broker.watched.patterns


def test_a_pattern_wakes(hub, place):
    """A channel that nobody has heard of wakes who waits for it."""

    def read():
        return data(hub.subscribe("chat:*").read())

    join = place.start(read)
    place.await_true(lambda: hub.stats()["subscribers"] == 1)
    place.pause(0.02)
    hub.publish("chat:1", "x")
    assert join() == ["x"]


def test_who_comes_back_to_a_pattern_is_told(hub):
    """No broker knows which channels there were meanwhile: a reset says so."""
    subscription = hub.subscribe("chat:*", "b")
    subscription.read(0)
    hub.publish("b", "0")
    hub.publish("chat:1", "1")
    last = read_all(subscription)[-1]
    hub.publish("chat:2", "2")
    hub.publish("b", "3")
    reset, *found = resume(hub, last.id, "chat:*", "b")
    assert reset.json() == {"channel": "chat:*", "reason": "unknown"}
    assert data(found) == ["3"]
    only = hub.subscribe("chat:*")
    only.read(0)
    hub.publish("chat:1", "4")
    (event,) = only.read(0)
    assert event.id
    (reset, *_) = resume(hub, event.id, "chat:*", on_gap=lambda: ["state"])
    assert isinstance(reset, Gap)


def test_a_broker_that_lost_word_is_a_reset_for_patterns(hub):
    """Channels may have come of which it never heard."""
    subscription = hub.subscribe("chat:*")
    subscription.read(0)
    hub.sink.resync(["other"])
    assert subscription.read(0) == []
    hub.sink.resync(["chat:7"])
    hub.sink.resync(None)
    (reset,) = subscription.read(0)
    assert reset.json() == {"channel": "chat:*", "reason": "unknown"}


def calls_of(function):
    """Return how many calls a function makes."""
    calls = 0

    def count(frame, event, arg):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


def test_a_pattern_costs_what_is_new(hub):
    """Neither an event nor a wait costs more for the channels that were seen."""
    subscription = hub.subscribe("#", "c:1")
    subscription.read(0)

    def once():
        hub.publish("c:1", "x")
        hub.publish("c:2", "x")
        assert len(subscription.read(0)) == 2
        subscription.read(0.0001)

    costs = []
    for count in (10, 1000):
        hub.publish_many("c:1", ["x"])
        for number in range(count):
            hub.publish(f"c:{number}", "x")
        read_all(subscription)
        costs.append(min(calls_of(once) for _ in range(3)))
    assert costs[1] < 2 * costs[0]  # a wait may take a turn more


def test_a_pattern_forgets_idle_channels(hub, monkeypatch):
    """Of what is over it keeps nothing; what comes later is got, once."""
    monkeypatch.setattr(limits, "IDLE", 0.0)
    gc.collect()
    before = sum(type(found) is Cursor for found in gc.get_objects())
    subscription = hub.subscribe("job:*")
    subscription.read(0)
    for number in range(1000):
        hub.publish(f"job:{number}", "x")
        assert data(subscription.read(0)) == ["x"]
    gc.collect()
    kept = sum(type(found) is Cursor for found in gc.get_objects())
    assert kept - before < 200
    hub.publish_many("job:0", ["y", "z"])
    assert data(read_all(subscription)) == ["y", "z"]


def test_who_does_not_read_notes_each_channel_once(hub):
    """Whoever comes and goes beside it, and whatever comes."""
    slow = hub.subscribe("c:*")
    slow.read(0)
    for _ in range(20):
        other = hub.subscribe("c:*")
        other.read(0)
        for number in range(10):
            hub.publish(f"c:{number}", "x")
        other.close()
    assert len(read_all(slow)) == 200


def test_a_channel_that_a_pattern_has_brought_has_one_turn(hub):
    """However often it has something new, and whoever waits is woken once."""
    patterns = Patterns(("c:*",))
    woken = [patterns.discover(f"c:{n}", "0") for _ in range(20) for n in range(10)]
    assert woken.count(True) == 1
    turns = patterns.turns(hub.windows)
    assert [cursor.name for cursor in turns] == [f"c:{n}" for n in range(10)]


def test_a_channel_that_may_have_lost_word_is_read(hub):
    """Of a channel that a pattern has brought, all; of others, a reset tells."""
    subscription = hub.subscribe("c:*")
    subscription.read(0)
    hub.publish("c:1", "0")
    subscription.read(0)
    late = hub.subscribe("c:*")
    late.read(0)
    with untold(hub):
        hub.publish("c:1", "untold")
    hub.sink.resync(["c:1"])
    assert data(subscription.read(0)) == ["untold"]
    (reset,) = late.read(0)
    assert reset.json() == {"channel": "c:*", "reason": "unknown"}


def test_a_pattern_outlives_a_window(hub, monkeypatch):
    """A window that nobody wants by its name is forgotten; its next event is got."""
    monkeypatch.setattr(limits, "IDLE", 0.0)
    subscription = hub.subscribe("chat:*")
    subscription.read(0)
    for number in range(5):
        hub.publish("chat:1", str(number))
        hub.publish(f"chat:x{number}", "x")
        assert sorted(data(read_all(subscription))) == [str(number), "x"]
    assert hub.stats()["channels"] < 5


def test_a_position_is_one_in_its_own_window(hub, monkeypatch):
    """What was read in a window that is forgotten says nothing of the next one."""
    subscription = hub.subscribe("chat:*")
    subscription.read(0)
    hub.publish_many("chat:1", "012")
    assert data(read_all(subscription)) == ["0", "1", "2"]
    monkeypatch.setattr(limits, "IDLE", 0.0)
    hub.publish("chat:2", "x")
    assert data(read_all(subscription)) == ["x"]
    assert "chat:1" not in hub.windows.channels
    hub.publish_many("chat:1", "3")
    assert data(read_all(subscription)) == ["3"]


@pytest.mark.parametrize("after", ["id", 1, "start"])
def test_a_pattern_that_went_leaves_no_stale_window(hub, after):
    """What came after a pattern's end is not withheld from who comes back."""
    pattern = hub.subscribe("user:*")
    pattern.read(0)
    seen = hub.publish("user:7", "one")
    assert data(pattern.read(0)) == ["one"]
    pattern.close()
    hub.publish("user:7", "two")
    subscription = hub.subscribe("user:7", after=seen if after == "id" else after)
    assert data(read_all(subscription))[-1:] == ["two"]
    hub.publish("user:7", "three")
    assert data(read_all(subscription)) == ["three"]


def test_a_window_between_two_patterns(hub):
    """A second pattern goes on with what is new, and a name with all."""
    first = hub.subscribe("user:*")
    first.read(0)
    seen = hub.publish("user:7", "one")
    first.close()
    hub.publish("user:7", "two")
    second = hub.subscribe("user:#")
    assert second.read(0) == []
    named = hub.subscribe("user:7", after=seen)
    assert data(read_all(named)) == ["two"]
    hub.publish("user:7", "three")
    assert data(read_all(second)) == ["three"]
    assert data(read_all(named)) == ["three"]
