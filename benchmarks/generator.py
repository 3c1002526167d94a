"""What does one event of a generator cost the server, beyond a plain response?

    python -m benchmarks.generator [--quick]

In the repository's folder, with ``pip install flask gunicorn gevent``. About a minute;
--quick about 10 seconds.

Flask under gunicorn, its gevent worker and its gthread worker, one process. The same
generator's events, 120 bytes each on the wire, leave as ``SSEResponse`` (which gets
``str``) and as Flask's ``Response`` (which gets ready-made ``bytes``): the two are
routes of one server, and take turns, round by round. Once to one client, and once to
200 at once, where each generator lets the others run after every 20 events. The
client is this process, and only counts bytes. What is compared is the CPU time of the
server's process (system time and all its threads), as the server itself reads it
before and after; medians, and ratios the median of each round's own.

HTTP/1.1 is chunked; HTTP/1.0 (what nginx spoke to its upstreams until 1.29.7) is not.
"""

from __future__ import annotations

import argparse
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from flask import Flask, Response, request

from syncstream import SSEResponse

from .machine import describe, verdict

TEXT = f'{{"n":12345,"text":"{"x" * 92}"}}'  # 112 bytes, and 8 around it
EVENT = f"data: {TEXT}\n\n".encode()
CLIENTS, TURN = 200, 20
TARGET = 1.2
OURS, PLAIN = "syncstream", "plain"
WORKERS = {
    "gevent": ["-k", "gevent"],
    "gthread": ["-k", "gthread", "--threads", str(CLIENTS + 10)],
}

TIMEOUT = 30.0
PAUSE = 0.001
END = EVENT + b"\r\n0\r\n\r\n"

app = Flask(__name__)


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    worker: str
    version: str
    clients: int
    count: int


def events(item: Any) -> Iterator[Any]:
    """Yield the item as often as the query says: of both routes, the generator."""
    count, turn = int(request.args["n"]), int(request.args["turn"])
    return turns(item, count, turn) if turn else run(item, count)


def run(item: Any, count: int) -> Iterator[Any]:
    for _ in range(count):
        yield item


def turns(item: Any, count: int, turn: int) -> Iterator[Any]:
    for n in range(count):
        if n % turn == 0:
            time.sleep(0)  # gevent patches it
        yield item


@app.get(f"/{OURS}")
def ours() -> SSEResponse:
    return SSEResponse(events(TEXT))


@app.get(f"/{PLAIN}")
def plain() -> Response:
    return Response(events(EVENT), mimetype="text/event-stream")


@app.get("/cpu")
def cpu() -> str:
    return str(time.process_time())


@contextmanager
def serving(
    options: list[str], app: str = "generator:app"
) -> Iterator[tuple[str, int]]:
    """Start gunicorn on a socket of ours, for as long as the block runs.

    Args:
        options: gunicorn's.
        app: The module of this folder, and the name of the application in it.
    """
    with socket.create_server(("127.0.0.1", 0), backlog=2 * CLIENTS) as listener:
        fd = listener.fileno()
        command = [sys.executable, "-m", "gunicorn", *options, "-w", "1"]
        command += [
            "-b",
            f"fd://{fd}",
            "--log-level",
            "warning",
            "--graceful-timeout",
            "1",
        ]
        command += [f"{__spec__.parent}.{app}"]
        server = subprocess.Popen(command, pass_fds=[fd])
        try:
            yield listener.getsockname()
        finally:
            server.terminate()
            server.wait(10)


