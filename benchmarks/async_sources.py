"""What do 2,000 asynchronous sources cost, of one event a second each?

    python -m benchmarks.async_sources [--quick]

In the repository's folder, with a C compiler and ``pip install flask gunicorn starlette
sse-starlette uvicorn uvloop httptools``; Linux only, with a limit of 2,500 open files,
or there are fewer sources. About 6 minutes; --quick, 50 sources that yield text, for a
second, some 5 seconds.

*Text*: one and the same asynchronous generator yields an event's text once a second,
for ``SSEResponse(..., framed=True)`` of a Flask view on one ``gunicorn -k sync``
worker, and for Starlette's ``StreamingResponse`` on uvicorn: with h11 on asyncio's own
loop, as ours is; and with httptools on uvloop. *Items*: it yields dicts, of which
``SSEResponse`` makes JSON; for sse-starlette's ``EventSourceResponse``, json.dumps
does. A source's second event comes after a random part of a second, so that the sources
are spread evenly, however fast they were opened.

CPU time is that of the one process, system time and all its threads: by delivered event
while all streams are open; and *to open*, by stream, from a request to its first event,
100 requests at once. Latency is from the generator's yield to the client. Memory is the
growth of PSS by all streams, from 50 streams, opened and closed before, with the
garbage collected; what the kernel holds for a socket is not in it. Then come 25
*ordinary requests*, five a second, each on a connection of its own. *Leave*: all
clients close at once; from that to the last generator's `finally`.

Every client must get every event once, in order: the run ends if not. *Arrived*: of the
events that one a second makes in the time that is measured. Each server is started anew
for each line, in turns, three times over; the table has medians, and ratios to *base*,
Starlette and sse-starlette on asyncio's own loop, are medians of those in the same
round. The clients are a program in C, clients.c.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import resource
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.request import urlopen

from syncstream import SSEResponse
from syncstream.runtime.process import process

from .clients import Clients, ended, pauses
from .machine import describe, verdict

if TYPE_CHECKING:
    from flask import Flask

T = TypeVar("T")

COUNT, FIRST, WINDOW, ROUNDS = 2_000, 50, 10, 3  # sources; seconds
QUICK_COUNT, QUICK_WINDOW = 50, 1
SETTLE = 0.3  # seconds
FILES = 500  # open ones beside a client's each
ASKED = 5  # ordinary requests a second
TIMEOUT = 60.0
PADDING = "x" * 80
COST_GOAL, MEMORY_GOAL = 1.0, 1.0  # of the base's, on asyncio and h11
THREADS_GOAL = 4  # the worker's, the watch's and those of the two loops
ASK_GOAL = 50.0  # ms, the median
ARRIVED_GOAL = 0.99

GUNICORN = (
    *("-m", "gunicorn", "-w", "1", "-k", "sync", "-b", "fd://{fd}", "--timeout", "120"),
    *("--graceful-timeout", "1", "--log-level", "error", "--no-control-socket"),
    "benchmarks.async_sources:ours()",
)
UVICORN = (
    *("-m", "uvicorn", "--fd", "{fd}", "--factory", "--log-level", "error"),
    "benchmarks.async_sources:theirs",
)
PLAIN = (*UVICORN, "--loop", "asyncio", "--http", "h11")
FAST = (*UVICORN, "--loop", "uvloop", "--http", "httptools")


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        name, on, kind: What it is called.
        command: With {fd}.
    """

    name: str
    on: str
    kind: str
    command: tuple[str, ...]


OUR_NAME = "syncstream"
OURS = Line(OUR_NAME, "gunicorn sync", "text", GUNICORN)
STARLETTE = Line("Starlette", "uvicorn: asyncio, h11", "text", PLAIN)
OUR_ITEMS = Line(OUR_NAME, "gunicorn sync", "items", GUNICORN)
SSE_STARLETTE = Line("sse-starlette", "uvicorn: asyncio, h11", "items", PLAIN)
LINES = {
    OURS: STARLETTE,
    STARLETTE: STARLETTE,
    Line("Starlette", "uvicorn: uvloop, httptools", "text", FAST): STARLETTE,
    OUR_ITEMS: SSE_STARLETTE,
    SSE_STARLETTE: SSE_STARLETTE,
    Line("sse-starlette", "uvicorn: uvloop, httptools", "items", FAST): SSE_STARLETTE,
}
"""The lines, and to which each is compared."""


# The servers' side.


def text_of(n: int) -> str:
    return f'data: {{"n":{n},"t":{time.monotonic_ns()},"p":"{PADDING}"}}\n\n'


def item_of(n: int) -> dict[str, Any]:
    return {"n": n, "t": time.monotonic_ns(), "p": PADDING}


