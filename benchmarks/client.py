"""How fast does each client read one stream of small events?

    python -m benchmarks.client [--quick]

In the repository's folder, with ``pip install requests httpx-sse sseclient-py
requests-sse launchdarkly-eventsource``. About two minutes; --quick a fifth of that.

A process of its own sends 200,000 events of about 40 bytes, each with an id, as fast as
its client reads them: joined into HTTP chunks of 16 KiB, as servers send a backlog, or
each event in a chunk of its own. Each client reads them in this process, takes text,
name and id of each, and is what its documentation shows. CPU time of the reading
thread, parsing and HTTP library included; the clients take turns, round by round;
medians, and ratios the median of each round's own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import httpx
import httpx_sse
import requests
import requests_sse
import sseclient
from ld_eventsource import SSEClient
from ld_eventsource.config import ConnectStrategy

from syncstream.client import EventSource

from .machine import describe, verdict

EVENTS = 200_000
JOINED, SINGLE = "chunks of 16 KiB", "a chunk an event"
OURS = "syncstream"
GOAL, LEAST = 4.0, 2.0  # times as fast as each other client
HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


def wire(number: int) -> bytes:
    return b'id: %d\ndata: {"n":%d,"w":"event"}\n\n' % (number, number)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def serve(listener: socket.socket, count: int) -> None:
    """Answer one request after the other; the path says how."""
    events = [wire(number) for number in range(count)]
    body = b"".join(events)
    size = 16384
    bodies = {
        b"/joined": b"".join(
            chunk(body[i : i + size]) for i in range(0, len(body), size)
        ),
        b"/single": b"".join(map(chunk, events)),
    }
    while True:
        sock, _ = listener.accept()
        with sock:
            request = b""
            while b"\r\n\r\n" not in request:
                request += sock.recv(65536)
            sock.sendall(HEAD + bodies[request.split()[1]] + b"0\r\n\r\n")


def ours(url: str, count: int) -> int:
    seen = 0
    with EventSource(url, reconnect=False) as source:
        for event in source:
            _ = event.data, event.event, event.id
            seen += 1
    return seen


def by_httpx_sse(url: str, count: int) -> int:
    seen = 0
    with (
        httpx.Client(trust_env=False) as client,
        httpx_sse.connect_sse(client, "GET", url) as source,
    ):
        for event in source.iter_sse():
            _ = event.data, event.event, event.id
            seen += 1
    return seen


def by_sseclient(url: str, count: int) -> int:
    seen = 0
    with requests.get(url, stream=True, timeout=60) as response:
        source: Any = response  # its documentation does so
        for event in sseclient.SSEClient(source).events():
            _ = event.data, event.event, event.id
            seen += 1
    return seen


def by_requests_sse(url: str, count: int) -> int:
    seen = 0
    with requests_sse.EventSource(url, timeout=60) as source:
        for event in source:
            _ = event.data, event.type, event.last_event_id
            seen += 1
            if seen == count:
                break  # it would reconnect
    return seen


def by_launchdarkly(url: str, count: int) -> int:
    seen = 0
    client = SSEClient(connect=ConnectStrategy.http(url))
    for event in client.events:
        _ = event.data, event.event, event.last_event_id
        seen += 1
    client.close()
    return seen


CLIENTS: dict[str, Callable[[str, int], int]] = {
    OURS: ours,
    "httpx-sse": by_httpx_sse,
    "sseclient-py": by_sseclient,
    "requests-sse": by_requests_sse,
    "launchdarkly-eventsource": by_launchdarkly,
}


def measure(client: str, url: str, count: int) -> float:
    """Return the CPU time of one reading, in seconds."""
    began = time.thread_time()
    seen = CLIENTS[client](url, count)
    spent = time.thread_time() - began
    assert seen == count, (client, seen)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    is_quick = parser.parse_args().quick
    count, rounds = (EVENTS // 5, 3) if is_quick else (EVENTS, 5)
    print(describe("requests", "urllib3", *list(CLIENTS)[1:]))
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    server = fork.Process(target=serve, args=(listener, count), daemon=True)
    server.start()
    is_met = True
    for path, form in (("joined", JOINED), ("single", SINGLE)):
        url = f"http://127.0.0.1:{port}/{path}"
        times: dict[str, list[float]] = {client: [] for client in CLIENTS}
        for _ in range(rounds):
            for client in CLIENTS:
                times[client].append(measure(client, url, count))
        print(f"\n{form}, {count:,} events, {rounds} rounds\n")
        print(f"{'client':26} {'µs an event':>11} {'times ours':>10}")
        for client, spent in times.items():
            ratio = median(t / o for t, o in zip(spent, times[OURS], strict=True))
            print(f"{client:26} {median(spent) / count * 1e6:11.2f} {ratio:10.1f}")
            if client != OURS and path == "joined":
                is_met = is_met and ratio >= LEAST
    print(f"\n{JOINED}: {LEAST} times as fast as each, {verdict(is_met)}")
    server.terminate()
    server.join()


if __name__ == "__main__":
    main()
