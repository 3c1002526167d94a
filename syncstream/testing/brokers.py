"""`check_broker`: tests whether a broker keeps its contract.

It tests a broker of your own with threads, or with greenlets in a process that gevent
has patched. It tests one process only: write your own tests for several processes that
share an engine, and for failures of the engine.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from ..brokers.contract import Broker, Sink
from ..brokers.log import START, Entry
from ..channels.gap import Gap
from ..channels.hub import Hub
from ..channels.limits import WINDOW
from ..channels.subscription import Subscription
from ..errors import Closed
from ..runtime.clock import time

__all__ = ["check_broker"]

LIMIT = 15.0  # seconds to wait for each condition, on a slow machine, too

HOSTILE = (
    *("", "-", "x", "0-0", "1-", "-1", "1-2-3", "ffffffff-ffffffff"),
    *("1-deadbeef", "9" * 40 + "-0", "f" * 10_000, "1\x00", "\x00", "é", "1-2\n"),
    *("'; DROP TABLE events; --", "*", "$", "+", "18446744073709551616-0"),
)


LIKE: tuple[Callable[[str], str], ...] = (
    *("{}0".format, "{} ".format, " {}".format, "+{}".format),
    *("0x{}".format, "{}\n".format, "{}-0".format, "0_{}".format, str.upper),
    lambda id: id.replace("-", "- "),
    lambda id: id.replace("-", "-+"),
    lambda id: id.replace("-", "-0x"),
    lambda id: id.partition("-")[0],
)


def check_broker(
    make: Callable[[], Broker],
    *,
    capacity: int = 1000,
    max_age: float | None = None,
    rounds: int = 1000,
    seed: int = 0,
    remove: Callable[[Broker, str, str], object] | None = None,
) -> None:
    """Check that a broker keeps the contract of `syncstream.brokers.Broker`.

    It blocks for some seconds.

    Args:
        make: Returns a new broker without events. Each is closed.
        capacity: The number of events that these brokers keep of each channel, exactly;
            100 or more.
        max_age: The seconds for which these brokers keep events; then this is the only
            test, so call it once more, with brokers of a short ``max_age``. ``None``
            runs all other tests.
        rounds: The number of repetitions of each race; 10,000 to be sure.
        seed: The seed of the random choices.
        remove: Called with a broker, a channel and an id: removes that event from the
            broker's store, as an operator would (``DELETE``, ``XDEL``). ``None`` skips
            that test.

    Raises:
        AssertionError: The broker violates the contract; the message names the rule.
        ValueError: ``capacity`` is less than 100.
    """
    if capacity < 100:
        raise ValueError(f"capacity must be 100 or more, got {capacity!r}")
    suite = _Suite(make, capacity, rounds, random.Random(seed))
    if max_age is not None:
        suite.forgets_by_age(max_age)
        return
    suite.stores_bytes_as_they_are()
    suite.has_one_order()
    suite.resumes_everywhere()
    suite.trims_by_capacity()
    suite.finds_the_newest()
    suite.reads_without_storing()
    if remove is not None:
        suite.shows_what_was_removed(remove)
    suite.takes_any_id()
    suite.does_not_know_ids_of_others()
    suite.tells_what_comes_after_watch()
    suite.has_no_window_between_history_and_live()
    suite.can_be_watched_and_unwatched()
    suite.has_many_channels()
    suite.serves_slow_readers()
    suite.needs_no_reliable_word()
    suite.closes()
    suite.accounts_for_all()


def _require(holds: object, sentence: str) -> None:
    if not holds:
        raise AssertionError(sentence)


class _Told:
    """A sink that records its calls."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, Entry]] = []
        self.ids: set[str | None] = set()
        self.is_up = True

    def deliver(self, channel: str, entry: Entry) -> None:
        self.entries.append((channel, entry))
        self.ids.add(entry.id)

    def resync(self, channels: Iterable[str] | None) -> None:
        """Ignore it: this sink has read nothing."""

    def state(self, is_up: bool, reason: str) -> None:
        self.is_up = is_up

    def deny(self, name: str, reason: str) -> None:
        raise AssertionError(f"{name!r} must not be refused: {reason}")