class Sources:
    """The asynchronous generators of a process, and what became of them."""

    def __init__(self) -> None:
        self.open = self.ended = 0
        self.last_end = 0.0

    async def each_second(self, make: Callable[[int], T]) -> AsyncIterator[T]:
        """Yield what is made of 0, 1, 2, …"""
        self.open += 1
        start, n = time.monotonic() - random.random(), 0
        try:
            while True:
                yield make(n)
                n += 1
                await asyncio.sleep(start + n - time.monotonic())
        finally:
            self.open -= 1
            self.ended += 1
            self.last_end = time.monotonic()

    def state(self) -> dict[str, float]:
        gc.collect()
        return {
            "pid": os.getpid(),
            "open": self.open,
            "ended": self.ended,
            "last_end": self.last_end,
            "attached": process().attached_streams,
        }


def ours() -> Flask:
    from flask import Flask

    flask, sources = Flask(__name__), Sources()

    @flask.get("/text")
    def text() -> Any:
        return SSEResponse(sources.each_second(text_of), framed=True)

    @flask.get("/items")
    def items() -> Any:
        return SSEResponse(sources.each_second(item_of))

    @flask.get("/state")
    def state() -> dict[str, float]:
        return sources.state()

    @flask.get("/")
    def ordinary() -> str:
        return "ok"

    return flask


def theirs() -> Any:
    from sse_starlette import EventSourceResponse
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
    from starlette.routing import Route

    sources = Sources()

    async def text(request: Request) -> Any:
        source = sources.each_second(text_of)
        return StreamingResponse(source, media_type="text/event-stream")

    async def items(request: Request) -> Any:
        def data_of(n: int) -> dict[str, str]:
            return {"data": json.dumps(item_of(n), separators=(",", ":"))}

        return EventSourceResponse(sources.each_second(data_of))

    async def state(request: Request) -> Any:
        return JSONResponse(sources.state())

    async def ordinary(request: Request) -> Any:
        return PlainTextResponse("ok")

    return Starlette(
        routes=[
            Route("/text", text),
            Route("/items", items),
            Route("/state", state),
            Route("/", ordinary),
        ]
    )


# The clients' side.


class Running:
    """A server that runs."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._pid = int(self.state()["pid"])

    def get(self, path: str) -> str:
        url = f"http://127.0.0.1:{self.port}{path}"
        with urlopen(url, timeout=TIMEOUT) as answer:
            text: str = answer.read().decode()
        return text

    def state(self) -> dict[str, float]:
        """Return `Sources.state`; all garbage has gone."""
        state: dict[str, float] = json.loads(self.get("/state"))
        return state

    def await_ends(self, count: int) -> float:
        """Wait until so many generators have ended; return when the last one did."""
        deadline = time.monotonic() + TIMEOUT
        while (now := self.state())["ended"] < count:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{now['ended']} of {count} have ended")
            time.sleep(0.1)
        return now["last_end"]

    def cpu(self) -> float:
        """Return the seconds of CPU time of the process, nanoseconds exact."""
        return time.clock_gettime((~self._pid << 3) | 2)  # CPUCLOCK_SCHED

    def check_open(self, count: int, *, is_ours: bool) -> None:
        """Check that so many sources are open; of ours, that none has a thread."""
        state = self.state()
        if state["open"] != count or (is_ours and state["attached"]):
            raise RuntimeError(f"{count} are to be open without a thread: {state}")

    def pss(self) -> int:
        """Return the bytes of its memory, its share of what it shares."""
        text = Path(f"/proc/{self._pid}/smaps_rollup").read_text()
        return int(text.partition("\nPss:")[2].split()[0]) * 1024

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self._pid}/task"))

    def ask(self, seconds: float) -> list[float]:
        """Make ordinary requests for so long; return the seconds of each."""
        found = []
        for _, pause in pauses(round(seconds * ASKED), ASKED):
            time.sleep(pause)
            began = time.monotonic()
            self.get("/")
            found.append(time.monotonic() - began)
        return found


@contextmanager
def serving(line: Line) -> Iterator[Running]:
    """Start a server on a socket of ours, for as long as the block runs."""
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as listener:
        fd = listener.fileno()
        command = [part.format(fd=fd) for part in line.command]
        child = subprocess.Popen([sys.executable, *command], pass_fds=[fd])
        with ended(child):
            yield Running(listener.getsockname()[1])


@dataclass(frozen=True)
class Found:
    """What was measured of one line: CPU times in µs, other times in ms."""

    opening: float  # CPU time by stream
    first_p50: float  # from connect() to the first event
    first_p99: float
    cost: float  # CPU time by event
    p50: float
    p99: float
    arrived: float  # of the events that a second's pace makes
    memory: float  # kB by stream
    threads: float
    ordinary: float  # the median
    longest: float
    leave: float


def measure(line: Line, count: int, window: float) -> Found:
    path = f"/{line.kind}"
    with serving(line) as running:
        with Clients(running.port, path) as clients:  # imports what is imported late
            clients.meet(FIRST)
            clients.leave()
        running.await_ends(FIRST)
        empty, closed = running.pss(), running.cpu()
        with Clients(running.port, path) as clients:
            met = clients.meet(count)
            opened = running.cpu()
            running.check_open(count, is_ours=line.name == OUR_NAME)
            full = running.pss()
            clients.stay(SETTLE, lambda: None)  # what that has held up comes now
            began = running.cpu()
            stayed = clients.stay(window, lambda: None)
            costs = running.cpu() - began
            asked: list[float] = []
            seconds = window / 2
            clients.stay(seconds, lambda: asked.extend(running.ask(seconds)))
            threads = running.threads()
            left = clients.leave()
            last = running.await_ends(FIRST + count)
    return Found(
        opening=(opened - closed) / count * 1e6,
        first_p50=met.p50 * 1e3,
        first_p99=met.p99 * 1e3,
        cost=costs / stayed.deliveries * 1e6,
        p50=stayed.p50 * 1e3,
        p99=stayed.p99 * 1e3,
        arrived=stayed.deliveries / (count * window),
        memory=(full - empty) / count / 1000,
        threads=threads,
        ordinary=statistics.median(asked) * 1e3,
        longest=max(asked) * 1e3,
        leave=(last - left) * 1e3,
    )


# What is printed.


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="50 sources, once")
    is_quick = parser.parse_args().quick
    # So that the servers are stopped then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    began = time.monotonic()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    packages = "flask", "gunicorn", "orjson", "starlette", "sse-starlette", "uvicorn"
    print(describe(*packages, "h11", "uvloop", "httptools"), flush=True)
    count, window = (QUICK_COUNT, QUICK_WINDOW) if is_quick else (COUNT, WINDOW)
    count = min(count, hard - FILES)
    lines = [OURS, STARLETTE] if is_quick else [*LINES]
    found: dict[Line, list[Found]] = {line: [] for line in lines}
    for number in range(1 if is_quick else ROUNDS):
        for line in lines if number % 2 == 0 else reversed(lines):
            found[line].append(measure(line, count, window))
    table(found, count, window)
    goals(found)
    print(f"\n{time.monotonic() - began:.0f} s")


def median(rounds: list[Found], name: str) -> float:
    return float(statistics.median(getattr(one, name) for one in rounds))


def ratio(mine: list[Found], theirs: list[Found], name: str) -> float:
    """Return the median of the rounds' ratios."""
    return statistics.median(
        float(getattr(a, name) / getattr(b, name))
        for a, b in zip(mine, theirs, strict=True)
    )


