"""What do 2,000 streams cost a worker while nothing happens on them?

    python -m benchmarks.idle [--quick]

In the repository's folder, with ``pip install gunicorn gevent``; Linux only. About
4 minutes; --quick, with 200 streams, about one and a half.

One ``gunicorn -k gevent --worker-connections 2500`` worker. Its generators yield once
and sleep for an hour: bare WSGI generators with gevent's own sleep (the floor: what
gunicorn and gevent take), and `SSEResponse` with ``keepalive=None`` and with the
default of 15 s. A fresh server each time. Once all streams are open, and have been
for a second, the worker's CPU time (system time and all its threads, as it reads it
itself) is taken before and after a minute: four keepalives for each stream. The
client is this process, by one epoll, and counts the keepalives. Memory is the growth
of RSS from 50 streams, opened and closed before, to all of them, with the garbage
collected; what the kernel holds for a socket is not in it.

Then 500 clients leave at once, and then all the others: from the first close() to the
last `finally`, by the clock that both ends read. (The floor's generators would never
know.)
"""

from __future__ import annotations

import argparse
import ast
import gc
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

from syncstream import SSEResponse, sleep
from syncstream.process import stats

from .machine import describe, verdict

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

Address = tuple[str, int]
State = dict[str, Any]

COUNT, QUICK, FIRST = 2_000, 200, 50
WINDOW, QUICK_WINDOW = 60.0, 15.0  # seconds; whole multiples of the keepalive
FLOOR, OFF, ON = "bare generators", "keepalive=None", "keepalive=15"
PATHS = {FLOOR: "/bare", OFF: "/ours?None", ON: "/ours?15"}
CPU_TARGET = 0.5  # per cent of one CPU, of the watch, without keepalives
LEAVE_TARGET = 1.0  # seconds
TIMEOUT = 30.0
KEEPALIVE = b": keepalive\n\n"

ended: list[float] = []


# The server's side.


def waiting(item: Any) -> Iterator[Any]:
    try:
        yield item
        sleep(3600)  # outside of a stream: gevent's own
    finally:
        ended.append(time.monotonic())


def app(environ: WSGIEnvironment, start_response: StartResponse) -> Any:
    path, query = environ["PATH_INFO"], environ["QUERY_STRING"]
    if path == "/ours":
        keepalive = None if query == "None" else float(query)
        response = SSEResponse(waiting("waiting"), keepalive=keepalive)
        return response(environ, start_response)
    if path == "/bare":
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        return waiting(b": ok\n\ndata: waiting\n\n")
    body = repr(state()).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


def state() -> State:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "cpu": time.process_time(),
        "now": time.monotonic(),
        "rss": pages * os.sysconf("SC_PAGE_SIZE"),
        "threads": len(os.listdir("/proc/self/task")),
        "fds": len(os.listdir("/proc/self/fd")),
        "open": stats()["open"],
        "ended": len(ended),
        "last": max(ended, default=0.0),
    }


# The clients' side.


@contextmanager
def serving() -> Iterator[Address]:
    """Start gunicorn on a socket of ours, for as long as the block runs."""
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as listener:
        fd = listener.fileno()
        command = [
            *(sys.executable, "-m", "gunicorn", "-k", "gevent", "-w", "1"),
            *("--worker-connections", "2500", "--graceful-timeout", "1"),
            *("-b", f"fd://{fd}", "--log-level", "warning", "--no-control-socket"),
            f"{__spec__.parent}.idle:app",
        ]
        server = subprocess.Popen(command, pass_fds=[fd])
        try:
            yield listener.getsockname()
        finally:
            server.terminate()
            server.wait(TIMEOUT)


def ask(address: Address) -> State:
    """Return the worker's `state`."""
    with urlopen(f"http://{address[0]}:{address[1]}/state", timeout=TIMEOUT) as answer:
        found: State = ast.literal_eval(answer.read().decode())
    return found


def await_ends(address: Address, count: int) -> float:
    """Wait until so many generators have ended; return when the last one did."""
    deadline = time.monotonic() + TIMEOUT
    while (now := ask(address))["ended"] < count:
        assert time.monotonic() < deadline, f"{now['ended']} of {count} have ended"
        time.sleep(0.1)
    return float(now["last"])


