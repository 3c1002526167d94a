"""Tests of what a broker tells: what comes, to whoever watches, and until it closes."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable
from functools import partial
from typing import Any

from ...channels.gap import Gap
from ...channels.hub import Hub
from ...channels.limits import WINDOW
from ...channels.subscription import Subscription
from ...errors import Closed
from ...runtime.clock import time
from .bench import (
    LIMIT,
    Bench,
    Told,
    Unreliable,
    descriptors,
    opened,
    read_all,
    require,
    run_together,
    start,
    wait_for,
)

__all__ = ["Telling"]


class Telling:
    """What is delivered, whatever the announcements, until the end."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def tells_what_comes_after_watch(self) -> None:
        with self._bench.broker() as broker:
            told = Told()
            broker.attach(told)
            broker.watch("chat:*")
            broker.watch("logs:#")
            names = ["chat", "chat:1", "chat:1:2", "chats:1", "logs", "logs:a:b", "log"]
            broker.publish([(name, b"x") for name in names])
            wait_for(lambda: len(told.entries) >= 3, "patterns must be watched")
            require(
                sorted(name for name, _ in told.entries)
                == ["chat:1", "logs", "logs:a:b"],
                "a pattern must match one level by *, and any by #",
            )

    def has_no_window_between_history_and_live(self) -> None:
        with self._bench.hub() as hub:
            count = self._bench.rounds
            stop: list[None] = []

            def publish() -> None:
                number = 0
                while not stop:
                    hub.publish("a", str(number))
                    number += 1
                    time.sleep(0 if number % 10 else 0.0005)

            def subscribe() -> None:
                try:
                    for _ in range(count):
                        with opened(hub.subscribe("a")) as subscription:
                            subscription.read(0)
                            subscription.read(LIMIT)
                            found = subscription.read(LIMIT)
                        if any(isinstance(event, Gap) for event in found):
                            continue  # delayed for too long, and told so
                        numbers = [int(event.data or "") for event in found]
                        expected = list(range(numbers[0], numbers[0] + len(numbers)))
                        require(
                            numbers == expected,
                            "no event may be lost while a subscriber arrives",
                        )
                finally:
                    stop.append(None)

            run_together(publish, subscribe)
            for number in range(count):
                # Between the page's head and the stream that opens after it.
                head = hub.head("b")
                publisher = start(partial(hub.publish, "b", str(number)))
                with opened(hub.subscribe("b", after=head)) as subscription:
                    found = [event.data for event in subscription.read(LIMIT)]
                    publisher()
                    found += [event.data for event in subscription.read(0)]
                require(
                    found == [str(number)],
                    "an event after head() must be received once, whenever it is"
                    f" published, got {found!r}",
                )

    def can_be_watched_and_unwatched(self) -> None:
        with self._bench.broker() as broker:
            told = Told()
            broker.attach(told)
            stop: list[None] = []
            others: list[None] = []  # events published since the last watch

            def publish() -> None:
                while not stop:
                    # Not too many: the awaited event must be told before it is trimmed.
                    if len(others) < self._bench.capacity // 2:
                        others.append(None)
                        broker.publish([("a", b"x")])
                    time.sleep(0.001)

            def churn() -> None:
                try:
                    for _ in range(min(self._bench.rounds, 1000)):
                        broker.watch("a")
                        others.clear()
                        (id,) = broker.publish([("a", b"mine")])
                        wait_for(
                            partial(told.ids.__contains__, id),
                            "events published after watch has returned must be told",
                        )
                        broker.unwatch("a")
                        told.entries.clear()
                finally:
                    stop.append(None)

            run_together(publish, churn)
            broker.unwatch("never watched")

    def has_many_channels(self) -> None:
        with self._bench.hub() as hub:
            names = [
                f"c:{number}" for number in range(min(10_000, 10 * self._bench.rounds))
            ]
            # The process's time: the load of the machine must not count.
            began = time.process_time()
            subscriptions = [hub.subscribe(name) for name in names]
            for subscription in subscriptions:
                subscription.read(0)
            for name in names:
                hub.publish(name, name)
            hub.sink.resync(None)
            for name, subscription in zip(names, subscriptions, strict=True):
                found = [event.data for event in subscription.read(LIMIT)]
                require(
                    found == [name],
                    f"each channel must have its own events, got {found!r}",
                )
            seconds = time.process_time() - began
            require(
                seconds < LIMIT,
                f"{len(names)} channels must be subscribed to, published to and read"
                f" within {LIMIT} s of processor time, took {seconds:.1f}",
            )
            for subscription in subscriptions:
                subscription.close()

    def serves_slow_readers(self) -> None:
        with self._bench.tapped() as (hub, tap), opened(hub.subscribe("a")) as slow:
            slow.read(0)
            count = self._bench.capacity
            tap.wait_for(hub.publish_many("a", map(str, range(count))))
            found = read_all(slow)
            require(
                [event.data for event in found] == [*map(str, range(count))],
                "a subscriber behind the window, but not behind the kept events, must"
                " get all",
            )
            more = max(count, WINDOW) + 1
            tap.wait_for(hub.publish_many("a", map(str, range(more))))
            reset, *found = read_all(slow)
            require(
                isinstance(reset, Gap) and reset.json()["reason"] == "lagged",
                "a subscriber that falls behind the kept events must be told",
            )
            require(
                [event.data for event in found]
                == [*map(str, range(more - count, more))],
                "after a reset all kept events must follow",
            )

    # Unreliable announcements, closing, and the whole.

    def needs_no_reliable_word(self) -> None:
        broker = self._bench.make()
        hub = Hub(broker=broker)
        broker.attach(Unreliable(hub.sink, self._bench.choose))
        try:
            count = min(self._bench.capacity, 300)
            subscriptions = [hub.subscribe("a") for _ in range(3)]
            found: list[list[Any]] = [[] for _ in subscriptions]
            for subscription in subscriptions:
                subscription.read(0)
            for number in range(count):
                hub.publish("a", str(number))
                for mine, subscription in zip(found, subscriptions, strict=True):
                    if self._bench.choose.random() < 0.3:
                        mine += [event.data for event in subscription.read(0)]
            hub.sink.resync(None)
            for mine, subscription in zip(found, subscriptions, strict=True):
                mine += [event.data for event in read_all(subscription)]
                require(
                    mine == [*map(str, range(count))],
                    "no event may be lost, even if it is told late, twice or never",
                )
        finally:
            hub.close()

    def closes(self) -> None:
        before, opened_before = set(threading.enumerate()), descriptors()
        hub = Hub(broker=self._bench.make())
        subscriptions = [hub.subscribe("a") for _ in range(4)]
        ended: list[None] = []

        def read(subscription: Subscription) -> None:
            try:
                subscription.read()
            except Closed:
                ended.append(None)

        joins = [start(partial(read, s)) for s in subscriptions]
        wait_for(lambda: hub.stats()["subscribers"] == 4, "subscribers must be counted")
        hub.close()
        hub.close()
        for join in joins:
            join()
        require(len(ended) == 4, "close() must wake all subscribers")
        left = set(threading.enumerate()) - before
        require(not left, f"close() must leave no thread, got {left!r}")
        wait_for(
            lambda: descriptors() <= opened_before, "close() must leave no descriptor"
        )

    def accounts_for_all(self) -> None:
        """After random publishes, drops and resumes each event or a reset has come."""
        with self._bench.tapped() as (hub, tap):
            published: list[str] = []
            last: list[str | None] = []
            clients = [Client(hub) for _ in range(5)]
            for client in clients:
                client.come()
            for _ in range(self._bench.rounds):
                luck = self._bench.choose.random()
                client = self._bench.choose.choice(clients)
                if luck < 0.4:
                    many = luck < 0.01
                    count = (
                        self._bench.capacity + 5
                        if many
                        else self._bench.choose.randrange(1, 4)
                    )
                    new = [str(len(published) + number) for number in range(count)]
                    last = hub.publish_many("a", new)
                    published += new
                elif luck < 0.7:
                    client.read()
                elif luck < 0.8:
                    hub.sink.resync(None)
                else:
                    client.leave(self._bench.choose)
                    client.come()
            tap.wait_for(last)
            for client in clients:
                client.read()
                client.account(published)
                client.leave(self._bench.choose)


class Client:
    """Reads, loses its connection anywhere, and resumes after its last id."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self.got: list[Any] = []
        self._id = hub.head("a")
        self._subscription = hub.subscribe("a")

    def come(self) -> None:
        self._subscription = self._hub.subscribe("a", after=self._id)

    def read(self) -> None:
        self._take(read_all(self._subscription))

    def leave(self, choose: random.Random) -> None:
        there = self._subscription.read(0)
        self._take(there[: choose.randrange(len(there) + 1)])
        self._subscription.close()

    def _take(self, events: Iterable[Any]) -> None:
        for event in events:
            self._id = event.id or self._id
            self.got.append(None if isinstance(event, Gap) else int(event.data))

    def account(self, published: list[str]) -> None:
        expected = 0
        may_skip = False
        for number in self.got:
            if number is None:
                may_skip = True
                continue
            require(
                number == expected or (may_skip and number > expected),
                f"each event must be received once, in order, or a reset before it:"
                f" expected {expected}, got {number}",
            )
            expected, may_skip = number + 1, False
        require(expected == len(published), "the newest events must be received")
