"""What does an event cost that goes to all subscribers of a channel?

    python -m benchmarks.fanout [--quick] [--chart FILE.svg]

In the repository's folder, with a C compiler and ``pip install flask gunicorn gevent
sse-starlette uvicorn uvloop httptools``; Linux only. About 10 minutes; --quick, with
1,000 subscribers once, one and a half.

100, 1,000 and 4,000 clients subscribe to one channel of one process: a Flask view
that returns ``SSEResponse(hub.subscribe(...), handover=False)``, so that each client
keeps its greenlet (benchmarks/handover.py has the other way); the Flask view that is
in every tutorial, with a `queue.Queue` for each client, on the same gunicorn gevent
worker; and the same with `asyncio.Queue` by sse-starlette on uvicorn. Then 200 under
gunicorn's gthread worker. 200 events of 120 bytes are published at once (*burst*),
and then 200 one by one (*paced*: 50 a second, 5 for 4,000 clients), so that hardly
anything can be put together. The CPU time is the worker's, system time and all its
threads, as it reads it itself, by delivered event. Events a second count from the
first event's time to the last delivery; latency is that of paced events. Every
client must have got every event. *Events a read*: how many paced ones came in one
piece. It is 1 where a server keeps up; where it does not, it saves itself work, and
its CPU time an event looks better.

Each server is started anew for each line, in turns, three times over; the table has
medians. The clients are a program in C, clients.c.
"""

from __future__ import annotations

import argparse
import ast
import os
import queue
import resource
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

from syncstream import Hub, SSEResponse

from .chart import MINE, THEIRS, THEIRS_TOO, Bar, bars
from .clients import Came, Clients, ended, pauses, payload
from .machine import describe, verdict

if TYPE_CHECKING:
    from flask import Flask

Address = tuple[str, int]
State = dict[str, Any]

COUNTS, THREADS, FIRST, ROUNDS = (100, 1_000, 4_000), 200, 50, 3
EVENTS, SIZE, TIMEOUT = 200, 120, 90.0
RATE, SLOW_RATE = 50, 5  # events a second
BURST_GOAL, PACED_GOAL, ASYNC_GOAL, THREAD_GOAL = 1 / 20, 1.0, 0.5, 0.7

GUNICORN = (
    *("-m", "gunicorn", "-w", "1", "--worker-connections", "5000", "-b", "fd://{fd}"),
    *("--graceful-timeout", "1", "--log-level", "error", "--no-control-socket"),
)
GEVENT = (*GUNICORN, "-k", "gevent")
GTHREAD = (*GUNICORN, "-k", "gthread", "--threads", str(THREADS + 10))
UVICORN = ("-m", "uvicorn", "--fd", "{fd}", "--factory", "--log-level", "error")
OURS, PLAIN, ASYNC = "syncstream", "Flask, a queue each", "sse-starlette"
SERVERS = {
    (OURS, "gevent"): (*GEVENT, "benchmarks.fanout:ours()"),
    (PLAIN, "gevent"): (*GEVENT, "benchmarks.fanout:plain()"),
    (ASYNC, "uvicorn"): (*UVICORN, "benchmarks.fanout:asynchronous"),
    (OURS, "gthread"): (*GTHREAD, "benchmarks.fanout:ours()"),
    (PLAIN, "gthread"): (*GTHREAD, "benchmarks.fanout:plain()"),
}
Server = tuple[str, str]


# The servers' side.


def state(subscribers: int) -> str:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    rss = pages * os.sysconf("SC_PAGE_SIZE")
    return repr({"cpu": time.process_time(), "rss": rss, "subscribers": subscribers})


def ours() -> Flask:
    from flask import Flask, request

    app, hub = Flask(__name__), Hub()

    @app.get("/events")
    def events() -> Any:
        return SSEResponse(hub.subscribe("all"), handover=False)

    @app.post("/publish")
    def publish() -> str:
        for n, pause in pauses(EVENTS, float(request.args["rate"])):
            if pause:
                time.sleep(pause)
            hub.publish("all", payload(n, SIZE))
        return "ok"

    @app.get("/state")
    def get_state() -> str:
        return state(hub.stats()["subscribers"])

    return app


