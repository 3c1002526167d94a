"""Resets: where something is missing a `Gap` says so, and what follows it."""

import pytest

from syncstream import Event, Gap, Hub
from syncstream.channels import limits
from syncstream.testing.brokers.stored import HOSTILE
from tests.channels.readers import data, read_all, resume


def cut_anywhere(hub, found, expected, **options):
    """Cut a client off after each of these events; it must come to the same end."""
    for place, event in enumerate(found):
        got = data(found[: place + 1])
        again = resume(hub, event.id, **options)
        rest = [e.data for e in again if not isinstance(e, Gap)]
        got = [d for d in got if d in expected]
        assert got + rest == expected, place


PRESENTED = tuple(id for id in HOSTILE if id)  # an empty one is no id


@pytest.mark.parametrize("id", [*PRESENTED, "1", "ffffffff-00000000"])
def test_unknown_ids_are_a_reset(hub, id):
    """Whatever a client presents: a reset and all there is; cut there, none is lost."""
    hub.publish_many("a", "123")
    reset, *found = resume(hub, id)
    assert isinstance(reset, Gap)
    assert (reset.event, reset.json()) == (
        "reset",
        {"channel": "a", "reason": "unknown"},
    )
    assert data(found) == ["1", "2", "3"]
    cut_anywhere(hub, [reset, *found], ["1", "2", "3"])


@pytest.mark.parametrize("id", [*PRESENTED, "a" * 8, ",,,", "a.b,c.d", "." * 9999])
def test_unknown_ids_of_several_are_resets(hub, id):
    """Each channel of which nothing is known has its own."""
    hub.publish_many("a", "12")
    hub.publish_many("b", "3")
    found = resume(hub, id, "a", "b")
    assert data(e for e in found if not isinstance(e, Gap)) == ["1", "2", "3"]
    assert [e.json()["channel"] for e in found if isinstance(e, Gap)] == ["a", "b"]


def test_a_trimmed_id_is_a_reset():
    """All that is kept follows, and the reset's id is the one before it."""
    with_room = Hub(capacity=5)
    ids = with_room.publish_many("a", map(str, range(10)))
    reset, *found = resume(with_room, ids[3])
    assert reset.id == ids[4]
    assert data(found) == ["5", "6", "7", "8", "9"]
    assert data(resume(with_room, ids[4])) == ["5", "6", "7", "8", "9"]
    cut_anywhere(with_room, [reset, *found], ["5", "6", "7", "8", "9"])
    with_room.close()


def test_a_gap_of_an_empty_channel(hub):
    """There is nothing, and the reset's id says so: the next event is got once."""
    (reset,) = resume(hub, "1-aaaaaaaa")
    hub.publish("a", "1")
    assert data(resume(hub, reset.id)) == ["1"]


def test_an_earlier_life_is_foreign():
    """Ids of a hub that is gone are not taken for this one's."""
    old, new = Hub(), Hub()
    ids = old.publish_many("a", "12")
    new.publish_many("a", "123")
    for id in ids:
        reset, *found = resume(new, id)
        assert isinstance(reset, Gap)
        assert data(found) == ["1", "2", "3"]


def test_on_gap_live(hub):
    """Only what comes from now on; cut at the reset, nothing of that is lost."""
    hub.publish_many("a", "123")
    subscription = hub.subscribe("a", on_gap="live", after="f-f")
    (reset,) = subscription.read(0)
    hub.publish("a", "4")
    assert data(subscription.read(0)) == ["4"]
    assert data(resume(hub, reset.id)) == ["4"]


@pytest.mark.parametrize("channels", [("a",), ("a", "b"), ("b", "a")])
def test_on_gap_callable(hub, channels):
    """A snapshot, then what came since it was made; cut in it, it is made again."""
    hub.publish_many("a", "12")

    def snapshot():
        hub.publish("a", "meanwhile")
        return ["so far", Event({"more": 1}, event="state")]

    options = {"on_gap": lambda: snapshot(), "after": "f-f"}
    if len(channels) == 2:
        empty = hub.subscribe(*channels, after="start")
        composite = empty.read(0)[-1].id
        parts = composite.split(",")
        parts[channels.index("a")] = parts[channels.index("a")].split(".")[0] + ".f-f"
        options["after"] = ",".join(parts)
    subscription = hub.subscribe(*channels, **options)
    found = read_all(subscription)
    assert isinstance(found[0], Gap)
    assert data(found[1:]) == ["so far", '{"more":1}', "meanwhile"]
    assert all(type(event.data) is str for event in found)
    assert [event.event for event in found] == ["reset", None, "state", None]
    # After the last of it: what has come since. Before: all of it.
    assert data(resume(hub, found[2].id, *channels)) == ["meanwhile"]
    last = found[0].id if found[1].id is None else found[1].id
    again = resume(hub, last, *channels, on_gap=lambda: ["anew"])
    assert data(again[1:]) == ["anew"]


