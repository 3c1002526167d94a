"""`Subscription`: it waits, delivers, ends."""

import gc
import time

import pytest

from syncstream import Closed, Denied, Event, Hub, Subscription, Unavailable
from syncstream.brokers.log import Entry
from syncstream.brokers.memory import MemoryBroker
from syncstream.channels import limits
from syncstream.runtime.waiter import Waiter, wake_all
from tests.channels.readers import data, in_place
from tests.support.pairs import Greenlets, check_script
from tests.support.waits import TIMEOUT


def test_publish_and_subscribe(hub):
    """What is published after the first read is got, with its id."""
    subscription = hub.subscribe("a")
    hub.publish("a", "before")
    assert subscription.read(0) == []
    ids = [
        hub.publish("a", "text", event="greeting", retry=5),
        hub.publish("a", {"n": [1]}),
        hub.publish("a", Event("x\ny", event="e")),
        hub.publish("a", ""),
    ]
    events = subscription.read()
    assert [event.id for event in events] == ids
    assert data(events) == ["text", '{"n":[1]}', "x\ny", ""]
    assert (events[0].event, events[0].retry) == ("greeting", 5)
    assert events[1].json() == {"n": [1]}
    assert hub.publish_many("a", []) == []
    many = hub.publish_many("a", ["1", Event("2"), 3])
    assert [event.id for event in subscription.read()] == many
    assert hub.head("a") == many[-1]
    assert subscription.read(0) == []
    subscription.close()


def test_it_waits(hub, place):
    """A reader is woken by what comes, as a list, or one by one."""

    def read():
        subscription = hub.subscribe("a")
        return [next(subscription).data, *data(subscription.read())]

    join = place.start(read)
    place.await_true(lambda: hub.stats()["subscribers"] == 1)
    hub.publish("a", "1")
    place.pause(0.01)
    hub.publish("a", "2")
    assert join() == ["1", "2"]


def test_read_times_out(hub, place):
    """With nothing there it returns nothing, after its time, and leaves nothing."""

    def read():
        subscription = hub.subscribe("a", "b")
        times = []
        for _ in range(20):
            began = time.monotonic()
            assert subscription.read(0.01) == []
            times.append(time.monotonic() - began)
        record = hub.windows.channels["a"]
        assert len(record.waiters) <= 1
        subscription.close()
        assert not record.waiters
        return times

    times = in_place(place, read)
    assert sum(times) >= 0.2
    assert min(times) < 0.1  # a busy machine may be late, but not each time


def test_throttle(hub, place):
    """Deliveries have their distance, and nothing is lost by it."""

    def read():
        subscription = hub.subscribe("a", throttle=0.1)
        subscription.read(0)
        hub.publish("a", "1")
        began = time.monotonic()
        found = [data(subscription.read(TIMEOUT))]
        hub.publish_many("a", "23")
        early = subscription.read(0)
        found.append(data(early or subscription.read(TIMEOUT)))
        assert time.monotonic() - began >= 0.1
        subscription.close()
        return found

    assert in_place(place, read) == [["1"], ["2", "3"]]


def test_a_slow_reader_takes_no_memory(hub):
    """It is a position; what is kept for it is what is kept for all."""
    gc.collect()
    before = sum(type(found) is Entry for found in gc.get_objects())
    subscription = hub.subscribe("a")
    subscription.read(0)
    for _ in range(100):
        hub.publish_many("a", ["x" * 100] * 100)
    stats = hub.stats()
    assert stats["entries"] <= limits.WINDOW
    gc.collect()
    kept = sum(type(found) is Entry for found in gc.get_objects())
    assert kept - before <= 1000  # the broker's


def test_a_snapshot_that_comes_after_the_end_is_not_given_out(hub):
    """Kicked while `on_gap` ran: what it returns is of before that."""

    def on_gap():
        reader.close("kicked")
        return ["private"]

    reader = hub.subscribe("a", after="9-9", on_gap=on_gap)
    with pytest.raises(Closed, match="kicked"):
        reader.read(0)


def test_who_waited_and_left_is_not_held(hub, place):
    """A quiet channel holds nothing of those who came and went."""

    def come_and_go():
        for _ in range(50):
            subscription = hub.subscribe("quiet", "busy")
            subscription.read(0)
            hub.publish("busy", "x")
            subscription.read()
            subscription.read(0.001)
            subscription.close()

    in_place(place, come_and_go)
    assert not hub.windows.channels["quiet"].waiters
    assert hub.windows.channels["quiet"].subscriptions == 0
    assert hub.stats()["subscribers"] == 0


