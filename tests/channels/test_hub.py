"""`Hub`: its arguments, its counts, its end."""

import gc
import json
import logging
import sys
import weakref

import pytest

from syncstream import Event, Hub, PayloadTooLarge
from syncstream.brokers.memory import MemoryBroker
from syncstream.channels import limits
from tests.channels.readers import Line, data
from tests.support.pairs import serve, stream_of


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"capacity": 0}, ValueError),
        ({"capacity": 1.5}, TypeError),
        ({"capacity": True}, TypeError),
        ({"capacity": 10**10}, ValueError),
        ({"max_payload": 1 << 40}, ValueError),
        ({"max_age": float("inf")}, ValueError),
        ({"max_age": 1e300}, ValueError),
        ({"url": "memory:?x=1"}, ValueError),
        ({"url": "memory:name"}, ValueError),
        ({"url": "local:x?y=1"}, ValueError),
        ({"max_payload": 0}, ValueError),
        ({"max_age": 0}, ValueError),
        ({"max_age": "1"}, TypeError),
        ({"max_age": float("nan")}, ValueError),
        ({"url": "nowhere:"}, ValueError),
        ({"url": 5}, TypeError),
        ({"broker": 5}, TypeError),
        ({"broker": "memory:"}, TypeError),
    ],
    ids=str,
)
def test_wrong_arguments_of_a_hub(options, error):
    """Each is refused, by its name."""
    with pytest.raises(error, match=next(iter(options))):
        Hub(**options)


@pytest.mark.parametrize(
    "options", [{"url": "memory:"}, {"capacity": 1000}, {"max_age": None}], ids=str
)
def test_what_a_broker_has_is_not_given_beside_it(options):
    """It would be ignored."""
    with pytest.raises(ValueError, match="with broker"):
        Hub(broker=MemoryBroker(), **options)


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"after": 0}, ValueError, "after"),
        ({"after": True}, TypeError, "after"),
        ({"after": None}, TypeError, "after"),
        ({"on_gap": "x"}, ValueError, "on_gap"),
        ({"conflate": "symbol"}, TypeError, "conflate"),
        ({"conflate": True}, TypeError, "conflate"),
        ({"throttle": 0}, ValueError, "throttle"),
        ({"throttle": float("inf")}, ValueError, "throttle"),
        ({"throttle": True}, TypeError, "throttle"),
        ({"throttle": "1"}, TypeError, "throttle"),
        ({"authorize": False}, TypeError, "authorize"),
        ({"authorize": (bool,)}, TypeError, "authorize"),
        ({"authorize": (5, bool)}, TypeError, "authorize"),
        ({"authorize": (None, 5)}, TypeError, "authorize"),
        ({"authorize": (bool, None)}, TypeError, "authorize"),
        ({"authorize": (bool, True)}, TypeError, "authorize"),
        ({"authorize": (bool, -1)}, ValueError, "authorize"),
        ({"authorize": (bool, float("nan"))}, ValueError, "authorize"),
        ({"tags": "x"}, TypeError, "tags"),
        ({"tags": [1]}, TypeError, "tags"),
    ],
    ids=str,
)
def test_wrong_arguments_of_subscribe(hub, options, error, name):
    """Each is refused where it is given, by its name."""
    with pytest.raises(error, match=name):
        hub.subscribe("a", **options)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("", ValueError),
        ("a b", ValueError),
        ("a\n", ValueError),
        ("a\0", ValueError),
        ("a\ud800", ValueError),
        ("x" * 201, ValueError),
        ("a*", ValueError),
        (7, TypeError),
        (b"a", TypeError),
    ],
    ids=repr,
)
def test_wrong_channels(hub, name, error):
    """A name is one, wherever it is given."""
    for call in (lambda name: hub.publish(name, "x"), hub.subscribe, hub.head):
        with pytest.raises(error, match="channel"):
            call(name)


@pytest.mark.parametrize(
    "level", ["*", "#", "a:b", "b:#", "", " ", "a b", "a\n", "a*", "\0", "x" * 200]
)
def test_a_name_from_outside_is_one_level(hub, level):
    """It is no pattern, and nobody else's channel."""
    with pytest.raises(ValueError, match="channel"):
        hub.channel("user", level)


@pytest.mark.parametrize("level", [None, True, b"x", 1.5])
def test_a_level_is_text_or_a_number(hub, level):
    """Nothing else is turned into a name in silence."""
    with pytest.raises(TypeError, match="level"):
        hub.channel("user", level)


def test_names_of_levels(hub):
    """What is left is a name."""
    assert hub.channel("user", "ann", 7) == "user:ann:7"
    assert Hub.channel("Ünïcode.@-_%") == "Ünïcode.@-_%"
    with pytest.raises(ValueError, match="channel"):
        hub.channel()


