"""Tests of what a broker stores: bytes, order, bounds, and ids that lead back to it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ...brokers.contract import Broker
from ...brokers.log import START
from ...channels.gap import Gap
from ...runtime.clock import time
from .bench import LIMIT, Bench, Told, require, run_together, wait_for

__all__ = ["HOSTILE", "Stored"]

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


class Stored:
    """What is stored, resumed, trimmed and removed."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def stores_bytes_as_they_are(self) -> None:
        payloads = [
            b"",
            b"\n",
            b"\0",
            b"\r\n\0" * 10,
            bytes(range(256)),
            b"x" * (1 << 20),
        ]
        with self._bench.broker() as broker:
            told = Told()
            broker.attach(told)
            broker.watch("a")
            ids = broker.publish([("a", payload) for payload in payloads])
            page = broker.read("a", START)
            require(
                [entry.payload for entry in page.entries] == payloads,
                "payloads must be read as they were published, byte by byte",
            )
            require(
                [entry.id for entry in page.entries] == ids,
                "publish must return the ids under which its events are read",
            )
            wait_for(
                lambda: len(told.entries) >= len(payloads),
                "published events must be told to the sink of a watched channel",
            )
            require(
                [e.payload for _, e in told.entries] == payloads,
                "payloads must be told as they were published, in their order",
            )
            require(broker.publish([]) == [], "publish of nothing must return []")

    def has_one_order(self) -> None:
        with self._bench.broker() as broker:
            told = Told()
            broker.attach(told)
            broker.watch("a")
            each = max(1, min(100, self._bench.capacity // 8))
            start = broker.read("a", None).head

            def publish(publisher: int) -> None:
                for number in range(each):
                    broker.publish([("a", b"%d %d" % (publisher, number))])

            run_together(*(partial(publish, publisher) for publisher in range(8)))
            wait_for(lambda: len(told.entries) >= 8 * each, "all must be told")
            entries = broker.read("a", START, 8 * each).entries
            ids = [entry.id for entry in entries]
            require(len(set(ids)) == 8 * each, "each event must have an id of its own")
            require(
                [entry.id for _, entry in told.entries] == ids,
                "events must be told in the order in which they are read",
            )
            require(
                [entry.prev for entry in entries] == [start, *ids[:-1]],
                "prev must be the id before in its channel, for the first one the head"
                " that the channel had without events",
            )
            for publisher in range(8):
                prefix = b"%d " % publisher
                payloads = [e.payload for e in entries if e.payload.startswith(prefix)]
                require(
                    payloads == [b"%d %d" % (publisher, n) for n in range(each)],
                    "a publisher's events must be in the order of its calls",
                )

    def resumes_everywhere(self) -> None:
        with self._bench.broker() as broker:
            count = min(self._bench.capacity, 200)
            ids = broker.publish([("a", b"%d" % n) for n in range(count)])
            for place, id in enumerate(ids):
                page = broker.read("a", id)
                require(page.complete, "after an id that is kept must be complete")
                require(
                    [entry.id for entry in page.entries] == ids[place + 1 :],
                    "after an id that is kept all later events must follow",
                )
                require(page.head == ids[-1], "head must be the newest event's id")
            page = broker.read("a", ids[0], 3)
            require(
                [entry.id for entry in page.entries] == ids[1:4] and page.complete,
                "limit must be kept, from the oldest on",
            )
            page = broker.read("a", None)
            require(
                page.head == ids[-1] and page.complete and not page.entries,
                "after=None must return the head alone, and be complete",
            )
            head = broker.read("nothing", None).head
            page = broker.read("nothing", head)
            require(
                page.complete and not page.entries,
                "after the head of an empty channel it must be complete",
            )
            broker.publish([("nothing", b"first")])
            page = broker.read("nothing", head)
            require(
                page.complete and len(page.entries) == 1,
                "after the head of an empty channel its first event must follow",
            )

    # Trimming, removing, unknown ids.

    def trims_by_capacity(self) -> None:
        with self._bench.broker() as broker:
            ids: list[str | None] = []
            while len(ids) < 2 * self._bench.capacity + 1:
                ids += broker.publish([("a", b"x")] * min(1000, self._bench.capacity))
            edge = len(ids) - self._bench.capacity - 1
            page = broker.read("a", ids[edge], self._bench.capacity + 1)
            require(
                page.complete and [e.id for e in page.entries] == ids[edge + 1 :],
                "the id just before the oldest that is kept must be complete",
            )
            for after in (ids[edge - 1], ids[0], START):
                page = broker.read("a", after, self._bench.capacity + 1)
                require(not page.complete, "a trimmed id must not be complete")
                require(
                    [e.id for e in page.entries] == ids[edge + 1 :],
                    "after a trimmed id all that is kept must follow, and no more",
                )

    def shows_what_was_removed(
        self, remove: Callable[[Broker, str, str], object]
    ) -> None:
        with self._bench.tapped() as (hub, tap):
            broker = hub.broker
            start = hub.head("a")
            ids = hub.publish_many("a", "123456")
            gone = (ids[1], ids[3], ids[5])
            for id in gone:
                remove(broker, "a", str(id))
            page = broker.read("a", START)
            require(
                [entry.id for entry in page.entries] == ids[::2],
                "what was removed must not be read, and what follows it must",
            )
            require(
                [entry.prev for entry in page.entries] == [start, ids[1], ids[3]],
                "prev must be the id before, though that was removed",
            )
            require(
                page.head == ids[5], "head must be the newest's, though it was removed"
            )
            for place in (0, 2, 4):
                page = broker.read("a", ids[place])
                require(
                    not page.complete
                    and [entry.id for entry in page.entries] == ids[place + 2 :: 2],
                    "after an id that is kept, and whose next was removed, what is kept"
                    " must follow, as not complete",
                )
            page = broker.read("a", ids[0], 1)
            require(
                not page.complete and [entry.id for entry in page.entries] == [ids[2]],
                "the same must hold where less is read at once",
            )
            found, expected = [], ["1", ids[1], "3", ids[3], "5", ids[5]]
            subscription = hub.subscribe("a", after=start)
            while events := subscription.read(0):
                found += [e.id if isinstance(e, Gap) else e.data for e in events]
                require(
                    len(found) <= len(expected), "nothing must be read again and again"
                )
            require(
                found == expected,
                "where events were removed there must be a reset, and the rest",
            )
            hub.publish("a", "7")
            subscription.read(LIMIT)
            ids = hub.publish_many("a", "8")
            tap.wait_for(ids)
            remove(broker, "a", str(ids[0]))
            hub.sink.resync(["a"])
            require(
                [
                    isinstance(event, Gap) and event.json()["reason"]
                    for event in subscription.read(LIMIT)
                ]
                == ["unknown"],
                "where the newest was removed, whoever is not behind must not be told"
                " of a lag",
            )

    def finds_the_newest(self) -> None:
        with self._bench.broker() as broker:
            newest: Any = getattr(broker, "newest", None)
            if newest is None:  # the method is optional
                return
            head = broker.read("a", None).head
            require(
                tuple(newest("a", 3)) == (head, head),
                "newest must return the head twice for a channel without events",
            )
            ids: list[str | None] = [head]
            ids += broker.publish([("a", b"%d" % n) for n in range(5)])
            broker.publish([("b", b"another's")])
            for count, place in ((1, 4), (2, 3), (5, 0), (6, 0), (10**9, 0)):
                require(
                    tuple(newest("a", count)) == (ids[place], ids[-1]),
                    "newest must return the id before so many events, or before all"
                    " kept events, and the head",
                )
            ids += broker.publish([("a", b"x")] * self._bench.capacity)
            for count in (self._bench.capacity, self._bench.capacity + 3):
                before, head = newest("a", count)
                page = broker.read("a", before, self._bench.capacity + 1)
                require(
                    page.complete
                    and [e.id for e in page.entries] == ids[-self._bench.capacity :]
                    and head == ids[-1],
                    "newest must return the id before the kept events",
                )

    def reads_without_storing(self) -> None:
        with self._bench.broker() as broker:
            told = Told()
            broker.attach(told)
            broker.watch("#")
            names = [f"unused:{number}" for number in range(20)]
            heads = [broker.read(name, None).head for name in names]
            for name, head in zip(names, heads, strict=True):
                for after in (START, head, "1-deadbeef"):
                    page = broker.read(name, after)
                    require(
                        not page.entries and page.head == head,
                        "read must not write to a channel",
                    )
            broker.publish([("used", b"x")])
            wait_for(lambda: told.entries, "what is published must be told")
            require(
                [name for name, _ in told.entries] == ["used"],
                "read must not write to a channel, nor have it told",
            )
            require(told.is_up, "a broker that tells events must be up, by state()")

    def forgets_by_age(self, max_age: float) -> None:
        with self._bench.broker() as broker:
            first, second = broker.publish([("a", b"1"), ("a", b"2")])
            time.sleep(max_age * 1.5)
            page = broker.read("a", first)
            require(
                not page.complete and not page.entries,
                "an id whose next event is too old must not be complete",
            )
            began = time.monotonic()
            (third,) = broker.publish([("a", b"3")])
            page = broker.read("a", second)
            if page.complete:
                require(
                    [e.id for e in page.entries] == [third],
                    "after an id that is known the next event must follow",
                )
            page = broker.read("a", first)
            kept = [e.id for e in page.entries]
            # On a busy machine the event may be too old by now.
            is_old = time.monotonic() - began > max_age / 2
            require(
                not page.complete and (kept == [third] or (is_old and not kept)),
                "after an id that is too old all kept events must follow",
            )

    def takes_any_id(self) -> None:
        with self._bench.broker() as broker:
            ids = broker.publish([("a", b"1"), ("a", b"2")])
            # Texts that int() accepts, but that are not ids.
            like = [f(str(id)) for id in ids for f in LIKE if f(str(id)) != id]
            others = map(str, broker.publish([("b", b"1"), ("b", b"2")]))
            for after in (*HOSTILE, *like, *others):
                page = broker.read("a", after)
                require(
                    not page.complete and [e.id for e in page.entries] == ids,
                    "after an id that the broker never gave all kept events must"
                    f" follow, as not complete: {after[:40]!r}",
                )

    def does_not_know_ids_of_others(self) -> None:
        with self._bench.broker() as old, self._bench.broker() as new:
            lost = [id for id in old.publish([("a", b"1"), ("a", b"2")]) if id]
            new.publish([("a", b"1"), ("a", b"2"), ("a", b"3")])
            for id in lost:
                page = new.read("a", id)
                require(
                    not page.complete or id in [e.id for e in page.entries],
                    "an id of an earlier broker must not be taken for one of this",
                )