def plain() -> Flask:
    from flask import Flask, Response, request

    app = Flask(__name__)
    queues: set[queue.Queue[str]] = set()

    @app.get("/events")
    def events() -> Response:
        def generate() -> Iterator[str]:
            mine: queue.Queue[str] = queue.Queue()
            queues.add(mine)
            try:
                yield ": ok\n\n"
                while True:
                    yield f"data: {mine.get()}\n\n"
            finally:
                queues.discard(mine)

        return Response(generate(), mimetype="text/event-stream")

    @app.post("/publish")
    def publish() -> str:
        for n, pause in pauses(EVENTS, float(request.args["rate"])):
            if pause:
                time.sleep(pause)
            data = payload(n, SIZE)
            for one in list(queues):
                one.put(data)
        return "ok"

    @app.get("/state")
    def get_state() -> str:
        return state(len(queues))

    return app


def asynchronous() -> Any:
    import asyncio

    from sse_starlette import EventSourceResponse
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import Route

    queues: set[asyncio.Queue[str]] = set()

    async def events(request: Request) -> Response:
        async def generate() -> AsyncIterator[dict[str, str]]:
            mine: asyncio.Queue[str] = asyncio.Queue()
            queues.add(mine)
            try:
                yield {"comment": "ok"}
                while True:
                    yield {"data": await mine.get()}
            finally:
                queues.discard(mine)

        return EventSourceResponse(generate())

    async def publish(request: Request) -> Response:
        for n, pause in pauses(EVENTS, float(request.query_params["rate"])):
            if pause:
                await asyncio.sleep(pause)
            data = payload(n, SIZE)
            for one in list(queues):
                one.put_nowait(data)
        return PlainTextResponse("ok")

    async def get_state(request: Request) -> Response:
        return PlainTextResponse(state(len(queues)))

    return Starlette(
        routes=[
            Route("/events", events),
            Route("/publish", publish, methods=["POST"]),
            Route("/state", get_state),
        ]
    )


# The clients' side.


@contextmanager
def serving(server: Server) -> Iterator[Address]:
    """Start a server on a socket of ours, for as long as the block runs."""
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as listener:
        fd = listener.fileno()
        command = [part.format(fd=fd) for part in SERVERS[server]]
        process = subprocess.Popen([sys.executable, *command], pass_fds=[fd])
        with ended(process):
            yield listener.getsockname()


def ask(address: Address) -> State:
    """Return the worker's `state`."""
    with urlopen(f"http://{address[0]}:{address[1]}/state", timeout=TIMEOUT) as answer:
        found: State = ast.literal_eval(answer.read().decode())
    return found


def await_subscribers(address: Address, count: int) -> State:
    deadline = time.monotonic() + TIMEOUT
    while (now := ask(address))["subscribers"] != count:
        assert time.monotonic() < deadline, f"{now['subscribers']}, not {count}"
        time.sleep(0.1)
    return now


def publish(address: Address, clients: Clients, rate: float) -> Came:
    """Have the server publish; return what came."""
    with socket.create_connection(address, TIMEOUT) as publisher:
        request = (
            f"POST /publish?rate={rate} HTTP/1.1\r\nHost: localhost\r\n"
            "Content-Length: 0\r\nConnection: close\r\n\r\n"
        )
        came = clients.collect(EVENTS, lambda: publisher.sendall(request.encode()))
        assert b" 200 " in publisher.recv(1000)
    return came


@dataclass(frozen=True)
class Found:
    """One line of the table."""

    burst_rate: float  # delivered events a second
    burst: float  # µs of CPU time a delivered event
    paced: float  # the same
    joined: float  # paced events by a read: 1, where the server keeps up
    p50: float  # ms
    p99: float
    rss: float  # kB a subscriber


def measure(server: Server, count: int) -> Found:
    with serving(server) as address:
        with Clients(address[1]) as clients:
            clients.come(FIRST)
            await_subscribers(address, FIRST)  # the head comes before that
            for _ in range(2):
                publish(address, clients, 0)
        if server[0] == PLAIN:  # whose generators do not learn that a client leaves
            _flush(address)
        await_subscribers(address, 0)
        before = ask(address)
        with Clients(address[1]) as clients:
            clients.come(count)
            full = await_subscribers(address, count)
            burst = publish(address, clients, 0)
            after_burst = ask(address)
            paced = publish(address, clients, SLOW_RATE if count > 1000 else RATE)
            after = ask(address)
    events = count * EVENTS
    return Found(
        burst_rate=events / burst.seconds,
        burst=(after_burst["cpu"] - full["cpu"]) / events * 1e6,
        paced=(after["cpu"] - after_burst["cpu"]) / events * 1e6,
        joined=events / paced.reads,
        p50=paced.p50 * 1e3,
        p99=paced.p99 * 1e3,
        rss=(full["rss"] - before["rss"]) / count / 1000,
    )