def get(
    address: tuple[str, int], path: str, clients: int = 1, version: str = "1.1"
) -> list[tuple[int, bytes]]:
    """Ask with so many clients at once; return how much each got, and the end of it."""
    ask = f"GET {path} HTTP/{version}\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    sizes: dict[Any, int] = {}
    tails: dict[Any, bytes] = {}
    buffer = memoryview(bytearray(256 * 1024))
    with selectors.DefaultSelector() as selector:
        for _ in range(clients):
            client = socket.create_connection(address, timeout=TIMEOUT)
            client.sendall(ask.encode())
            selector.register(client, selectors.EVENT_READ)
            sizes[client], tails[client] = 0, b""
        while selector.get_map():
            ready = selector.select(TIMEOUT)
            assert ready, f"nothing came for {TIMEOUT} seconds of {path}"
            # A client that sleeps in recv() is woken by each event, and the server
            # pays for that; over a network it does not.
            time.sleep(PAUSE)
            for key, _ in ready:
                size = key.fileobj.recv_into(buffer)  # type: ignore[union-attr]
                sizes[key.fileobj] += size
                tail = bytes(buffer[max(0, size - len(END)) : size])
                tails[key.fileobj] = (tails[key.fileobj] + tail)[-len(END) :]
                if not size:
                    selector.unregister(key.fileobj)
                    key.fileobj.close()  # type: ignore[union-attr]
    return [(size, tails[client]) for client, size in sizes.items()]


def cpu_of(address: tuple[str, int], case: Case, route: str) -> float:
    """Return the server's CPU time for each event of a case, seconds."""
    path = f"/{route}?n={case.count}&turn={TURN if case.clients > 1 else 0}"
    before = clock(address)
    got = get(address, path, case.clients, case.version)
    took = clock(address) - before
    end = END if case.version == "1.1" else END[: len(EVENT)]
    for size, tail in got:
        assert size >= case.count * len(EVENT), (case, route, size)
        assert tail.endswith(end), (case, route, tail)
    return took / (case.clients * case.count)


def clock(address: tuple[str, int]) -> float:
    ((_, tail),) = get(address, "/cpu")
    return float(tail.rpartition(b"\r\n")[2])


def measure(cases: list[Case], rounds: int) -> dict[tuple[Case, str], list[float]]:
    times: dict[tuple[Case, str], list[float]] = {}
    with ExitStack() as servers:
        addresses = {
            worker: servers.enter_context(serving(options))
            for worker, options in WORKERS.items()
        }
        for n in range(-1, rounds):
            for case in cases:
                # Who goes first changes from round to round.
                for route in (OURS, PLAIN)[:: 1 if n % 2 else -1]:
                    if n < 0:  # warm: the interpreter specialises
                        case_n = replace(case, count=case.count // 10)
                        cpu_of(addresses[case.worker], case_n, route)
                        continue
                    took = cpu_of(addresses[case.worker], case, route)
                    times.setdefault((case, route), []).append(took)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="seconds, for CI")
    is_quick = parser.parse_args().quick
    # So that the servers are stopped then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    rounds, one, each = (3, 10_000, 100) if is_quick else (7, 50_000, 500)
    cases = [
        Case(worker, version, clients, one if clients == 1 else each)
        for worker in WORKERS
        for version, clients in (("1.1", 1), ("1.1", CLIENTS), ("1.0", 1))
    ]
    print(describe("Flask", "gunicorn", "gevent"))
    times = measure(cases, rounds)
    print(f"\nmedian of {rounds} rounds: µs of the server's CPU time per event\n")
    print("| worker | HTTP | clients x events | syncstream | plain | ratio | range |")
    print("|---|---|---:|---:|---:|---:|---:|")
    verdicts = []
    for case in cases:
        own, bare = times[case, OURS], times[case, PLAIN]
        ratios = [a / b for a, b in zip(own, bare, strict=True)]
        ratio = median(ratios)
        print(
            f"| {case.worker} | {case.version} | {case.clients} x {case.count:,}"
            f" | {median(own) * 1e6:.2f} | {median(bare) * 1e6:.2f}"
            f" | {ratio:.2f} | {min(ratios):.2f} to {max(ratios):.2f} |"
        )
        verdicts.append(
            f"{verdict(ratio <= TARGET):11} {case.worker}, HTTP/{case.version},"
            f" {case.clients} at once: {ratio:.2f} times plain, target {TARGET:g}"
        )
    print("", *verdicts, sep="\n")


if __name__ == "__main__":
    main()