@pytest.mark.parametrize("channels", [("a",), ("a", "b"), ("a", "b:*")])
def test_an_exception_in_a_wait_ends_only_the_wait(hub, channels):
    """A time-out or an interrupt that comes from outside loses nothing."""
    gevent = pytest.importorskip("gevent")

    def read():
        subscription = hub.subscribe(*channels)
        subscription.read(0)
        for number in range(3):
            with pytest.raises(gevent.Timeout), gevent.Timeout(0.005):
                subscription.read()
            assert not hub.windows.channels["a"].waiters
            hub.publish("a", str(number))
            assert data(subscription.read(TIMEOUT)) == [str(number)]
        subscription.close()

    in_place(Greenlets(), read)


def test_close_wakes_all(place):
    """Whoever waits gets `Closed`, at once; whoever comes later, too."""
    # A busy machine may be late, but not each time.
    assert min(check_close(place) for _ in range(3)) < 1


def check_close(place):
    """Return how long a close takes to be noticed by all."""
    hub = Hub()
    early = hub.subscribe("a")

    def read(*names, **options):
        with pytest.raises(Closed) as caught:
            hub.subscribe(*names, **options).read()
        return caught.value.reason

    joins = [
        place.start(lambda: read("a")),
        place.start(lambda: read("a", "b")),
        place.start(lambda: read("c:*")),
        place.start(lambda: read("a", throttle=100)),
    ]
    place.await_true(lambda: hub.stats()["subscribers"] == 4)
    place.pause(0.02)
    began = time.monotonic()
    hub.close()
    assert [join() for join in joins] == ["closed"] * 4
    took = time.monotonic() - began
    assert hub.stats()["subscribers"] == 0
    for what, call in {
        "publish": lambda: hub.publish("a", "x"),
        "subscribe": lambda: hub.subscribe("a"),
        "head": lambda: hub.head("a"),
    }.items():
        with pytest.raises(
            ValueError, match=rf"{what}\(\) must not be called after close\(\)"
        ):
            call()
    with pytest.raises(Closed, match="closed"):
        early.read()
    hub.close()
    return took


def test_close_while_the_broker_is_asked():
    """Whoever reads then learns that it is closed, not what became of the broker."""

    class Gone(MemoryBroker):
        def read(self, channel, after, limit=1000):
            hub.close()
            raise Unavailable("the broker is closed")

    hub = Hub(broker=Gone())
    with pytest.raises(Closed) as caught:
        hub.subscribe("a").read(0)
    assert caught.value.reason == "closed"


def test_close_of_a_subscription(hub, place):
    """From elsewhere, before it is read, while it is, twice."""
    subscription = hub.subscribe("a")
    subscription.close()
    with pytest.raises(Closed):
        subscription.read()
    other = hub.subscribe("a")

    def read():
        with pytest.raises(Closed) as caught:
            next(other)
        return caught.value.reason

    join = place.start(read)
    place.await_true(lambda: hub.stats()["subscribers"] == 1)
    other.close("kicked")
    other.close()
    assert join() == "kicked"
    with pytest.raises(Closed):
        iter(other).__next__()
    assert hub.stats()["subscribers"] == 0


@pytest.mark.parametrize("how", ["next", "read"])
@pytest.mark.parametrize("reason", ["kicked", "denied", "closed"])
def test_an_end_is_the_end_of_what_was_read_before(hub, how, reason):
    """Who is kicked, denied or closed gets nothing more, not even what is there."""
    hub.publish_many("a", map(str, range(10)))
    is_allowed = True
    subscription = hub.subscribe(
        "a", after="start", authorize=(lambda s: is_allowed, 0.001)
    )
    assert next(subscription).data == "0"
    if reason == "denied":
        is_allowed = False
        time.sleep(0.002)
    elif reason == "kicked":
        hub.kick(lambda subscription: True)
    else:
        hub.close()
    for _ in range(2):
        with pytest.raises(Closed) as caught:
            next(subscription) if how == "next" else subscription.read(0)
        assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("reason", "error"), [(None, TypeError), (5, TypeError), ("", ValueError)]
)
def test_a_reason_is_a_word(hub, reason, error):
    """Whoever reads it is told it; nothing else ends a subscription."""
    subscription = hub.subscribe("a")
    with pytest.raises(error, match="reason"):
        subscription.close(reason)
    assert subscription.read(0) == []


def test_a_wake_before_the_wait_ends_it(place):
    """One that comes while the reader is elsewhere, asking a broker, say."""

    def wait():
        waiter = Waiter()
        wake_all([waiter])
        place.pause(0.01)
        began = time.monotonic()
        waiter.wait(4 * TIMEOUT)
        assert time.monotonic() - began < TIMEOUT
        began = time.monotonic()
        waiter.wait(0.05)
        return time.monotonic() - began

    assert in_place(place, wait) > 0.03


@pytest.mark.parametrize("part", ["channels", "subscribers", "both"])
def test_many_channels_are_small(part):
    """10,000 subscribers, 100,000 channels: below 300 MB; here a tenth of them.

    Python's development mode takes its share; ``tox -e soak`` runs all of them.
    """
    if part == "subscribers":
        pytest.importorskip("gevent")
    script = (
        "from tests.soak import full_size; import sys;"
        "print(getattr(full_size, sys.argv[1])(0.1))"
    )
    assert float(check_script(script, part)) < 40e6