class _Tap:
    """A sink between a broker and a hub that records the delivered ids.

    A broker may deliver an event a moment after `publish` has returned; only then it is
    in the hub's windows.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._ids: set[str | None] = set()

    def deliver(self, channel: str, entry: Entry) -> None:
        self._sink.deliver(channel, entry)
        self._ids.add(entry.id)

    def resync(self, channels: Iterable[str] | None) -> None:
        self._sink.resync(channels)

    def state(self, is_up: bool, reason: str) -> None:
        self._sink.state(is_up, reason)

    def deny(self, name: str, reason: str) -> None:
        self._sink.deny(name, reason)

    def wait_for(self, ids: Sequence[str | None]) -> None:
        """Wait until the last of these ids is delivered; its channel must be watched.

        The events before it may have been trimmed by then.
        """
        _wait_for(
            lambda: not ids or ids[-1] in self._ids, "what is published must be told"
        )


class _Unreliable:
    """A sink between a broker and a hub that drops, duplicates and reorders entries."""

    def __init__(self, sink: Sink, choose: random.Random) -> None:
        self._sink = sink
        self._choose = choose
        self._late: list[tuple[str, Entry]] = []

    def deliver(self, channel: str, entry: Entry) -> None:
        luck = self._choose.random()
        if luck < 0.2:
            return
        if luck < 0.4:
            self._late.append((channel, entry))
            return
        for _ in range(2 if luck < 0.5 else 1):
            self._sink.deliver(channel, entry)
        if luck > 0.8:
            self._choose.shuffle(self._late)
            late, self._late = self._late, []
            for told in late:
                self._sink.deliver(*told)

    def resync(self, channels: Iterable[str] | None) -> None:
        self._sink.resync(channels)

    def state(self, is_up: bool, reason: str) -> None:
        self._sink.state(is_up, reason)

    def deny(self, name: str, reason: str) -> None:
        self._sink.deny(name, reason)


class _Suite:
    def __init__(
        self,
        make: Callable[[], Broker],
        capacity: int,
        rounds: int,
        choose: random.Random,
    ) -> None:
        self._make = make
        self._capacity = capacity
        self._rounds = rounds
        self._choose = choose

    @contextmanager
    def _broker(self) -> Iterator[Broker]:
        broker = self._make()
        try:
            yield broker
        finally:
            broker.close()

    @contextmanager
    def _hub(self) -> Iterator[Hub]:
        with self._tapped() as (hub, _):
            yield hub

    @contextmanager
    def _tapped(self) -> Iterator[tuple[Hub, _Tap]]:
        broker = self._make()
        hub = Hub(broker=broker)
        tap = _Tap(hub.sink)
        broker.attach(tap)
        try:
            yield hub, tap
        finally:
            hub.close()

    # Storing and resuming.

    def stores_bytes_as_they_are(self) -> None:
        payloads = [
            b"",
            b"\n",
            b"\0",
            b"\r\n\0" * 10,
            bytes(range(256)),
            b"x" * (1 << 20),
        ]
        with self._broker() as broker:
            told = _Told()
            broker.attach(told)
            broker.watch("a")
            ids = broker.publish([("a", payload) for payload in payloads])
            page = broker.read("a", START)
            _require(
                [entry.payload for entry in page.entries] == payloads,
                "payloads must be read as they were published, byte by byte",
            )
            _require(
                [entry.id for entry in page.entries] == ids,
                "publish must return the ids under which its events are read",
            )
            _wait_for(
                lambda: len(told.entries) >= len(payloads),
                "published events must be told to the sink of a watched channel",
            )
            _require(
                [e.payload for _, e in told.entries] == payloads,
                "payloads must be told as they were published, in their order",
            )
            _require(broker.publish([]) == [], "publish of nothing must return []")

    def has_one_order(self) -> None:
        with self._broker() as broker:
            told = _Told()
            broker.attach(told)
            broker.watch("a")
            each = max(1, min(100, self._capacity // 8))
            start = broker.read("a", None).head

            def publish(publisher: int) -> None:
                for number in range(each):
                    broker.publish([("a", b"%d %d" % (publisher, number))])

            _run_together(*(partial(publish, publisher) for publisher in range(8)))
            _wait_for(lambda: len(told.entries) >= 8 * each, "all must be told")
            entries = broker.read("a", START, 8 * each).entries
            ids = [entry.id for entry in entries]
            _require(len(set(ids)) == 8 * each, "each event must have an id of its own")
            _require(
                [entry.id for _, entry in told.entries] == ids,
                "events must be told in the order in which they are read",
            )
            _require(
                [entry.prev for entry in entries] == [start, *ids[:-1]],
                "prev must be the id before in its channel, for the first one the head"
                " that the channel had without events",
            )
            for publisher in range(8):
                prefix = b"%d " % publisher
                payloads = [e.payload for e in entries if e.payload.startswith(prefix)]
                _require(
                    payloads == [b"%d %d" % (publisher, n) for n in range(each)],
                    "a publisher's events must be in the order of its calls",
                )

    def resumes_everywhere(self) -> None:
        with self._broker() as broker:
            count = min(self._capacity, 200)
            ids = broker.publish([("a", b"%d" % n) for n in range(count)])
            for place, id in enumerate(ids):
                page = broker.read("a", id)
                _require(page.complete, "after an id that is kept must be complete")
                _require(
                    [entry.id for entry in page.entries] == ids[place + 1 :],
                    "after an id that is kept all later events must follow",
                )
                _require(page.head == ids[-1], "head must be the newest event's id")
            page = broker.read("a", ids[0], 3)
            _require(
                [entry.id for entry in page.entries] == ids[1:4] and page.complete,
                "limit must be kept, from the oldest on",
            )
            page = broker.read("a", None)
            _require(
                page.head == ids[-1] and page.complete and not page.entries,
                "after=None must return the head alone, and be complete",
            )
            head = broker.read("nothing", None).head
            page = broker.read("nothing", head)
            _require(
                page.complete and not page.entries,
                "after the head of an empty channel it must be complete",
            )
            broker.publish([("nothing", b"first")])
            page = broker.read("nothing", head)
            _require(
                page.complete and len(page.entries) == 1,
                "after the head of an empty channel its first event must follow",
            )

    # Trimming, removing, unknown ids.

    def trims_by_capacity(self) -> None:
        with self._broker() as broker:
            ids: list[str | None] = []
            while len(ids) < 2 * self._capacity + 1:
                ids += broker.publish([("a", b"x")] * min(1000, self._capacity))
            edge = len(ids) - self._capacity - 1
            page = broker.read("a", ids[edge], self._capacity + 1)
            _require(
                page.complete and [e.id for e in page.entries] == ids[edge + 1 :],
                "the id just before the oldest that is kept must be complete",
            )
            for after in (ids[edge - 1], ids[0], START):
                page = broker.read("a", after, self._capacity + 1)
                _require(not page.complete, "a trimmed id must not be complete")
                _require(
                    [e.id for e in page.entries] == ids[edge + 1 :],
                    "after a trimmed id all that is kept must follow, and no more",
                )

    def shows_what_was_removed(
        self, remove: Callable[[Broker, str, str], object]
    ) -> None:
        with self._tapped() as (hub, tap):
            broker = hub.broker
            start = hub.head("a")
            ids = hub.publish_many("a", "123456")
            gone = (ids[1], ids[3], ids[5])
            for id in gone:
                remove(broker, "a", str(id))
            page = broker.read("a", START)
            _require(
                [entry.id for entry in page.entries] == ids[::2],
                "what was removed must not be read, and what follows it must",
            )
            _require(
                [entry.prev for entry in page.entries] == [start, ids[1], ids[3]],
                "prev must be the id before, though that was removed",
            )
            _require(
                page.head == ids[5], "head must be the newest's, though it was removed"
            )
            for place in (0, 2, 4):
                page = broker.read("a", ids[place])
                _require(
                    not page.complete
                    and [entry.id for entry in page.entries] == ids[place + 2 :: 2],
                    "after an id that is kept, and whose next was removed, what is kept"
                    " must follow, as not complete",
                )
            page = broker.read("a", ids[0], 1)
            _require(
                not page.complete and [entry.id for entry in page.entries] == [ids[2]],
                "the same must hold where less is read at once",
            )
            found, expected = [], ["1", ids[1], "3", ids[3], "5", ids[5]]
            subscription = hub.subscribe("a", after=start)
            while events := subscription.read(0):
                found += [e.id if isinstance(e, Gap) else e.data for e in events]
                _require(
                    len(found) <= len(expected), "nothing must be read again and again"
                )
            _require(
                found == expected,
                "where events were removed there must be a reset, and the rest",
            )
            hub.publish("a", "7")
            subscription.read(LIMIT)
            ids = hub.publish_many("a", "8")
            tap.wait_for(ids)
            remove(broker, "a", str(ids[0]))
            hub.sink.resync(["a"])
            _require(
                [
                    isinstance(event, Gap) and event.json()["reason"]
                    for event in subscription.read(LIMIT)
                ]
                == ["unknown"],
                "where the newest was removed, whoever is not behind must not be told"
                " of a lag",
            )

    def finds_the_newest(self) -> None:
        with self._broker() as broker:
            newest: Any = getattr(broker, "newest", None)
            if newest is None:  # the method is optional
                return
            head = broker.read("a", None).head
            _require(
                tuple(newest("a", 3)) == (head, head),
                "newest must return the head twice for a channel without events",
            )
            ids: list[str | None] = [head]
            ids += broker.publish([("a", b"%d" % n) for n in range(5)])
            broker.publish([("b", b"another's")])
            for count, place in ((1, 4), (2, 3), (5, 0), (6, 0), (10**9, 0)):
                _require(
                    tuple(newest("a", count)) == (ids[place], ids[-1]),
                    "newest must return the id before so many events, or before all"
                    " kept events, and the head",
                )
            ids += broker.publish([("a", b"x")] * self._capacity)
            for count in (self._capacity, self._capacity + 3):
                before, head = newest("a", count)
                page = broker.read("a", before, self._capacity + 1)
                _require(
                    page.complete
                    and [e.id for e in page.entries] == ids[-self._capacity :]
                    and head == ids[-1],
                    "newest must return the id before the kept events",
                )

    def reads_without_storing(self) -> None:
        with self._broker() as broker:
            told = _Told()
            broker.attach(told)
            broker.watch("#")
            names = [f"unused:{number}" for number in range(20)]
            heads = [broker.read(name, None).head for name in names]
            for name, head in zip(names, heads, strict=True):
                for after in (START, head, "1-deadbeef"):
                    page = broker.read(name, after)
                    _require(
                        not page.entries and page.head == head,
                        "read must not write to a channel",
                    )
            broker.publish([("used", b"x")])
            _wait_for(lambda: told.entries, "what is published must be told")
            _require(
                [name for name, _ in told.entries] == ["used"],
                "read must not write to a channel, nor have it told",
            )
            _require(told.is_up, "a broker that tells events must be up, by state()")

    def forgets_by_age(self, max_age: float) -> None:
        with self._broker() as broker:
            first, second = broker.publish([("a", b"1"), ("a", b"2")])
            time.sleep(max_age * 1.5)
            page = broker.read("a", first)
            _require(
                not page.complete and not page.entries,
                "an id whose next event is too old must not be complete",
            )
            began = time.monotonic()
            (third,) = broker.publish([("a", b"3")])
            page = broker.read("a", second)
            if page.complete:
                _require(
                    [e.id for e in page.entries] == [third],
                    "after an id that is known the next event must follow",
                )
            page = broker.read("a", first)
            kept = [e.id for e in page.entries]
            # On a busy machine the event may be too old by now.
            is_old = time.monotonic() - began > max_age / 2
            _require(
                not page.complete and (kept == [third] or (is_old and not kept)),
                "after an id that is too old all kept events must follow",
            )

    def takes_any_id(self) -> None:
        with self._broker() as broker:
            ids = broker.publish([("a", b"1"), ("a", b"2")])
            # Texts that int() accepts, but that are not ids.
            like = [f(str(id)) for id in ids for f in LIKE if f(str(id)) != id]
            others = map(str, broker.publish([("b", b"1"), ("b", b"2")]))
            for after in (*HOSTILE, *like, *others):
                page = broker.read("a", after)
                _require(
                    not page.complete and [e.id for e in page.entries] == ids,
                    "after an id that the broker never gave all kept events must"
                    f" follow, as not complete: {after[:40]!r}",
                )

    def does_not_know_ids_of_others(self) -> None:
        with self._broker() as old, self._broker() as new:
            lost = [id for id in old.publish([("a", b"1"), ("a", b"2")]) if id]
            new.publish([("a", b"1"), ("a", b"2"), ("a", b"3")])
            for id in lost:
                page = new.read("a", id)
                _require(
                    not page.complete or id in [e.id for e in page.entries],
                    "an id of an earlier broker must not be taken for one of this",
                )

    # Delivering.

    def tells_what_comes_after_watch(self) -> None:
        with self._broker() as broker:
            told = _Told()
            broker.attach(told)
            broker.watch("chat:*")
            broker.watch("logs:#")
            names = ["chat", "chat:1", "chat:1:2", "chats:1", "logs", "logs:a:b", "log"]
            broker.publish([(name, b"x") for name in names])
            _wait_for(lambda: len(told.entries) >= 3, "patterns must be watched")
            _require(
                sorted(name for name, _ in told.entries)
                == ["chat:1", "logs", "logs:a:b"],
                "a pattern must match one level by *, and any by #",
            )

    def has_no_window_between_history_and_live(self) -> None:
        with self._hub() as hub:
            count = self._rounds
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
                        with _open(hub.subscribe("a")) as subscription:
                            subscription.read(0)
                            subscription.read(LIMIT)
                            found = subscription.read(LIMIT)
                        if any(isinstance(event, Gap) for event in found):
                            continue  # delayed for too long, and told so
                        numbers = [int(event.data or "") for event in found]
                        expected = list(range(numbers[0], numbers[0] + len(numbers)))
                        _require(
                            numbers == expected,
                            "no event may be lost while a subscriber arrives",
                        )
                finally:
                    stop.append(None)

            _run_together(publish, subscribe)
            for number in range(count):
                # Between the page's head and the stream that opens after it.
                head = hub.head("b")
                publisher = _start(partial(hub.publish, "b", str(number)))
                with _open(hub.subscribe("b", after=head)) as subscription:
                    found = [event.data for event in subscription.read(LIMIT)]
                    publisher()
                    found += [event.data for event in subscription.read(0)]
                _require(
                    found == [str(number)],
                    "an event after head() must be received once, whenever it is"
                    f" published, got {found!r}",
                )

    def can_be_watched_and_unwatched(self) -> None:
        with self._broker() as broker:
            told = _Told()
            broker.attach(told)
            stop: list[None] = []
            others: list[None] = []  # events published since the last watch

            def publish() -> None:
                while not stop:
                    # Not too many: the awaited event must be told before it is trimmed.
                    if len(others) < self._capacity // 2:
                        others.append(None)
                        broker.publish([("a", b"x")])
                    time.sleep(0.001)

            def churn() -> None:
                try:
                    for _ in range(min(self._rounds, 1000)):
                        broker.watch("a")
                        others.clear()
                        (id,) = broker.publish([("a", b"mine")])
                        _wait_for(
                            partial(told.ids.__contains__, id),
                            "events published after watch has returned must be told",
                        )
                        broker.unwatch("a")
                        told.entries.clear()
                finally:
                    stop.append(None)

            _run_together(publish, churn)
            broker.unwatch("never watched")

    def has_many_channels(self) -> None:
        with self._hub() as hub:
            names = [f"c:{number}" for number in range(min(10_000, 10 * self._rounds))]
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
                _require(
                    found == [name],
                    f"each channel must have its own events, got {found!r}",
                )
            seconds = time.process_time() - began
            _require(
                seconds < LIMIT,
                f"{len(names)} channels must be subscribed to, published to and read"
                f" within {LIMIT} s of processor time, took {seconds:.1f}",
            )
            for subscription in subscriptions:
                subscription.close()

    def serves_slow_readers(self) -> None:
        with self._tapped() as (hub, tap), _open(hub.subscribe("a")) as slow:
            slow.read(0)
            count = self._capacity
            tap.wait_for(hub.publish_many("a", map(str, range(count))))
            found = _read_all(slow)
            _require(
                [event.data for event in found] == [*map(str, range(count))],
                "a subscriber behind the window, but not behind the kept events, must"
                " get all",
            )
            more = max(count, WINDOW) + 1
            tap.wait_for(hub.publish_many("a", map(str, range(more))))
            reset, *found = _read_all(slow)
            _require(
                isinstance(reset, Gap) and reset.json()["reason"] == "lagged",
                "a subscriber that falls behind the kept events must be told",
            )
            _require(
                [event.data for event in found]
                == [*map(str, range(more - count, more))],
                "after a reset all kept events must follow",
            )

    # Unreliable announcements, closing, and the whole.

    def needs_no_reliable_word(self) -> None:
        broker = self._make()
        hub = Hub(broker=broker)
        broker.attach(_Unreliable(hub.sink, self._choose))
        try:
            count = min(self._capacity, 300)
            subscriptions = [hub.subscribe("a") for _ in range(3)]
            found: list[list[Any]] = [[] for _ in subscriptions]
            for subscription in subscriptions:
                subscription.read(0)
            for number in range(count):
                hub.publish("a", str(number))
                for mine, subscription in zip(found, subscriptions, strict=True):
                    if self._choose.random() < 0.3:
                        mine += [event.data for event in subscription.read(0)]
            hub.sink.resync(None)
            for mine, subscription in zip(found, subscriptions, strict=True):
                mine += [event.data for event in _read_all(subscription)]
                _require(
                    mine == [*map(str, range(count))],
                    "no event may be lost, even if it is told late, twice or never",
                )
        finally:
            hub.close()

    def closes(self) -> None:
        before, descriptors = set(threading.enumerate()), _descriptors()
        hub = Hub(broker=self._make())
        subscriptions = [hub.subscribe("a") for _ in range(4)]
        ended: list[None] = []

        def read(subscription: Subscription) -> None:
            try:
                subscription.read()
            except Closed:
                ended.append(None)

        joins = [_start(partial(read, s)) for s in subscriptions]
        _wait_for(
            lambda: hub.stats()["subscribers"] == 4, "subscribers must be counted"
        )
        hub.close()
        hub.close()
        for join in joins:
            join()
        _require(len(ended) == 4, "close() must wake all subscribers")
        left = set(threading.enumerate()) - before
        _require(not left, f"close() must leave no thread, got {left!r}")
        _wait_for(
            lambda: _descriptors() <= descriptors, "close() must leave no descriptor"
        )

    def accounts_for_all(self) -> None:
        """After random publishes, drops and resumes each event or a reset has come."""
        with self._tapped() as (hub, tap):
            published: list[str] = []
            last: list[str | None] = []
            clients = [_Client(hub) for _ in range(5)]
            for client in clients:
                client.come()
            for _ in range(self._rounds):
                luck = self._choose.random()
                client = self._choose.choice(clients)
                if luck < 0.4:
                    many = luck < 0.01
                    count = self._capacity + 5 if many else self._choose.randrange(1, 4)
                    new = [str(len(published) + number) for number in range(count)]
                    last = hub.publish_many("a", new)
                    published += new
                elif luck < 0.7:
                    client.read()
                elif luck < 0.8:
                    hub.sink.resync(None)
                else:
                    client.leave(self._choose)
                    client.come()
            tap.wait_for(last)
            for client in clients:
                client.read()
                client.account(published)
                client.leave(self._choose)


class _Client:
    """Reads, loses its connection anywhere, and resumes after its last id."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self.got: list[Any] = []
        self._id = hub.head("a")
        self._subscription = hub.subscribe("a")

    def come(self) -> None:
        self._subscription = self._hub.subscribe("a", after=self._id)

    def read(self) -> None:
        self._take(_read_all(self._subscription))

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
            _require(
                number == expected or (may_skip and number > expected),
                f"each event must be received once, in order, or a reset before it:"
                f" expected {expected}, got {number}",
            )
            expected, may_skip = number + 1, False
        _require(expected == len(published), "the newest events must be received")


def _descriptors() -> int:
    """Return the number of open descriptors; 0 if the system does not show it."""
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:
        return 0


def _read_all(subscription: Subscription) -> list[Any]:
    found: list[Any] = []
    while events := subscription.read(0):
        found += events
    return found


@contextmanager
def _open(subscription: Subscription) -> Iterator[Subscription]:
    try:
        yield subscription
    finally:
        subscription.close()


def _wait_for(condition: Callable[[], object], sentence: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        _require(time.monotonic() < deadline, f"{sentence}: not within {LIMIT} s")
        time.sleep(0.001)


def _start(function: Callable[[], object]) -> Callable[[], None]:
    """Run a function in a thread; return a function that waits for its end."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def join() -> None:
        thread.join(4 * LIMIT)
        _require(not thread.is_alive(), "a call must not block for ever")
        for error in errors:
            raise error

    return join


def _run_together(*functions: Callable[[], object]) -> None:
    """Run functions in threads at the same time, and wait for all."""
    joins = [_start(function) for function in functions]
    for join in joins:
        join()
