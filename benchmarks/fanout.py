"""What does an event cost that goes to all subscribers of a channel?

    python -m benchmarks.fanout [--quick] [--chart FILE.svg]

In the repository's folder, with ``pip install flask gunicorn gevent sse-starlette
uvicorn uvloop httptools``; Linux only. About 10 minutes; --quick, with 1,000
subscribers once, one and a half.

100, 1,000 and 4,000 clients subscribe to one channel of one process: a Flask view
that returns ``SSEResponse(hub.subscribe(...), handover=False)``, so that each client
keeps its greenlet (benchmarks/handover.py has the other way); the Flask view that is
in every tutorial, with a `queue.Queue` for each client, on the same gunicorn gevent
worker; and the same with `asyncio.Queue` by sse-starlette on uvicorn. Then 200 under
gunicorn's gthread worker. 200 events of 120 bytes are published at once (*burst*),
and then 200 one by one (*paced*: 20 a second, 5 for 4,000 clients), so that hardly
anything can be put together. The CPU time is the worker's, system time and all its
threads, as it reads it itself, by delivered event. Events a second count from the
first event's time to the last delivery; latency is that of paced events. Every
client must have got every event. *Events a read*: how many paced ones came in one
piece. It is 1 where a server keeps up; where it does not, it saves itself work, and
its CPU time an event looks better.

Each server is started anew for each line, in turns, three times over; the table has
medians. The client is this process, by one epoll.
"""

from __future__ import annotations

import argparse
import ast
import os
import queue
import re
import resource
import select
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

from syncstream import Hub, SSEResponse

from .machine import describe, verdict

if TYPE_CHECKING:
    from flask import Flask

Address = tuple[str, int]
State = dict[str, Any]

COUNTS, THREADS, FIRST, ROUNDS = (100, 1_000, 4_000), 200, 50, 3
EVENTS, SIZE, TIMEOUT = 200, 120, 90.0
BURST_GOAL, PACED_GOAL, ASYNC_GOAL, THREAD_GOAL = 1 / 20, 1.0, 0.5, 0.7
TIME = re.compile(rb'"t":(\d+),')

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


def payload(n: int) -> str:
    """Return an event's data, JSON with the time, of `SIZE` characters."""
    start = f'{{"n":{n},"t":{time.monotonic_ns()},"p":"'
    return start + "x" * (SIZE - len(start) - 2) + '"}'


def pauses(rate: float) -> Iterator[tuple[int, float]]:
    """Yield the number of each event, and for how long to sleep before it."""
    start = time.monotonic()
    for n in range(EVENTS):
        yield n, max(0.0, start + n / rate - time.monotonic()) if rate else 0.0


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
        for n, pause in pauses(float(request.args["rate"])):
            if pause:
                time.sleep(pause)
            hub.publish("all", payload(n))
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
        for n, pause in pauses(float(request.args["rate"])):
            if pause:
                time.sleep(pause)
            data = payload(n)
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
        for n, pause in pauses(float(request.query_params["rate"])):
            if pause:
                await asyncio.sleep(pause)
            data = payload(n)
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
        try:
            yield listener.getsockname()
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


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


@dataclass
class Came:
    """What has come by all streams.

    Attributes:
        latencies: Nanoseconds, of each delivered event.
        reads: In so many pieces it came.
        seconds: From the first event's time to the last delivery.
    """

    latencies: list[int]
    reads: int
    seconds: float


