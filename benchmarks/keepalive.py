"""Do keepalives from elsewhere ever come into the middle of an event?

    python -m benchmarks.keepalive [--quick] [server …]

In the repository's folder, with what ``pip install '.[test]'`` installs, and openssl.
About 2 minutes; --quick, with 1,000 events, about half a one.

10,000 numbered events from every server of tests/support/live.py, by the application
tests/apps/life.py: a third of them are yielded whole, a third in two pieces, a third
with the last byte late. In between the generators block in a plain ``time.sleep`` of
2 ms, before the second piece, and after every other event, so that with a keepalive
of 1 ms the watch writes comments from its own thread, or greenlet, into all gaps but
those that it must keep out of. Once as an `SSEResponse`, once by a generator by hand
under `StreamMiddleware`. Four streams run at a time, each on a server of its own.

An event is corrupted if `syncstream.protocol.sse.Decoder` does not return it, in its
place, with its id and data as they were sent; or if its block is not the very bytes
that were. On uWSGI nobody but the generator's thread may write: no keepalives.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from syncstream.protocol.sse import Decoder
from tests.support.live import SERVERS

from .leave import TLS, certificate, serving
from .machine import describe, verdict

KEEPALIVE = 0.001  # seconds
ROUTES = {"sse": "app", "hand": "wrapped"}  # and the application that has it
NAMES = {"sse": "SSEResponse", "hand": "by hand"}
NO_KEEPALIVES = ("uwsgi",)


@dataclass(frozen=True)
class Found:
    """What has come of one stream."""

    events: int
    corrupted: int
    strange: int  # blocks that nobody has sent
    keepalives: int
    is_whole: bool
    tracebacks: int
    seconds: float


def measure(name: str, route: str, count: int, folder: str) -> Found:
    query = f"key={name}&n={count}&keepalive={KEEPALIVE}&end=reconnect"
    env = {"KEEPALIVE": str(KEEPALIVE)}
    app = f"tests.apps.life:{ROUTES[route]}"
    with serving(name, app, folder, env=env) as server:
        began = time.monotonic()
        with server.get(f"/{route}/pieces?{query.replace(' ', '-')}") as client:
            body = client.rest()
            is_whole = client.is_whole or name in NO_KEEPALIVES  # it never marks an end
        seconds = time.monotonic() - began
        tracebacks = server.tracebacks()
    return Found(*examine(body, count), is_whole, tracebacks, seconds)


def examine(body: bytes, count: int) -> tuple[int, int, int, int]:
    """Return how many events came, were corrupted, how much else, and keepalives."""
    decoder = Decoder()
    events = decoder.feed(body)
    decoder.close()
    pairs = [(event.id, event.data) for event in events]
    expected = [(str(n), f"event {n}") for n in range(count)]
    blocks = [block + b"\n\n" for block in body.split(b"\n\n")[:-1]]
    sent = [f"id: {n}\ndata: event {n}\n\n".encode() for n in range(count)]
    others = (b": ok\n\n", b": keepalive\n\n")
    came = [block for block in blocks if block not in others]
    corrupted = max(differing(pairs, expected), differing(came, sent))
    known = set(sent)
    strange = sum(block not in known for block in came)
    return len(events), corrupted, strange, blocks.count(others[1])


def differing(came: list[Any], sent: list[Any]) -> int:
    """Return how many of those sent did not come, or not once; 1: in another order."""
    counts = Counter(came)
    return sum(counts[each] != 1 for each in sent) or int(came != sent)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1,000 events")
    parser.add_argument("servers", nargs="*", help="all by default", metavar="server")
    options = parser.parse_args()
    names = options.servers or [*SERVERS, *TLS]
    count = 1_000 if options.quick else 10_000
    # So that the servers are stopped then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    packages = ("gunicorn", "gevent", "Werkzeug", "waitress", "cheroot", "pyuwsgi")
    print(describe(*packages), flush=True)
    began = time.monotonic()
    with certificate() as folder, ThreadPoolExecutor(4) as pool:
        jobs = {
            (name, route): pool.submit(measure, name, route, count, folder)
            for name in names
            for route in ROUTES
        }
        found = {key: job.result() for key, job in jobs.items()}
    table(found)
    print(f"\n{time.monotonic() - began:.0f} s")


def table(found: dict[tuple[str, str], Found]) -> None:
    print("\n| server | stream | events | corrupted | keepalives | a second | |")
    print("|---|---|---:|---:|---:|---:|---|")
    is_met = True
    for (name, route), one in found.items():
        is_clean = not (one.corrupted or one.strange or one.tracebacks) and one.is_whole
        if (one.keepalives == 0) != (name in NO_KEEPALIVES):
            is_clean = False
        is_met = is_met and is_clean
        print(
            f"| {name} | {NAMES[route]} | {one.events:,} | {one.corrupted}"
            f" | {one.keepalives:,} | {one.keepalives / one.seconds:.0f}"
            f" | {'PASS' if is_clean else f'FAIL {one}'} |"
        )
    print(
        f"\n{verdict(is_met):11} {sum(one.corrupted for one in found.values())} of"
        f" {sum(one.events for one in found.values()):,} events corrupted, target 0,"
        f" among {sum(one.keepalives for one in found.values()):,} keepalives"
    )


if __name__ == "__main__":
    main()