class Clients:
    """Open streams, and what comes by them."""

    def __init__(self, address: Address, path: str) -> None:
        self._address = address
        self._ask = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        self._epoll = select.epoll()
        self._sockets: dict[int, socket.socket] = {}
        self.keepalives = 0

    def come(self, count: int) -> None:
        """Open so many streams, a hundred at a time."""
        while count:
            news: set[int] = set()
            for _ in range(min(100, count)):
                client = socket.create_connection(self._address, TIMEOUT)
                client.sendall(self._ask)
                self._sockets[client.fileno()] = client
                self._epoll.register(client, select.EPOLLIN)
                news.add(client.fileno())
            count -= len(news)
            deadline = time.monotonic() + TIMEOUT
            while news:
                assert time.monotonic() < deadline, f"{len(news)} wait in vain"
                for fd, data in self._read(1):
                    if b"data: waiting" in data:
                        news.discard(fd)

    def stay(self, seconds: float) -> None:
        """Read what comes for so long."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            for _, data in self._read(left):
                self.keepalives += data.count(KEEPALIVE)

    def _read(self, timeout: float) -> Iterator[tuple[int, bytes]]:
        for fd, _ in self._epoll.poll(timeout):
            data = self._sockets[fd].recv(65536)
            assert data, "a stream has ended"
            yield fd, data

    def leave(self, count: int | None = None) -> float:
        """Close so many, or all; return when it began."""
        fds = list(self._sockets)[:count]
        now = time.monotonic()
        for fd in fds:
            self._sockets.pop(fd).close()
        return now

    def close(self) -> None:
        self.leave()
        self._epoll.close()


@dataclass(frozen=True)
class Found:
    """What has been measured of one kind of stream."""

    cpu: float  # seconds a second
    keepalives: float  # a second
    before: State
    full: State
    after: State
    left: tuple[float, float] | None  # seconds: a quarter of them, then the rest


def measure(path: str, count: int, window: float) -> Found:
    is_bare = path == PATHS[FLOOR]
    with serving() as address, closing(Clients(address, path)) as clients:
        clients.come(FIRST)
        clients.leave()
        if not is_bare:
            await_ends(address, FIRST)
        before = ask(address)
        clients.come(count)
        clients.stay(1)
        full = ask(address)
        clients.keepalives = 0
        clients.stay(window)
        now = ask(address)
        seconds = now["now"] - full["now"]
        left = None
        if not is_bare:
            quarter = count // 4
            since = clients.leave(quarter)
            some = await_ends(address, FIRST + quarter) - since
            since = clients.leave()
            left = some, await_ends(address, FIRST + count) - since
        return Found(
            cpu=(now["cpu"] - full["cpu"]) / seconds,
            keepalives=clients.keepalives / seconds,
            before=before,
            full=now,
            after=ask(address),
            left=left,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="200 streams, 15 s")
    is_quick = parser.parse_args().quick
    # So that the servers are stopped then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count, window = (QUICK, QUICK_WINDOW) if is_quick else (COUNT, WINDOW)
    if soft < count + 500:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, count + 500), hard))
    print(describe("gunicorn", "gevent"), flush=True)
    found = {name: measure(path, count, window) for name, path in PATHS.items()}
    table(found, count, window)


def table(found: dict[str, Found], count: int, window: float) -> None:
    print(f"\n{count:,} streams, idle for {window:g} s\n")
    print(f"| | {' | '.join(found)} |")
    print("|---|" + "---:|" * len(found))
    every = list(found.values())
    rows = {
        "CPU, % of one": [f"{100 * one.cpu:.2f}" for one in every],
        "keepalives a second": [f"{one.keepalives:.1f}" for one in every],
        "RSS a stream, kB": [
            f"{(one.full['rss'] - one.before['rss']) / count / 1000:.1f}"
            for one in every
        ],
        "RSS, MB, before → full": [
            f"{one.before['rss'] / 1e6:.1f} → {one.full['rss'] / 1e6:.1f}"
            for one in every
        ],
        f"the {count // 4:,} that leave at once, s": [
            "" if one.left is None else f"{one.left[0]:.3f}" for one in every
        ],
        "then the rest, s": [
            "" if one.left is None else f"{one.left[1]:.3f}" for one in every
        ],
    }
    for name in ("threads", "fds", "open"):
        rows[f"{name}, before → full → after"] = [
            f"{one.before[name]} → {one.full[name]} → {one.after[name]}"
            for one in every
        ]
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")
    floor, off, on = (found[name] for name in (FLOOR, OFF, ON))
    cost = (on.cpu - off.cpu) / on.keepalives
    watch = 100 * (off.cpu - floor.cpu)
    print(f"\na keepalive costs {cost * 1e6:.0f} µs of CPU time")
    print(
        f"{verdict(watch < CPU_TARGET):11} watching {count:,} idle streams takes"
        f" {watch:.2f} % of one CPU, target {CPU_TARGET} %"
    )
    for name in (OFF, ON):
        left = found[name].left
        assert left is not None
        print(
            f"{verdict(left[0] <= LEAVE_TARGET):11} {name}: {count // 4:,} that leave"
            f" at once have ended within {left[0]:.3f} s, target {LEAVE_TARGET:g} s"
        )


if __name__ == "__main__":
    main()
