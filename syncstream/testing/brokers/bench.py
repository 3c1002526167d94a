"""What the tests of brokers work with: brokers, hubs, sinks, and calls side by side."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...brokers.contract import Broker, Sink
from ...brokers.log import Entry
from ...channels.hub import Hub
from ...channels.subscription import Subscription
from ...runtime.clock import time

__all__ = [
    "LIMIT",
    "Bench",
    "Tap",
    "Told",
    "Unreliable",
    "run_together",
    "descriptors",
    "opened",
    "read_all",
    "require",
    "start",
    "wait_for",
]

LIMIT = 15.0  # seconds to wait for each condition, on a slow machine, too


def require(holds: object, sentence: str) -> None:
    if not holds:
        raise AssertionError(sentence)


@dataclass(frozen=True)
class Bench:
    """Brokers and hubs, made as the tests want them; see `check_broker`."""

    make: Callable[[], Broker]
    capacity: int
    rounds: int
    choose: random.Random

    @contextmanager
    def broker(self) -> Iterator[Broker]:
        broker = self.make()
        try:
            yield broker
        finally:
            broker.close()

    @contextmanager
    def hub(self) -> Iterator[Hub]:
        with self.tapped() as (hub, _):
            yield hub

    @contextmanager
    def tapped(self) -> Iterator[tuple[Hub, Tap]]:
        broker = self.make()
        hub = Hub(broker=broker)
        tap = Tap(hub.sink)
        broker.attach(tap)
        try:
            yield hub, tap
        finally:
            hub.close()


class Told:
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


class Tap:
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
        wait_for(
            lambda: not ids or ids[-1] in self._ids, "what is published must be told"
        )


class Unreliable:
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


def descriptors() -> int:
    """Return the number of open descriptors; 0 if the system does not show it."""
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:
        return 0


def read_all(subscription: Subscription) -> list[Any]:
    found: list[Any] = []
    while events := subscription.read(0):
        found += events
    return found


@contextmanager
def opened(subscription: Subscription) -> Iterator[Subscription]:
    try:
        yield subscription
    finally:
        subscription.close()


def wait_for(condition: Callable[[], object], sentence: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        require(time.monotonic() < deadline, f"{sentence}: not within {LIMIT} s")
        time.sleep(0.001)


def start(function: Callable[[], object]) -> Callable[[], None]:
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
        require(not thread.is_alive(), "a call must not block for ever")
        for error in errors:
            raise error

    return join


def run_together(*functions: Callable[[], object]) -> None:
    """Run functions in threads at the same time, and wait for all."""
    joins = [start(function) for function in functions]
    for join in joins:
        join()
