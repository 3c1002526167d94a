"""What does it cost to open and to close a stream, beyond Flask's own?

    python -m benchmarks.opening [--quick]

In the repository's folder, with ``pip install flask gunicorn gevent``. About a minute;
--quick about 10 seconds.

Flask under gunicorn, its gthread worker and its gevent worker, one process. One client
after the other connects, asks as an EventSource does, reads, and closes. Four routes of
one server take turns, round by round:

- ``plain``: Flask's ``Response`` of a generator of one event, read to its end;
- ``three pieces``: the same, of what ``generator`` sends, an opening and an end, too;
- ``generator``: ``SSEResponse`` of a generator of one event, read to its end;
- ``handed over``: ``SSEResponse`` of a subscription, to a channel without others. The
  client leaves when it has read the opening, which comes from the loop.

What is compared is the CPU time of the server's process (system time and all its
threads), as the server itself reads it before and after, when it has let go of all
clients; medians, and ratios the median of each round's own. The targets are for the
ratio to ``plain``, and are missed: what remains of a generator's opening is some 240
calls of Python functions, none above a twentieth; what remains of a hand-over are its
checks and its threads' turns, as its system calls alone are 1.15 times ``plain``.
"""

from __future__ import annotations

import argparse
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from statistics import median
from typing import Any

from flask import Flask, Response

from syncstream import Hub, SSEResponse
from syncstream.process import stats

from .generator import serving
from .machine import describe, verdict

PLAIN, PIECES = "plain", "three pieces"
GENERATOR, TAKEN = "generator", "handed over"
PATHS = {
    PLAIN: "/plain",
    PIECES: "/pieces",
    GENERATOR: "/generator",
    TAKEN: "/subscription",
}
TARGETS = {GENERATOR: 1.15, TAKEN: 1.25}
WORKERS = {"gthread": ["-k", "gthread", "--threads", "10"], "gevent": ["-k", "gevent"]}
OPENING, EVENT, END = b": ok\n", b"data: x\n\n", b"id: syncstream-end\n\n"
TIMEOUT = 10.0  # seconds

app = Flask(__name__)
hub = Hub("memory:")


def each(*items: Any) -> Iterator[Any]:
    yield from items


@app.get(PATHS[PLAIN])
def plain() -> Response:
    return Response(each(EVENT), mimetype="text/event-stream")


@app.get(PATHS[PIECES])
def pieces() -> Response:
    return Response(each(OPENING, EVENT, END), mimetype="text/event-stream")


@app.get(PATHS[GENERATOR])
def generator() -> SSEResponse:
    return SSEResponse(each("x"))


@app.get(PATHS[TAKEN])
def subscription() -> SSEResponse:
    return SSEResponse(hub.subscribe("channel"))


@app.get("/state")
def state() -> str:
    return f"{stats()['open']} {time.process_time()}"


def get(address: tuple[str, int], path: str, until: bytes = b"") -> bytes:
    """Ask once; return what came, to the end or to a mark, and leave."""
    ask = (
        f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        "Accept: text/event-stream\r\nCache-Control: no-cache\r\n\r\n"
    )
    with socket.create_connection(address, timeout=TIMEOUT) as client:
        client.sendall(ask.encode())
        got = b""
        while not (until and until in got) and (data := client.recv(65536)):
            got += data
    return got


def clock(address: tuple[str, int]) -> float:
    """Return the server's CPU time, seconds, once it has let go of all clients."""
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        streams, seconds = get(address, "/state").rpartition(b"\r\n")[2].split()
        if streams == b"0":
            return float(seconds)
        time.sleep(0.01)
    raise TimeoutError(f"streams are open: {streams.decode()}")


def cpu_of(address: tuple[str, int], route: str, count: int) -> float:
    """Return the server's CPU time for each client of a route, seconds."""
    until = OPENING if route == TAKEN else b""
    before = clock(address)
    for _ in range(count):
        got = get(address, PATHS[route], until)
        assert (until or EVENT) in got, (route, got)
    return (clock(address) - before) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="seconds, for CI")
    is_quick = parser.parse_args().quick
    # So that the servers are stopped then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    rounds, count = (5, 200) if is_quick else (15, 400)
    times: dict[tuple[str, str], list[float]] = {}
    print(describe("Flask", "gunicorn", "gevent"))
    with ExitStack() as servers:
        addresses = {
            worker: servers.enter_context(serving(options, app="opening:app"))
            for worker, options in WORKERS.items()
        }
        for n in range(-1, rounds):  # the first warms: the interpreter specialises
            for worker, address in addresses.items():
                for route in [*PATHS][:: 1 if n % 2 else -1]:
                    took = cpu_of(address, route, count)
                    if n >= 0:
                        times.setdefault((worker, route), []).append(took)
    print(f"\nmedian of {rounds} rounds: µs of the server's CPU time per client\n")
    print("| worker | stream | µs | to plain | range | to three pieces |")
    print("|---|---|---:|---:|---:|---:|")
    verdicts = []
    for (worker, route), own in sorted(times.items(), key=lambda item: item[0][0]):
        ratios, to_pieces = (
            [a / b for a, b in zip(own, times[worker, rival], strict=True)]
            for rival in (PLAIN, PIECES)
        )
        ratio = median(ratios)
        print(
            f"| {worker} | {route} | {median(own) * 1e6:.0f} | {ratio:.2f}"
            f" | {min(ratios):.2f} to {max(ratios):.2f} | {median(to_pieces):.2f} |"
        )
        if route in TARGETS:
            verdicts.append(
                f"{verdict(ratio <= TARGETS[route]):11} {worker}, {route}: {ratio:.2f}"
                f" times plain, target {TARGETS[route]:g}"
            )
    print("", *verdicts, sep="\n")


if __name__ == "__main__":
    main()
