"""What was removed from the middle of a channel: announced where it was, once."""

import itertools
import json
from contextlib import closing

import pytest

from syncstream import Gap, Hub
from syncstream.brokers.log import START
from syncstream.channels import limits
from syncstream.channels.ids import MAX_ID, composite, parts_of
from tests.channels.readers import read_all
from tests.support.removable import Removable, untold

COUNT = 5


class Holed(Removable):
    """One of which a test fails that reads on for ever."""

    def __init__(self, **options):
        super().__init__(**options)
        self.reads = 0

    def read(self, channel, after, limit=1000):
        self.reads += 1
        assert self.reads < 1000, "it reads on for ever"
        return super().read(channel, after, limit)


@pytest.fixture
def broker():
    return Holed()


@pytest.fixture
def hub(broker):
    hub = Hub(broker=broker)
    yield hub
    hub.close()


def shape(events):
    """Return the data of events, "reset" for a reset."""
    return ["reset" if isinstance(e, Gap) else e.data for e in events]


def walk(ids, removed, last):
    """Return what must come after an id, by the chain: pairs of data and id."""
    place = ids.index(last)
    found = []
    for number in range(place + 1, len(ids)):
        if ids[number] in removed:
            continue
        if ids[number - 1] != last:
            found.append(("reset", ids[number - 1]))
        last = ids[number]
        found.append((str(number), last))
    if last != ids[-1]:
        found.append(("reset", ids[-1]))
    return found


@pytest.mark.parametrize("limit", [1, 2, 500])
def test_every_hole_from_everywhere(limit, monkeypatch):
    """Whatever is removed, whoever resumes where: all is delivered or announced.

    Up to the hole, a reset with the id before what follows, and the rest; also where
    the page ends there. Cut off anywhere, a client comes to the same end.
    """
    monkeypatch.setattr(limits, "READ", limit)
    places = range(1, COUNT + 1)
    sets = [c for n in range(COUNT + 1) for c in itertools.combinations(places, n)]
    for holes in sets:
        broker = Holed()
        hub = Hub(broker=broker)
        ids = [hub.head("a"), *hub.publish_many("a", map(str, places))]
        removed = {ids[place] for place in holes}
        broker.remove("a", *removed)
        kept = [(str(n), ids[n]) for n in places if ids[n] not in removed]
        for after in ids:
            events = read_all(hub.subscribe("a", after=after))
            found = list(zip(shape(events), [e.id for e in events], strict=True))
            if after in removed and found != walk(ids, removed, after):
                # Nobody knows an id that is gone: all that is kept comes again.
                assert found[0][0] == "reset", holes
                assert [pair for pair in found if pair[0] != "reset"] == kept, holes
                assert after != ids[-1]
                # Unless what names it is in the first page.
                assert limit < 500 or ids[ids.index(after) + 1] in removed
                continue
            assert found == walk(ids, removed, after), (holes, after)
            assert hub.head("a") == ids[-1]
            broker.reads = 0
        hub.close()


@pytest.fixture
def holed(hub, broker):
    """A channel of six, the third and the fifth of which are gone; return the ids."""
    ids = hub.publish_many("a", "123456")
    broker.remove("a", ids[2], ids[4])
    return ids


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["2", "reset", "4", "reset", "6"]),
        ({"on_gap": "live"}, ["2", "reset"]),
        ({"on_gap": lambda: ["all"]}, ["2", "reset", "all"]),
        (
            {"conflate": lambda event: int(event.data) > 3},
            ["2", "reset", "reset", "6"],
        ),
        ({"tags": ["x"]}, ["2", "reset", "4", "reset", "6"]),
    ],
    ids=["replay", "live", "callable", "conflate", "tags"],
)
def test_each_way_to_go_on(hub, holed, options, expected):
    """It is as where the oldest are gone; then it is live."""
    subscription = hub.subscribe("a", after=holed[0], **options)
    assert shape(read_all(subscription)) == expected
    hub.publish("a", "7")
    assert shape(subscription.read(5)) == ["7"]


def test_who_is_behind_is_told(hub, broker, monkeypatch):
    """Live, and slower than its window: a hole is one there, too."""
    monkeypatch.setattr(limits, "WINDOW", 2)
    subscription = hub.subscribe("a")
    assert subscription.read(0) == []
    ids = hub.publish_many("a", "123456")
    broker.remove("a", ids[1])
    assert shape(read_all(subscription)) == ["1", "reset", "3", "4", "5", "6"]
    # The window is what was told, with nothing missing.
    assert shape(read_all(hub.subscribe("a", after=ids[4]))) == ["6"]


@pytest.mark.parametrize("limit", [1, 2, 500])
@pytest.mark.parametrize(
    ("removed", "expected"),
    [
        ([1], ["reset", "2", "3"]),
        ([1, 2], ["reset", "3"]),
        ([2], ["1", "reset", "3"]),
        ([3], ["1", "2", "reset"]),
        ([2, 3], ["1", "reset"]),
        ([1, 2, 3], ["reset"]),
    ],
)
def test_who_is_not_behind_has_not_lagged(
    hub, broker, monkeypatch, removed, expected, limit
):
    """Wherever the hole is, nobody was too slow, and no reader is told so."""
    monkeypatch.setattr(limits, "READ", limit)
    hub.publish("a", "0")
    subscription = hub.subscribe("a")
    assert subscription.read(0) == []
    ids = hub.publish_many("a", "123")
    broker.remove("a", *[ids[place - 1] for place in removed])
    hub.sink.resync(["a"])
    found = read_all(subscription)
    assert shape(found) == expected
    assert [e.json()["reason"] for e in found if isinstance(e, Gap)] == ["unknown"]
    hub.publish("a", "4")
    assert shape(subscription.read(0)) == ["4"]