def test_a_forked_child_goes_on_in_all_channels(hub):
    """After the last that its parent was given of each; before it has begun, too."""
    subscription = hub.subscribe("a", "b")
    assert subscription.read(0) == []
    hub.publish("a", "1")
    assert [event.data for event in subscription.read(0)] == ["1"]
    hub.publish("b", "2")
    for _ in range(2):  # a grandchild's parent may have read nothing
        subscription.forget()
    assert [event.data for event in subscription.read(0)] == ["2"]
    subscription.close()


def test_a_forked_child_gets_what_its_parent_has_read_ahead(hub):
    """Of several channels; after the last that was given out."""
    subscription = hub.subscribe("a", "b")
    subscription.begin()
    hub.publish_many("a", "123")
    hub.publish("b", "4")
    assert next(subscription).data == "1"
    subscription.forget()
    assert next(subscription).data == "2"
    assert [event.data for event in subscription.read(0)] == ["3", "4"]
    subscription.close()


@pytest.mark.parametrize("kind", [Unavailable, Denied])
@pytest.mark.parametrize(
    ("option", "how"),
    [
        ("authorize", Subscription.begin),
        ("authorize", next),
        ("conflate", next),
        ("on_gap", next),
    ],
)
def test_what_the_application_raises_is_not_the_brokers(hub, kind, option, how):
    """Its `Unavailable`, perhaps another hub's, is raised; it may be read again."""
    failures = [kind("not the broker")]

    def application(*args):
        if failures:
            raise failures.pop()
        return ["x"]

    hub.publish("a", "x")
    after = "gone" if option == "on_gap" else "start"
    function = application if option != "conflate" else lambda event: application()[0]
    subscription = hub.subscribe("a", after=after, **{option: function})
    with pytest.raises(kind, match="not the broker"):
        how(subscription)
    assert not subscription.is_closed
    assert data(subscription.read(0))[-1] == "x"
    subscription.close()


class Woken:
    """A client's waiter; see `waiter.Wakeable`."""

    gevent_hub = None

    def __init__(self):
        self.count = 0

    def wake(self):
        self.count += 1
        return True


def test_without_a_thread_an_end_is_told_before_what_waits(hub):
    """Nothing is read for a client that has been kicked, by no way."""
    subscription = hub.subscribe("a")
    subscription.begin()
    hub.publish("a", "x")
    subscription.end("kicked")
    assert subscription.poll() is None
    with pytest.raises(Closed) as caught:
        subscription.step()
    assert caught.value.reason == "kicked"
    assert subscription.reading.windows.open == {}


def test_without_a_thread_it_is_read_by_steps(hub):
    """Events, or a place among those who wait; of what is kept first."""
    subscription = hub.subscribe("a", after="start")
    ids = hub.publish_many("a", ["1", "2", "3"])
    wire = [b"id: %b\ndata: %d\n\n" % (id.encode(), n) for n, id in enumerate(ids, 1)]
    assert next(subscription).data == "1"
    waiter = Woken()
    subscription.detach(waiter)
    assert subscription.step() == (b"".join(wire[1:]), 2, None)
    assert subscription.kept is None
    assert subscription.step() == (b"", 0, None)
    assert waiter.count == 0
    hub.publish("a", "4")
    hub.publish("a", "5")
    assert waiter.count == 1  # once, until it is read
    chunk, count, is_registered = subscription.poll()
    assert (chunk.count(b"data: "), count, is_registered) == (2, 2, False)
    assert subscription.poll() == (b"", 0, True)
    subscription.detach(None)
    hub.publish("a", "6")
    assert waiter.count == 1
    subscription.close()


def test_without_a_thread_a_throttle_is_a_time_to_come_back(hub):
    """Until then nothing is read."""
    subscription = hub.subscribe("a", throttle=60.0)
    subscription.begin()
    subscription.detach(Woken())
    hub.publish("a", "1")
    began = time.monotonic()
    assert subscription.step()[1:] == (1, None)
    hub.publish("a", "2")
    chunk, count, when = subscription.step()
    assert (chunk, count) == (b"", 0)
    assert began + 60 <= when <= time.monotonic() + 60
    subscription.close()


def test_a_client_has_one_reader(hub):
    """Another response is refused, whatever it wants to do."""
    subscription = hub.subscribe("a")
    subscription.begin()
    subscription.detach(Woken())
    for call in (
        lambda: subscription.detach(Woken()),
        lambda: subscription.read(0),
        subscription.begin,
        subscription.own_waiter,
    ):
        with pytest.raises(RuntimeError, match="has one reader"):
            call()
    subscription.detach(None)
    assert subscription.read(0) == []
    subscription.close()
