"""Does a client that hardly reads cost those anything that do?

    python -m benchmarks.slow_reader [--rounds N] [--events N]

In the repository's folder, with ``pip install gunicorn gevent``; Linux only. About
6 minutes.

200 clients subscribe to one channel of one process under gunicorn's gevent, then its
gthread worker. 200 events of 1,000 bytes are published, 20 a second; each client's
latency is measured for each event. Then the same once more, in the same server, with
one more client that reads one byte a second. Such pairs are repeated, and which comes
first takes turns; the ratio is that of the medians of the 99th percentiles. At the end
20 MB flow past the slow client and 20 of the others, at 1 MB/s, and the server's memory
is what it was before.

The client is this process, by one epoll.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import select
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from syncstream import Hub, SSEResponse, StreamMiddleware

from .machine import describe, verdict

CLIENTS, EVENTS, RATE, SIZE, ROUNDS = 200, 200, 20, 1000, 7
# Events, bytes each, events before, a second; and those that read them.
FLOW, FLOW_SIZE, WARM, FLOW_RATE, READERS = 2_000, 10_000, 1_200, 100, 20
GOAL, GROWTH, TIMEOUT = 1.2, 5_000_000, 60.0
TIME = re.compile(rb'"t":(\d+),')
SERVERS = {"gevent": (), "gthread": ("--threads", str(CLIENTS + 20))}

Address = tuple[str, int]


# The server's side.


def create_app() -> Any:
    hub = Hub()

    def publish(count: int, size: int, rate: float) -> str:
        start = time.monotonic()
        for n in range(count):
            time.sleep(max(0.0, start + n / rate - time.monotonic()) if rate else 0)
            hub.publish("all", f'{{"t":{time.monotonic_ns()},"p":"{"x" * size}"}}')
        return "ok"

    def state() -> str:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        rss = pages * os.sysconf("SC_PAGE_SIZE")
        return repr({"rss": rss, "subscribers": hub.stats()["subscribers"]})

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        _, kind, *words = environ["PATH_INFO"].split("/")
        if kind == "events":
            # Nobody is dropped: the slow one is to stay.
            response = SSEResponse(hub.subscribe("all"), send_timeout=None)
            return response(environ, start_response)
        text = state() if kind == "state" else publish(*map(int, words))
        start_response("200 OK", [("Content-Length", str(len(text)))])
        return [text.encode()]

    return StreamMiddleware(app)


# The clients' side.


@contextmanager
def serving(worker: str) -> Iterator[Address]:
    """Start a server on a socket of ours, for as long as the block runs."""
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as listener:
        command = [
            *(sys.executable, "-m", "gunicorn", "-w", "1", "-k", worker),
            *("-b", f"fd://{listener.fileno()}", "--graceful-timeout", "1"),
            *("--log-level", "error", "--no-control-socket", *SERVERS[worker]),
            "benchmarks.slow_reader:create_app()",
        ]
        process = subprocess.Popen(
            command,
            pass_fds=[listener.fileno()],
            # With one for each thread malloc grows by 7 MB without a slow one, too.
            env={**os.environ, "MALLOC_ARENA_MAX": "1"},
        )
        try:
            yield listener.getsockname()
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def ask(address: Address, path: str) -> str:
    with urlopen(f"http://{address[0]}:{address[1]}{path}", timeout=TIMEOUT) as answer:
        text: str = answer.read().decode()
    return text


def state(address: Address) -> dict[str, int]:
    found: dict[str, int] = ast.literal_eval(ask(address, "/state"))
    return found


def await_subscribers(address: Address, count: int) -> int:
    """Wait for so many; return the server's memory."""
    deadline = time.monotonic() + TIMEOUT
    while (now := state(address))["subscribers"] != count:
        assert time.monotonic() < deadline, f"{now['subscribers']}, not {count}"
        time.sleep(0.05)
    return now["rss"]


def subscribe(address: Address, room: int | None = None) -> socket.socket:
    client = socket.socket()
    if room is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    client.settimeout(TIMEOUT)
    client.connect(address)
    client.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    head = b""
    while b": ok" not in head:
        head += client.recv(1)
    return client


