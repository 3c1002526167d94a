"""Many clients of one stream: a program in C, so that they are never the bottleneck.

A client in Python needs more CPU time for an event than the servers do that it should
measure. What it is told and what it answers stands in clients.c.
"""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Came", "Clients", "Met", "Stayed", "compiled", "ended", "pauses", "payload"]

_HERE = Path(__file__).parent


def payload(n: int, size: int) -> str:
    """Return an event's data, JSON with the time, of so many characters."""
    start = f'{{"n":{n},"t":{time.monotonic_ns()},"p":"'
    return start + "x" * (size - len(start) - 2) + '"}'


def pauses(count: int, rate: float) -> Iterator[tuple[int, float]]:
    """Yield the number of each event, and for how long to sleep before it.

    Args:
        rate: Events a second; 0: at once.
    """
    start = time.monotonic()
    for n in range(count):
        yield n, max(0.0, start + n / rate - time.monotonic()) if rate else 0.0


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="benchmarks-")  # until we exit


@functools.cache
def compiled(name: str) -> str:
    """Compile a program of this folder; return its path."""
    path = str(Path(_folder().name, name))
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-O2", "-o", path, str(_HERE / f"{name}.c")], check=True)
    return path


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """End a process with the block, the hard way if it must be."""
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass(frozen=True)
class Came:
    """What has come by all streams.

    Attributes:
        deliveries: Events, times those who got them.
        reads: In so many pieces they came.
        seconds: From the first event's time to the last delivery.
        p50, p99, most: Latencies, seconds.
        cpu: Seconds of CPU time of the clients.
        share: That, by the time that they waited for events.
    """

    deliveries: int
    reads: int
    seconds: float
    p50: float
    p99: float
    most: float
    cpu: float
    share: float


@dataclass(frozen=True)
class Met:
    """How soon streams had their first events, from connect() on: seconds."""

    p50: float
    p99: float
    most: float


@dataclass(frozen=True)
class Stayed:
    """What has come by streams that have events of their own.

    Attributes:
        deliveries: Events of all streams.
        fewest, highest: Events of one stream.
        reads: In so many pieces they came.
        p50, p99, most: Latencies, seconds.
        share: The clients' CPU time, by the time.
    """

    deliveries: int
    fewest: int
    highest: int
    reads: int
    p50: float
    p99: float
    most: float
    share: float


class Clients:
    """Open streams, and what comes by them; a context manager.

    Args:
        port: Of a server on 127.0.0.1.
        path: Of the stream.
    """

    def __init__(self, port: int, path: str = "/events") -> None:
        self._process = subprocess.Popen(
            [compiled("clients"), str(port), path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._readers = 0

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().decode().strip()
        if not line:
            raise RuntimeError(f"the clients have ended: {self._process.wait(10)}")
        return line

    def come(self, readers: int, stopped: int = 0) -> None:
        """Subscribe so many, and so many who never read more than the head."""
        self._say(f"come {readers} {stopped}")
        assert self._answer() == "ok"
        self._readers += readers

    def collect(self, events: int, publish: Callable[[], object]) -> Came:
        """Have so many events published; return what came when all came to all.

        Args:
            events: To each, numbered from 0: what is lost, comes twice, or out of
                order ends the clients.
            publish: Has the server begin to publish, or publishes itself.
        """
        self._say(f"collect {events}")
        assert self._answer() == "ready"
        began = time.monotonic()
        publish()
        numbers = [int(number) for number in self._answer().split()]
        waited = time.monotonic() - began
        reads, first, last, p50, p99, most, cpu = numbers
        return Came(
            deliveries=self._readers * events,
            reads=reads,
            seconds=(last - first) / 1e9,
            p50=p50 / 1e9,
            p99=p99 / 1e9,
            most=most / 1e9,
            cpu=cpu / 1e9,
            share=cpu / 1e9 / waited,
        )

    def meet(self, readers: int) -> Met:
        """Open so many streams that have events of their own; await one by each."""
        self._say(f"meet {readers}")
        self._readers += readers
        p50, p99, most = (int(number) / 1e9 for number in self._answer().split())
        return Met(p50, p99, most)

    def stay(self, seconds: float, meanwhile: Callable[[], object]) -> Stayed:
        """Return what those streams have got in this time.

        Args:
            seconds: So long they are read.
            meanwhile: Called when that has begun.
        """
        self._say(f"stay {round(seconds * 1000)}")
        assert self._answer() == "ready"
        meanwhile()
        events, fewest, highest, reads, *times = map(int, self._answer().split())
        p50, p99, most, cpu = (one / 1e9 for one in times)
        return Stayed(events, fewest, highest, reads, p50, p99, most, cpu / seconds)

    def leave(self) -> float:
        """Close all connections at once; return the time before that."""
        now = time.monotonic()
        self._process.kill()
        self._process.wait()
        return now

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        with ended(self._process):
            pass