def test_more_wrong_arguments(hub):
    """Patterns are for subscriptions from now on; ids are the broker's."""
    for name in ("a:*", "#", "*:a:*"):
        with pytest.raises(ValueError, match="channel"):
            hub.publish(name, "x")
    with pytest.raises(ValueError, match="channel"):
        hub.subscribe("a*:*")
    with pytest.raises(ValueError, match="at least one"):
        hub.subscribe()
    with pytest.raises(ValueError, match="32 at most"):
        hub.subscribe(*map(str, range(33)))
    with pytest.raises(ValueError, match="after must be 'now'"):
        hub.subscribe("a", "b:*", after="start")
    with pytest.raises(ValueError, match="id must be None, as the broker creates ids"):
        hub.publish("a", Event("x", id="1"))
    with pytest.raises(ValueError, match="data must be given"):
        hub.publish("a", Event(event="x"))
    with pytest.raises(ValueError, match="must be None with an Event"):
        hub.publish("a", Event("x"), event="e")
    with pytest.raises(TypeError, match="only"):
        hub.publish("a", "x", only="admin")
    assert hub.head("a").startswith("0-")


def test_too_large():
    """Refused, with all that came with it."""
    hub = Hub(max_payload=100)
    with pytest.raises(PayloadTooLarge, match="100 bytes at most"):
        hub.publish_many("a", ["x", "x" * 100])
    assert hub.head("a").startswith("0-")
    hub.close()


def test_dumps():
    """What is not text is encoded by it."""
    hub = Hub(dumps=lambda value: b"<%d>" % value)
    hub.publish("a", 7)
    hub.publish("a", Event(8, event="e"))
    assert data(hub.subscribe("a", after="start").read(0)) == ["<7>", "<8>"]
    hub.close()


@pytest.mark.usefixtures("own_record")
def test_many_processes_are_warned_of(hub, caplog):
    """A hub of one process, in a server that has several."""

    def subscribe():
        with caplog.at_level(logging.WARNING):
            serve(stream_of(iter([hub.subscribe("b").read(0)]), Line()))

    def source():
        assert hub.subscribe("a").read(0) == []
        yield "x"

    for _ in range(2):
        serve(stream_of(source(), Line(is_multiprocess=True)))
    warnings = [r.message for r in caplog.records if "one process" in r.message]
    assert len(warnings) == 1


def test_stats(hub):
    """Counts, as the docstring has them."""
    assert json.loads(json.dumps(hub.stats())) == {
        "subscribers": 0,
        "channels": 0,
        "entries": 0,
        "bytes": 0,
        "published": 0,
        "delivered": 0,
        "up": True,
    }
    subscription = hub.subscribe("a")
    subscription.read(0)
    hub.publish_many("a", "123")
    subscription.read(0)
    stats = hub.stats()
    assert (stats["subscribers"], stats["channels"], stats["entries"]) == (1, 1, 3)
    assert (stats["published"], stats["delivered"]) == (3, 3)
    assert stats["bytes"] > 0


def test_a_hub_that_is_dropped_is_freed():
    """One made for each call; at once, for nothing refers to it in a circle."""
    gc.disable()
    try:
        hub = Hub()
        subscription = hub.subscribe("a", who="ann", announce=True)
        subscription.read(0)
        found = weakref.ref(hub.windows), weakref.ref(hub.broker)
        del hub
        assert found[0]() is not None  # somebody reads it
        del subscription
        assert [reference() for reference in found] == [None, None]
    finally:
        gc.enable()


def test_hubs_by_the_dozen_are_warned_of(caplog, tmp_path):
    url = f"local:{tmp_path}"
    few = [Hub(url) for _ in range(limits.MANY)]
    assert not caplog.records
    many = [Hub(url) for _ in range(3)]
    (record,) = caplog.records
    assert "hubs of one local: are in use, each with" in record.message
    assert str(tmp_path) not in record.message
    assert all(hub.close() is None for hub in few + many)


def test_a_hub_may_be_made_while_hubs_are_counted():
    """By another thread, at any moment of the search."""

    def trace(frame, event, arg):
        is_theirs = "weakref" in frame.f_code.co_filename and event == "return"
        if is_theirs and len(made) < limits.MANY:  # as at each item of an iteration
            made.append(Hub())
        return trace

    made = [Hub(), Hub()]
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        made.append(Hub())
    finally:
        sys.settrace(before)
    assert len(made) > 3
    for hub in made:
        hub.close()


def test_publishers_lose_no_count():
    """One that publishes while another one's events are counted."""

    class Ids(list):
        def __len__(self):
            if others:
                hub.publish("b", others.pop())
            return super().__len__()

    class Counted(MemoryBroker):
        def publish(self, items, *, connection=None):
            return Ids(super().publish(items, connection=connection))

    others = []
    hub = Hub(broker=Counted())
    others.append("x")
    hub.publish_many("a", ["1", "2"])
    assert hub.stats()["published"] == 3
    hub.close()


def test_a_close_that_fails_for_one_closes_the_others_and_the_broker():
    """Then it is raised."""

    class Broken(MemoryBroker):
        scope = "machine"

        def unwatch(self, channel):
            raise OSError("no route")

        def close(self):
            closed.append(self)
            super().close()

    closed = []
    hub = Hub(broker=Broken())
    subscriptions = [hub.subscribe(name, who="ann") for name in ("a", "a:*", "b:*")]
    for subscription in subscriptions:
        subscription.begin()
    with pytest.raises(OSError, match="no route"):
        hub.close()
    assert closed == [hub.broker]
    assert all(subscription.is_closed for subscription in subscriptions)
