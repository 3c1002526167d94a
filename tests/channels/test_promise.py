"""Nothing lost, nothing twice, in order; or a reset, which says so."""

import random
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from syncstream import Gap, Hub
from tests.channels.readers import read_all
from tests.support.removable import Removable
from tests.support.waits import TIMEOUT


def test_races_lose_nothing(place):
    """Subscribe and publish at once, 10,000 times: each is got once, in order.

    A machine on which a thread waits long for its turn does what it can in 30 s.
    """
    hub = Hub(capacity=1_000_000)
    start = hub.head("a")
    stop = []
    until = time.monotonic() + 2 * TIMEOUT

    def publish():
        number = 0
        while not stop:
            hub.publish("a", str(number))
            number += 1
            if number % 5 == 0:
                place.pause(0)

    def subscribe():
        mine = random.Random(1)
        expected, id, rounds = 0, start, 0
        try:
            while rounds < 2500 and (rounds < 10 or time.monotonic() < until):
                rounds += 1
                subscription = hub.subscribe("a", after=id)
                events = subscription.read(TIMEOUT)
                assert events
                if mine.random() < 0.5:
                    events += subscription.read(0)
                subscription.close()
                place.pause(0)
                for event in events[: mine.randrange(1, len(events) + 1)]:
                    assert event.data == str(expected), event
                    expected, id = expected + 1, event.id
        finally:
            done.append((rounds, expected))

    done = []
    publisher = place.start(publish)
    joins = [place.start(subscribe) for _ in range(4)]
    try:
        for join in joins:
            while len(done) < 4 and time.monotonic() < until + TIMEOUT:
                place.pause(0.01)
            join()
    finally:
        stop.append(True)
        publisher()
    assert all(expected >= rounds for rounds, expected in done)
    hub.close()


class Client:
    """A client of one channel or several, that is cut off anywhere and comes back."""

    def __init__(self, hub, channels, on_gap):
        self.hub = hub
        self.channels = channels
        self.on_gap = on_gap
        self.subscription = hub.subscribe(*channels, after="start")
        self.subscription.read(0)
        self.id = None
        self.got = {channel: [] for channel in channels}

    def take(self, events):
        for event in events:
            self.id = event.id or self.id
            if isinstance(event, Gap):
                self.got[event.json()["channel"]].append(None)
            else:
                channel, number = event.json()
                self.got[channel].append(number)

    def read(self):
        self.take(self.subscription.read(0))

    def cut(self, share):
        events = self.subscription.read(0)
        self.take(events[: int(len(events) * share)])
        self.subscription.close()
        if self.id is None:  # it begins anew
            for numbers in self.got.values():
                numbers.append(None)
        self.subscription = self.hub.subscribe(
            *self.channels, after=self.id or "start", on_gap=self.on_gap
        )

    def check(self, published, removed):
        self.take(read_all(self.subscription))
        for channel in self.channels:
            expected, is_told = 0, False
            for number in self.got[channel]:
                if number is None:
                    is_told = True
                    continue
                # After an id that was removed all that is kept may come again.
                assert number == expected or (
                    is_told and (number > expected or channel in removed)
                )
                expected, is_told = number + 1, False
            assert is_told or expected == published[channel]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), st.sampled_from("ab"), st.integers(1, 12)),
        st.tuples(st.just("read"), st.integers(0, 2), st.just(0)),
        st.tuples(st.just("cut"), st.integers(0, 2), st.floats(0, 1)),
        st.tuples(st.just("trim"), st.sampled_from("ab"), st.integers(0, 8)),
        st.tuples(st.just("remove"), st.sampled_from("ab"), st.integers(0, 8)),
        st.tuples(st.just("resync"), st.just(0), st.just(0)),
        st.tuples(st.just("forge"), st.integers(0, 2), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=150)
@given(STEPS)
def test_all_is_delivered_or_announced(steps):
    """Whatever happens in whatever order: delivered once, in order, or announced."""
    broker = Removable(capacity=20)
    hub = Hub(broker=broker)
    published = {"a": 0, "b": 0}
    removed = set()
    clients = [
        Client(hub, ("a",), "replay"),
        Client(hub, ("a", "b"), "replay"),
        Client(hub, ("b", "a"), "replay"),
    ]
    for action, what, value in steps:
        if action == "publish":
            start = published[what]
            hub.publish_many(what, [[what, start + n] for n in range(value)])
            published[what] += value
        elif action == "read":
            clients[what].read()
        elif action == "cut":
            clients[what].cut(value)
        elif action == "trim":
            broker.trim(what, value)
        elif action == "remove":
            kept = broker.kept(what)
            if kept:
                broker.remove(what, kept[max(0, len(kept) - 1 - value)].id)
                removed.add(what)
        elif action == "resync":
            hub.sink.resync(None)
        else:
            clients[what].cut(1.0)
            clients[what].id = "5-00000000"
            # What it has got, it gets again, after a reset.
            clients[what].got = {channel: [] for channel in clients[what].channels}
            clients[what].cut(0.0)
    for client in clients:
        client.check(published, removed)
    hub.close()