def test_what_is_told_late_and_removed_is_not_given_out_after_its_reset(hub, broker):
    """The reset's id says that it is past."""
    hub.publish("a", "0")
    subscription = hub.subscribe("a")
    assert subscription.read(0) == []
    hub.sink.resync(["a"])
    hub.publish("a", "1")
    assert shape(subscription.read(0)) == ["1"]
    with untold(hub):
        (id,) = hub.publish_many("a", "2")
    (late,) = broker.read("a", START).entries[2:]
    broker.remove("a", id)
    hub.windows.channels["a"].is_doubtful = True

    def read(channel, after, limit=1000):
        page = Holed.read(broker, channel, after, limit)
        if after != START:  # told while the broker was asked
            hub.sink.deliver("a", late)
        return page

    broker.read = read
    found = read_all(subscription)
    assert [(e.event, e.id) for e in found] == [("reset", id)]
    del broker.read
    hub.publish("a", "3")
    assert shape(read_all(subscription)) == ["3"]


def test_nothing_follows_the_newest_though_it_was_removed(hub, broker):
    """Whoever has its id has missed nothing, whether here or coming back."""
    subscription = hub.subscribe("a")
    assert subscription.read(0) == []
    ids = hub.publish_many("a", "123")
    assert shape(subscription.read(0)) == ["1", "2", "3"]
    broker.remove("a", ids[2])
    hub.sink.resync(["a"])
    assert read_all(subscription) == []
    fresh = Hub(broker=broker)  # nobody there knows the channel yet
    assert read_all(fresh.subscribe("a", after=ids[2])) == []
    # Nor does a reset to it come twice.
    (reset,) = read_all(fresh.subscribe("a", after=ids[1]))
    assert (reset.event, reset.id) == ("reset", ids[2])


@pytest.mark.parametrize("after", ["start", 3])
def test_the_beginning(hub, broker, after):
    """What is counted from the newest, or is all that there is, has holes as well."""
    ids = hub.publish_many("a", "123456")
    broker.remove("a", ids[4])
    found = shape(read_all(hub.subscribe("a", after=after)))
    assert found[-3:] == ["4", "reset", "6"]
    assert found[0] in ("1", "3")


class Plain(Holed):
    newest = None  # it need not have one


@pytest.mark.parametrize("limit", [1, 2, 500])
@pytest.mark.parametrize("make", [Holed, Plain])
def test_the_newest_are_counted_across_holes(make, limit, monkeypatch):
    """So many of those that are kept, wherever a page ends."""
    monkeypatch.setattr(limits, "READ", limit)
    places = range(1, COUNT + 1)
    for kept in itertools.chain.from_iterable(
        itertools.combinations(places, n) for n in range(1, COUNT + 1)
    ):
        broker = make()
        hub = Hub(broker=broker)
        ids = [hub.head("a"), *hub.publish_many("a", map(str, places))]
        removed = {ids[place] for place in places if place not in kept}
        broker.remove("a", *removed)
        for count in (1, 2, COUNT):
            events = read_all(hub.subscribe("a", after=count))
            found = list(zip(shape(events), [e.id for e in events], strict=True))
            first = kept[-count:][0]
            assert found == walk(ids, removed, ids[first - 1]), (kept, count)
        hub.close()


def test_of_several_channels(hub, broker, holed):
    """Each has its own; the ids of a reset have the others' places."""
    hub.publish_many("b", "xy")
    oldest = broker.read("b", START).entries[0].prev
    after = composite("ab", [holed[0], oldest])
    found = read_all(hub.subscribe("a", "b", after=after))
    assert shape(found) == ["2", "reset", "4", "reset", "6", "x", "y"]
    for place, event in enumerate(found):
        again = shape(read_all(hub.subscribe("a", "b", after=event.id)))
        assert again == shape(found)[place + 1 :]


def test_as_lines(hub, holed):
    """NDJSON has the same."""
    frames = hub.subscribe("a", after=holed[0]).frames(False, json.dumps, None)
    lines = [json.loads(line) for line in next(frames).splitlines()]
    assert [line.get("event", line["data"]) for line in lines] == [
        "2",
        "reset",
        "4",
        "reset",
        "6",
    ]


def test_patterns(hub, broker):
    """A pattern's channels are read like others."""
    subscription = hub.subscribe("*")
    hub.publish("a", "0")
    assert shape(read_all(subscription)) == []
    hub.publish("a", "0")
    assert shape(read_all(subscription)) == ["0"]
    ids = hub.publish_many("a", "123")
    broker.remove("a", ids[1])
    hub.sink.resync(["a"])
    assert shape(read_all(subscription)) == ["1", "reset", "3"]


def test_what_is_lost_of_a_pattern_is_no_named_channels(hub):
    """Whose own events are all there."""
    with closing(hub.subscribe("a", "b:#")) as reader:
        assert reader.read(0) == []
        hub.publish("a", "1")
        hub.sink.resync(None)
        events = read_all(reader)
    assert sorted(shape(events)) == ["1", "reset"]


def test_an_id_holds_the_places_in_all_channels():
    """As many as there may be; what is behind them is not looked at."""
    names = tuple(f"c{n}" for n in range(limits.MAX_CHANNELS))
    places = dict.fromkeys(names, "f" * 40)
    id = composite(names, places.values())
    assert parts_of(id, names) == places
    assert parts_of("," * MAX_ID + id, names) == {}