def _flush(address: Address) -> None:
    """Publish until those that have gone are found out."""
    url = f"http://{address[0]}:{address[1]}/publish?rate=0"
    for _ in range(10):
        with urlopen(url, b"", timeout=TIMEOUT):
            if not ask(address)["subscribers"]:
                return
    raise AssertionError("clients that have left are still there")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1,000 clients, once")
    parser.add_argument("--chart", type=Path, help="write a chart to this SVG file")
    options = parser.parse_args()
    # So that the servers are stopped then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 10_000)), hard))
    packages = "flask", "gunicorn", "gevent", "sse-starlette", "uvicorn", "uvloop"
    print(describe(*packages, "httptools"), flush=True)
    counts = (1_000,) if options.quick else COUNTS
    lines = [(s, n) for n in counts for s in SERVERS if s[1] != "gthread"]
    lines += [(s, THREADS) for s in SERVERS if s[1] == "gthread"]
    found: dict[tuple[Server, int], list[Found]] = {line: [] for line in lines}
    for _ in range(1 if options.quick else ROUNDS):
        for server, count in lines:
            found[server, count].append(measure(server, count))
    medians = {line: median(rounds) for line, rounds in found.items()}
    table(medians)
    goals(medians)
    if options.chart is not None:
        options.chart.write_text(chart(medians))


def median(rounds: list[Found]) -> Found:
    names = [field.name for field in fields(Found)]
    return Found(
        *(statistics.median(getattr(one, name) for one in rounds) for name in names)
    )


def table(found: dict[tuple[Server, int], Found]) -> None:
    print(
        "\n| | on | clients | burst: events/s | CPU µs an event"
        " | paced: CPU µs an event | events a read | p50 ms | p99 ms"
        " | RSS a client, kB |"
    )
    print("|---|---|" + "---:|" * 8)
    for ((name, on), count), one in found.items():
        print(
            f"| {name} | {on} | {count:,} | {one.burst_rate:,.0f} | {one.burst:.2f}"
            f" | {one.paced:.1f} | {one.joined:.2f} | {one.p50:.1f} | {one.p99:.1f}"
            f" | {one.rss:.1f} |"
        )
    print()


def goals(found: dict[tuple[Server, int], Found]) -> None:
    mine = found[(OURS, "gevent"), 1000]
    theirs = found[(PLAIN, "gevent"), 1000]
    other = found[(ASYNC, "uvicorn"), 1000]
    threads = found[(OURS, "gthread"), THREADS]
    their_threads = found[(PLAIN, "gthread"), THREADS]
    for label, cost, rival, goal in (
        (f"1,000, burst, of {PLAIN}", mine.burst, theirs.burst, BURST_GOAL),
        (f"1,000, paced, of {PLAIN}", mine.paced, theirs.paced, PACED_GOAL),
        (f"1,000, paced, of {ASYNC}", mine.paced, other.paced, ASYNC_GOAL),
        ("gthread, burst, of the same", threads.burst, their_threads.burst, None),
        ("gthread, paced, of the same", threads.paced, their_threads.paced, None),
    ):
        limit = THREAD_GOAL if goal is None else goal
        ratio = cost / rival
        print(
            f"{verdict(ratio <= limit):11} {label}: {ratio:.3f} of its CPU time,"
            f" goal {limit:g}"
        )


def chart(found: dict[tuple[Server, int], Found]) -> str:
    """Draw CPU µs by delivered event, those of 1,000 clients."""
    colours = {OURS: MINE, PLAIN: THEIRS, ASYNC: THEIRS_TOO}
    lines = [(server, one) for (server, count), one in found.items() if count == 1000]
    kinds = {f"{EVENTS} events at once": "burst", f"{RATE} events/s": "paced"}
    groups = {
        heading: [
            Bar(name, on, getattr(one, kind), colours[name])
            for (name, on), one in lines
        ]
        for heading, kind in kinds.items()
    }
    title = "CPU time of a delivered event, 1,000 subscribers, one worker"
    return bars(title, groups)


if __name__ == "__main__":
    main()