class Clients:
    """Those that read, and maybe the one that does not."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._epoll = select.epoll()
        self._healthy: dict[int, socket.socket] = {}
        for _ in range(CLIENTS):
            client = subscribe(address)
            self._healthy[client.fileno()] = client
            self._epoll.register(client, select.EPOLLIN)
        self._slow: socket.socket | None = None
        self._bites = 0
        self._bite_at = 0.0

    def have_slow(self, is_wanted: bool) -> None:
        if self._slow is not None:
            self._slow.close()
            self._slow = None
        if is_wanted:
            self._slow = subscribe(self._address, room=4096)
        await_subscribers(self._address, len(self._healthy) + is_wanted)

    def leave(self, count: int) -> None:
        """Let all but so many healthy ones leave."""
        while len(self._healthy) > count:
            self._healthy.popitem()[1].close()

    def publish(self, count: int, size: int, rate: int) -> list[int]:
        """Have the server publish; return all latencies, nanoseconds, sorted."""
        left = dict.fromkeys(self._healthy, count)
        tails: dict[int, bytes] = {}
        latencies: list[int] = []
        deadline = time.monotonic() + TIMEOUT + (count / rate if rate else 0)
        with socket.create_connection(self._address, TIMEOUT) as publisher:
            publisher.sendall(
                f"GET /publish/{count}/{size}/{rate} HTTP/1.1\r\nHost: localhost\r\n"
                "Connection: close\r\n\r\n".encode()
            )
            while left:
                assert time.monotonic() < deadline, f"{len(left)} wait in vain"
                self._bite()
                for fd, _ in self._epoll.poll(0.5):
                    data = self._healthy[fd].recv(1 << 18)
                    now = time.monotonic_ns()
                    assert data, "a stream has ended"
                    assert b"event: reset" not in data, "a healthy client has lagged"
                    data = tails.pop(fd, b"") + data
                    end = data.rfind(b"}") + 1
                    tails[fd] = data[end:]
                    times = [*map(int, TIME.findall(data[:end]))]
                    latencies += [now - at for at in times]
                    left[fd] -= len(times)
                    assert left[fd] >= 0, "an event came twice"
                    if not left[fd]:
                        del left[fd]
            assert b" 200 " in publisher.recv(1000)
        return sorted(latencies)

    def _bite(self) -> None:
        """Let the slow one read its byte of each second."""
        now = time.monotonic()
        if self._slow is not None and now >= self._bite_at:
            self._bite_at = now + 1
            self._bites += len(self._slow.recv(1))

    def close(self) -> None:
        for client in (*self._healthy.values(), *filter(None, [self._slow])):
            client.close()
        self._epoll.close()


def p99(latencies: list[int]) -> float:
    """Return milliseconds."""
    return latencies[len(latencies) * 99 // 100] / 1e6


def measure(worker: str, rounds: int, events: int) -> bool:
    found: dict[bool, list[float]] = {False: [], True: []}
    with serving(worker) as address, closing(Clients(address)) as clients:
        await_subscribers(address, CLIENTS)
        clients.publish(events, SIZE, RATE)
        for number in range(rounds):
            for has_slow in (True, False) if number % 2 else (False, True):
                clients.have_slow(has_slow)
                found[has_slow].append(p99(clients.publish(events, SIZE, RATE)))
        clients.leave(READERS)
        clients.have_slow(True)
        clients.publish(WARM, FLOW_SIZE, FLOW_RATE)  # what is kept is full then
        before = await_subscribers(address, READERS + 1)
        clients.publish(FLOW, FLOW_SIZE, FLOW_RATE)
        growth = await_subscribers(address, READERS + 1) - before
    without, with_slow = (statistics.median(found[key]) for key in (False, True))
    ratio = with_slow / without
    spread = " ".join(f"{b / a:.2f}" for a, b in zip(*found.values(), strict=True))
    print(
        f"| {worker} | {without:.1f} | {with_slow:.1f} | {ratio:.2f} | {spread}"
        f" | {growth / 1e6:+.1f} |",
        flush=True,
    )
    return ratio <= GOAL and growth < GROWTH


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="pairs of runs")
    parser.add_argument("--events", type=int, default=EVENTS, help="of each run")
    options = parser.parse_args()
    # So that the servers are stopped then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    print(describe("gunicorn", "gevent"))
    print(
        f"\n{CLIENTS} clients, {RATE} events/s of {SIZE:,} bytes, {options.rounds}"
        f" pairs of {options.events} events; then {FLOW * FLOW_SIZE / 1e6:.0f} MB\n\n"
        "| worker | p99 without it, ms | with it, ms | ratio | of each pair"
        " | server's memory, MB |\n|---|---:|---:|---:|---|---:|",
        flush=True,
    )
    met = {
        worker: measure(worker, options.rounds, options.events) for worker in SERVERS
    }
    print()
    for worker, is_met in met.items():
        print(
            f"{verdict(is_met):11} {worker}: {GOAL} times the p99 at most, and no"
            f" {GROWTH / 1e6:.0f} MB more"
        )
    return 0 if all(met.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
