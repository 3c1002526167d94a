"""The state that the demo's viewers share: numbers, news, and the viewers.

A viewer is a position in the news, not a queue: nothing has to be delivered, and a
viewer that leaves leaves nothing behind. One gevent worker runs all of this, and
nothing here waits, so no lock is needed.
"""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..runtime.clock import time

__all__ = ["TICK", "Room", "Viewer"]

TICK = 0.25
"""Seconds between two samples."""

_BUSY, _CALM = 80.0, 50.0  # percent; different, so that the state does not flicker


class Viewer:
    """One open stream.

    Attributes:
        client: The name that the stream was opened with, ``""`` without one.
        is_dropped: Whether the stream shall end.
    """

    def __init__(self, room: Room, client: str) -> None:
        self.client = client
        self.is_dropped = False
        self._room = room
        self._position = room.length

    def news(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the name and the data of each event since the last call."""
        missed = self._room.length - self._position
        self._position = self._room.length
        news = self._room.news
        yield from list(news)[len(news) - min(missed, len(news)) :]


class Room:
    """The viewers, and the events that they all see.

    Attributes:
        news: Names and data of the latest events, oldest first.
        length: The number of all events so far.
    """

    def __init__(self) -> None:
        self.news: deque[tuple[str, dict[str, Any]]] = deque(maxlen=100)
        self.length = 0
        self._viewers: list[Viewer] = []
        self._waves = 0
        self._cpu = _Cpu()
        self._walk = _Walk()
        self._is_busy = False
        self._numbers: dict[str, float] = {}
        self._measured = 0.0

    @contextmanager
    def enter(self, client: str) -> Iterator[Viewer]:
        """Count as a viewer for the length of a block."""
        viewer = Viewer(self, client)
        self._viewers.append(viewer)
        self._say("viewers", count=len(self._viewers))
        try:
            yield viewer
        finally:
            self._viewers.remove(viewer)
            self._say("viewers", count=len(self._viewers))

    def wave(self) -> None:
        """Send an event to everyone."""
        self._waves += 1
        self._say("wave", count=self._waves)

    def drop(self, client: str) -> bool:
        """End a client's streams; return whether there were any."""
        found = [v for v in self._viewers if client and v.client == client]
        for viewer in found:
            viewer.is_dropped = True
        return bool(found)

    def numbers(self) -> dict[str, float]:
        """Return the current values of the series, 0 to 100, by name.

        They are measured once a tick, however many viewers there are.
        """
        now = time.monotonic()
        if now - self._measured >= TICK * 0.8:
            self._measured = now
            self._measure()
        return self._numbers

    def _measure(self) -> None:
        cpu, memory, above = self._cpu.percent(), _memory(), self._walk.is_above
        walk = self._walk.step()
        series = {"cpu": cpu, "memory": memory, "walk": walk}
        self._numbers = {k: round(v, 1) for k, v in series.items() if v is not None}
        if above != self._walk.is_above:
            self._say("crossing", walk="down" if above else "up")
        if cpu > _BUSY if not self._is_busy else cpu < _CALM:
            self._is_busy = not self._is_busy
            self._say("busy" if self._is_busy else "calm", cpu=round(cpu))

    def _say(self, name: str, **data: Any) -> None:
        self.news.append((name, data))
        self.length += 1


class _Cpu:
    """The load of this machine's processors, lightly smoothed."""

    def __init__(self) -> None:
        self._before = self._times()
        self._percent = 0.0

    @staticmethod
    def _times() -> tuple[int, int]:
        """Return the busy and the total jiffies since boot; see proc_stat(5)."""
        try:
            first = Path("/proc/stat").read_text().partition("\n")[0]
        except OSError:
            return 0, 0
        # user nice system idle iowait irq softirq steal; guests count as user.
        times = [int(field) for field in first.split()[1:9]]
        return sum(times) - times[3] - times[4], sum(times)

    def percent(self) -> float:
        busy, total = self._times()
        if not total:  # not Linux
            load = os.getloadavg()[0] / (os.cpu_count() or 1)
            return min(100.0, 100 * load)
        spent, passed = busy - self._before[0], total - self._before[1]
        if passed > 0:
            self._before = busy, total
            now = min(100.0, max(0.0, 100 * spent / passed))
            self._percent += 0.6 * (now - self._percent)
        return self._percent


def _memory() -> float | None:
    """Return the percentage of this machine's memory in use; see proc_meminfo(5)."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in text.splitlines())
    total, available = (
        int(fields[name].split()[0]) for name in ("MemTotal", "MemAvailable")
    )
    return 100 * (1 - available / total)


class _Walk:
    """A random walk with some momentum, drawn back towards the middle."""

    def __init__(self) -> None:
        self._place, self._speed = 50.0, 0.0

    @property
    def is_above(self) -> bool:
        return self._place > 50

    def step(self) -> float:
        pull = (50 - self._place) * 0.02
        self._speed = 0.88 * self._speed + pull + random.gauss(0, 1.1)
        self._place = min(98.0, max(2.0, self._place + self._speed))
        return self._place
