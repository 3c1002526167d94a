"""How long after a client has left does its generator's `finally` run?

    python -m benchmarks.leave [--quick] [server …]

In the repository's folder, with what ``pip install '.[test]'`` installs, and openssl.
About a minute; --quick about a fifth of one.

Every server of tests/support/live.py, one worker each, by the application
tests/apps/life.py, whose generators wait in `syncstream.sleep`, in
``stream.wait(queue)``, or for an upstream read by requests and given to
``stream.link``; under gevent also in a plain ``time.sleep``. Asynchronous sources wait
in ``asyncio.sleep``. And for subscribers that were handed over: when does their
``on_close`` run? 100 clients leave each wait in each way: by closing (FIN), by a reset,
and by closing behind a pipelined request that nobody reads. A server is started once.
Where it serves several at once, seven clients at a time come and wait; but they leave
one after the other, each when the last one's `finally` has run, so that no time is
another's. Two servers are measured at a time, gunicorn's sync worker beside all of the
others. Both ends read the same monotonic clock: before the client's close(), and first
thing in the `finally`.

The p99 of 100 is the 99th in order: one may be later.
"""

from __future__ import annotations

import argparse
import math
import signal
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from statistics import median
from typing import Any

from tests.support.live import SERVERS, Client, LiveServer, unique_key
from tests.support.waits import TIMEOUT

from .machine import describe, verdict

TARGET = 0.05  # seconds, p99
AT_ONCE = 7  # of 8 threads: one is left for who is just leaving
WAYS = ("FIN", "RST", "bytes, FIN")
WAITS = {
    "sleep": "sleep(30)",
    "queue": "wait(Queue())",
    "linked": "linked upstream",
    "time.sleep": "time.sleep(30)",
    "async": "asyncio.sleep(30)",
    "sub": "handed over",
}
GEVENT = ("gunicorn-gevent", "pywsgi")
TLS = {"gunicorn-gthread TLS": "gunicorn-gthread", "gunicorn-gevent TLS": GEVENT[0]}
SETTLE = 0.02  # seconds until a generator that was read from waits for its upstream

Times = list[float]
Cell = tuple[str, str, str]  # server, wait, way


class TLSServer(LiveServer):
    """A gunicorn that speaks TLS itself, with a certificate made for it."""

    def __init__(self, kind: str, app: str, folder: str, **options: Any) -> None:
        self._context = ssl.create_default_context(cafile=f"{folder}/cert.pem")
        words = ("--certfile", f"{folder}/cert.pem", "--keyfile", f"{folder}/key.pem")
        super().__init__(kind, app, *words, **options)

    def connect(self) -> Client:
        client = super().connect()
        try:
            client.socket = self._context.wrap_socket(
                client.socket, server_hostname="localhost"
            )
        except BaseException:
            client.close()
            raise
        return client


@contextmanager
def certificate() -> Iterator[str]:
    """Make a certificate for localhost: cert.pem and key.pem in a folder."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes"),
                *("-days", "1", "-subj", "/CN=localhost"),
                *("-addext", "subjectAltName=DNS:localhost"),
                *("-keyout", f"{folder}/key.pem", "-out", f"{folder}/cert.pem"),
            ],
            check=True,
            capture_output=True,
        )
        yield folder


def serving(name: str, app: str, folder: str, **options: Any) -> LiveServer:
    """Start a server by its name in the table."""
    if name in TLS:
        return TLSServer(TLS[name], app, folder, **options)
    return LiveServer(name, app, **options)


@contextmanager
def upstream() -> Iterator[str]:
    """Serve one line to each who asks, and then nothing."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline().strip():
                pass
            self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            self.wfile.write(b"8\r\nwaiting\n\r\n")
            with suppress(OSError):
                self.rfile.read()  # until the other side has gone

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        request_queue_size = 100

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()