@pytest.mark.parametrize("event", [Event("x", id="1"), Event(event="x")])
def test_a_snapshot_has_no_ids(hub, event):
    """They are the broker's; and an event without data never arrives."""
    with pytest.raises(ValueError, match="on_gap must return events with"):
        hub.subscribe("a", after="f-f", on_gap=lambda: [event]).read(0)


def lagging(hub, count=20, **options):
    """Return a subscription that has fallen behind what is kept."""
    subscription = hub.subscribe("a", **options)
    subscription.read(0)
    hub.publish_many("a", map(str, range(count)))
    return subscription


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(limits, "WINDOW", 4)
    hub = Hub(capacity=5)
    yield hub
    hub.close()


def test_a_lag_is_told(small):
    """It is told, and goes on with what is kept."""
    subscription = lagging(small)
    reset, *found = subscription.read(0)
    assert reset.json() == {"channel": "a", "reason": "lagged"}
    assert data(found) == ["15", "16", "17", "18", "19"]
    assert data(resume(small, reset.id)) == data(found)


@pytest.mark.parametrize(("on_gap", "expected"), [("live", []), (list, []), (0, ["s"])])
def test_a_lag_is_a_gap_as_others(small, on_gap, expected):
    """What `on_gap` says follows it: the page does the same at each reset."""
    subscription = lagging(small, on_gap=on_gap or (lambda: ["s"]))
    reset, *found = read_all(subscription)
    assert reset.json()["reason"] == "lagged"
    assert data(found) == expected
    small.publish("a", "new")
    assert data(subscription.read(0)) == ["new"]
    assert data(resume(small, (found or [reset])[-1].id)) == ["new"]


def test_within_what_is_kept_nothing_is_lost(small):
    """Behind the window, the broker is asked."""
    assert data(read_all(lagging(small, 5))) == ["0", "1", "2", "3", "4"]


def test_a_lag_before_the_first_event_is_a_lag(small):
    """Who began now and was too slow from the beginning is told so."""
    subscription = small.subscribe("a")
    subscription.begin()
    small.publish_many("a", map(str, range(50)))
    assert subscription.read(0)[0].json()["reason"] == "lagged"


def test_a_lag_behind_a_patterns_channel_is_a_lag(small):
    """What it had no time to begin with was for it all the same."""
    subscription = small.subscribe("c:*")
    subscription.read(0)
    small.publish_many("c:1", map(str, range(20)))
    reset, *found = read_all(subscription)
    assert reset.json() == {"channel": "c:1", "reason": "lagged"}
    assert data(found) == ["15", "16", "17", "18", "19"]


def test_a_snapshot_that_raises_loses_nothing(hub):
    """The reset comes with the next read, and what was read beside it."""

    def snapshot():
        if is_bad:
            raise ZeroDivisionError
        return ["snapshot"]

    subscription = hub.subscribe("a", "c:*", on_gap=snapshot)
    subscription.read(0)
    hub.publish("a", "0")
    hub.publish("c:1", "1")
    hub.sink.resync(["c:2"])
    is_bad = True
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            subscription.read(0)
    is_bad = False
    reset, snap, *rest = read_all(subscription)
    assert isinstance(reset, Gap)
    assert snap.data == "snapshot"
    assert sorted(data(rest)) == ["0", "1"]


def test_nobody_makes_a_reset(hub):
    """Only a hub says that events are missing."""
    for call in (
        lambda: hub.publish("a", "x", event="reset"),
        lambda: hub.publish("a", Event("x", event="reset")),
        lambda: hub.publish_many("a", ["x", Event("x", event="reset")]),
    ):
        with pytest.raises(ValueError, match="reset"):
            call()
    assert hub.subscribe("a", after="start").read(0) == []