def table(found: dict[Line, list[Found]], count: int, window: float) -> None:
    print(
        f"\n{count:,} asynchronous sources, one event a second each, {window:g} s\n\n"
        "| | on | source | CPU µs an event | / base | PSS kB a stream | / base"
        " | CPU µs to open | / base | first event: p50 ms | p99 ms | latency: p50 ms"
        " | p99 ms | arrived | threads | ordinary request: median ms | longest ms"
        " | leave: ms |\n|---|---|---|" + "---:|" * 15
    )
    for line, rounds in found.items():
        base = found[LINES[line]]
        one = Found(*(median(rounds, field.name) for field in fields(Found)))
        print(
            f"| {line.name} | {line.on} | {line.kind}"
            f" | {one.cost:.1f} | {ratio(rounds, base, 'cost'):.2f}"
            f" | {one.memory:.1f} | {ratio(rounds, base, 'memory'):.2f}"
            f" | {one.opening:.0f} | {ratio(rounds, base, 'opening'):.2f}"
            f" | {one.first_p50:.1f} | {one.first_p99:.1f}"
            f" | {one.p50:.2f} | {one.p99:.1f} | {one.arrived:.2%} | {one.threads:g}"
            f" | {one.ordinary:.1f} | {one.longest:.1f} | {one.leave:.0f} |"
        )
    print(flush=True)


def goals(found: dict[Line, list[Found]]) -> None:
    for line, rounds in found.items():
        if line.name != OUR_NAME:
            continue
        base = LINES[line]
        for what, name, goal in (
            ("CPU time an event", "cost", COST_GOAL),
            ("memory a stream", "memory", MEMORY_GOAL),
        ):
            share = ratio(rounds, found[base], name)
            say(
                share <= goal,
                f"{line.kind}: {share:.2f} of {base.name}'s {what}, goal {goal:g}",
            )
        threads = max(one.threads for one in rounds)
        asked = median(rounds, "ordinary")
        arrived = min(one.arrived for one in rounds)
        say(
            threads <= THREADS_GOAL,
            f"{line.kind}: {threads} threads, the worker's included,"
            f" goal {THREADS_GOAL}",
        )
        say(
            asked < ASK_GOAL,
            f"{line.kind}: an ordinary request in {asked:.1f} ms, goal {ASK_GOAL:g}",
        )
        say(
            arrived >= ARRIVED_GOAL,
            f"{line.kind}: {arrived:.2%} of the events arrived in time, all in order,"
            f" goal {ARRIVED_GOAL:.0%}",
        )


def say(is_met: bool, text: str) -> None:
    print(f"{verdict(is_met):11} {text}", flush=True)


if __name__ == "__main__":
    main()