class Clients:
    """Open streams, and what comes by them."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._epoll = select.epoll()
        self._sockets: dict[int, socket.socket] = {}

    def come(self, count: int) -> None:
        """Subscribe so many, a hundred at a time."""
        while count:
            news: set[int] = set()
            for _ in range(min(100, count)):
                client = socket.create_connection(self._address, TIMEOUT)
                client.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
                self._sockets[client.fileno()] = client
                self._epoll.register(client, select.EPOLLIN)
                news.add(client.fileno())
            count -= len(news)
            deadline = time.monotonic() + TIMEOUT
            while news:
                assert time.monotonic() < deadline, f"{len(news)} wait in vain"
                for fd, _ in self._epoll.poll(1):
                    if b": ok" in self._sockets[fd].recv(65536):
                        news.discard(fd)

    def publish(self, rate: float) -> Came:
        """Have the server publish; return what came."""
        left = dict.fromkeys(self._sockets, EVENTS)
        tails: dict[int, bytes] = {}
        latencies: list[int] = []
        first = now = reads = 0
        deadline = time.monotonic() + TIMEOUT
        with socket.create_connection(self._address, TIMEOUT) as publisher:
            publisher.sendall(
                f"POST /publish?rate={rate} HTTP/1.1\r\nHost: localhost\r\n"
                "Content-Length: 0\r\nConnection: close\r\n\r\n".encode()
            )
            while left:
                assert time.monotonic() < deadline, f"{len(left)} wait in vain"
                for fd, _ in self._epoll.poll(1):
                    data = self._sockets[fd].recv(1 << 18)
                    now = time.monotonic_ns()
                    assert data, "a stream has ended"
                    data = tails.pop(fd, b"") + data
                    end = data.rfind(b"}") + 1
                    if data.find(b"{", end) >= 0:  # an event has begun
                        tails[fd], data = data[end:], data[:end]
                    times = [*map(int, TIME.findall(data))]
                    if not times:
                        continue  # a keepalive
                    reads += 1
                    first = first or times[0]
                    latencies += [now - at for at in times]
                    left[fd] -= len(times)
                    assert left[fd] >= 0, "an event came twice"
                    if not left[fd]:
                        del left[fd]
            assert b" 200 " in publisher.recv(1000)
        return Came(latencies, reads, (now - first) / 1e9)

    def close(self) -> None:
        for client in self._sockets.values():
            client.close()
        self._sockets.clear()
        self._epoll.close()


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
        with closing(Clients(address)) as clients:
            clients.come(FIRST)
            await_subscribers(address, FIRST)  # the head comes before that
            for _ in range(2):
                clients.publish(0)
        if server[0] != PLAIN:  # whose generators do not learn that a client leaves
            await_subscribers(address, 0)
        else:
            _flush(address)
        before = ask(address)
        with closing(Clients(address)) as clients:
            clients.come(count)
            full = await_subscribers(address, count)
            burst = clients.publish(0)
            after_burst = ask(address)
            paced = clients.publish(5 if count > 1000 else 20)
            after = ask(address)
    events = count * EVENTS
    latencies = sorted(paced.latencies)
    return Found(
        burst_rate=events / burst.seconds,
        burst=(after_burst["cpu"] - full["cpu"]) / events * 1e6,
        paced=(after["cpu"] - after_burst["cpu"]) / events * 1e6,
        joined=events / paced.reads,
        p50=latencies[len(latencies) // 2] / 1e6,
        p99=latencies[len(latencies) * 99 // 100] / 1e6,
        rss=(full["rss"] - before["rss"]) / count / 1000,
    )


def _flush(address: Address) -> None:
    """Publish until those that have gone are found out."""
    for _ in range(10):
        with closing(Clients(address)) as clients:
            clients.publish(0)
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
    """Draw CPU µs by delivered event as bars, those of 1,000 clients."""
    names = {OURS: "syncstream", PLAIN: "Flask, a queue each", ASYNC: "sse-starlette"}
    colours = {OURS: "#1a7f5a", PLAIN: "#8a8f98", ASYNC: "#b9bec6"}
    lines = [(s, one) for (s, count), one in found.items() if count == 1000]
    scale = 330 / max(max(one.burst, one.paced) for _, one in lines)
    parts: list[str] = []
    y = 52
    for title, kind in (("200 events at once", "burst"), ("20 events/s", "paced")):
        parts.append(f'<text x="20" y="{y}" font-weight="600">{title}</text>')
        for (name, on), one in lines:
            y += 26
            cost = getattr(one, kind)
            width = max(1.5, cost * scale)
            parts.append(
                f'<text x="210" y="{y}" text-anchor="end">{names[name]}'
                f'<tspan fill="#777"> {on}</tspan></text>'
                f'<rect x="220" y="{y - 13}" width="{width:.1f}" height="17" rx="2"'
                f' fill="{colours[name]}"/>'
                f'<text x="{228 + width:.1f}" y="{y}">{cost:.2g} µs</text>'
            )
        y += 42
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="640" height="{y - 20}"'
        f' viewBox="0 0 640 {y - 20}" font-family="system-ui, sans-serif"'
        ' font-size="13" fill="#222">\n<title>CPU time of a delivered event</title>\n'
        '<rect width="100%" height="100%" fill="#fff"/>\n'
        '<text x="20" y="26" font-size="15" font-weight="600">CPU time of a delivered'
        " event, 1,000 subscribers, one worker</text>\n"
        + "\n".join(parts)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    main()