def leave(client: Client, how: str) -> float:
    """Leave as clients do; return when."""
    if how == "RST":
        linger = struct.pack("ii", 1, 0)
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    elif how == "bytes, FIN":
        client.send("GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    now = time.monotonic()
    client.socket.close()
    return now


def measure(server: LiveServer, wait: str, way: str, count: int, url: str) -> Times:
    """Return how long each `finally` took to run; infinity: it did not."""
    at_once = 1 if server.kind == "gunicorn-sync" else AT_ONCE
    times: Times = []
    while len(times) < count:
        with ExitStack() as stack:
            waiting = []
            for _ in range(min(at_once, count - len(times))):
                key = unique_key()
                path = f"/sse/{wait}?key={key}&upstream={url}"
                path = f"/sub?key={key}" if wait == "sub" else path
                waiting.append((key, stack.enter_context(server.get(path))))
            for key, client in waiting:
                assert client.block() == b": ok\n\n"
                if wait == "sub":
                    continue
                assert client.block() == b"data: waiting\n\n"
                if wait != "linked":
                    server.control.next(f"{key}-waiting")
            if wait == "linked":
                time.sleep(SETTLE)
            for key, client in waiting:
                left = leave(client, way)
                try:
                    at, _, is_so = server.control.next(f"{key}-ended", TIMEOUT)
                except AssertionError:
                    at, is_so = math.inf, True
                assert is_so or wait != "sub", "it was not handed over"
                times.append(at - left)
    return times


def measure_server(name: str, count: int, url: str, folder: str) -> dict[Cell, Times]:
    found = {}
    with serving(name, "tests.apps.life:app", folder) as server:
        measure(server, "linked", "FIN", 10, url)  # warm: requests is imported
        for wait in WAITS:
            if wait == "time.sleep" and server.kind not in GEVENT:
                continue  # nothing can interrupt a thread there
            if wait == "sub" and name in TLS:
                continue  # it stays with its server
            for way in WAYS:
                found[name, wait, way] = measure(server, wait, way, count, url)
        if server.tracebacks():
            print(f"{name}: {server.tracebacks()} tracebacks in its log")
    return found


def p99(times: Times) -> float:
    return sorted(times)[math.ceil(0.99 * len(times)) - 1]


def ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="10 instead of 100")
    parser.add_argument("servers", nargs="*", help="all by default", metavar="server")
    options = parser.parse_args()
    names = options.servers or [*SERVERS, *TLS]
    count = 10 if options.quick else 100
    # So that the servers are stopped then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    packages = ("gunicorn", "gevent", "Werkzeug", "waitress", "cheroot", "pyuwsgi")
    print(describe(*packages), flush=True)
    began = time.monotonic()
    found: dict[Cell, Times] = {}
    with (
        certificate() as folder,
        upstream() as url,
        ThreadPoolExecutor(2) as pool,
    ):
        jobs = [pool.submit(measure_server, n, count, url, folder) for n in names]
        for job in jobs:
            found.update(job.result())
    table(found, count)
    print(f"\n{time.monotonic() - began:.0f} s")


def table(found: dict[Cell, Times], count: int) -> None:
    print(
        f"\nms from the client's close() to the `finally`: p50 / p99 / max of {count}"
    )
    print("\n| server | wait | " + " | ".join(WAYS) + " | |")
    print("|---|---|" + "---:|" * len(WAYS) + "---|")
    for name, wait in dict.fromkeys((name, wait) for name, wait, _ in found):
        rows = [found[name, wait, way] for way in WAYS]
        cells = [f"{ms(median(t))} / {ms(p99(t))} / {ms(max(t))}" for t in rows]
        is_met = max(map(p99, rows)) <= TARGET
        print(
            f"| {name} | {WAITS[wait]} | {' | '.join(cells)}"
            f" | {'PASS' if is_met else 'FAIL'} |"
        )
    worst = max(map(p99, found.values()))
    every = [took for times in found.values() for took in times]
    lost = sum(took == math.inf for took in every)
    print(
        f"\n{verdict(worst <= TARGET):11} the worst p99 is {ms(worst)} ms, target"
        f" {ms(TARGET)}; of all {len(every):,}: p50 {ms(median(every))}, p99"
        f" {ms(p99(every))}, max {ms(max(every))}; not within {TIMEOUT:g} s: {lost}"
    )


if __name__ == "__main__":
    main()
