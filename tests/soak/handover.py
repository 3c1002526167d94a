"""Do hand-overs leave anything wrong? 20,000 of them, and 8,000 clients at once.

    python -m tests.soak.handover [--handovers 20000] [--clients 8000] [--seed N]

In the repository's folder; ``tox -e soak`` runs it. First, on each of four servers:
subscribers come, each to a channel of its own, among ordinary requests on connections
that are kept; what each of them gets is compared byte by byte; they leave in every way
there is. Afterwards descriptors, threads and greenlets are what they were, and the
process is idle. Then 8,000 clients subscribe at one gunicorn sync worker, which was
started with 1,024 descriptors: all get every event, in order, an ordinary request is
answered meanwhile, and what an idle one costs in memory is printed.
"""

import argparse
import json
import platform
import random
import resource
import select
import signal
import socket
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from tests.support.live import LiveServer, unique_key
from tests.support.waits import TIMEOUT, await_true

APP = "tests.apps.handover_app:served"
OPENING = b": ok\n\n"
KEEPALIVE = b": keepalive\n\n"
OPTIONS = {
    "gunicorn-gevent_pywsgi": ("gunicorn-gevent", "-k", "gevent_pywsgi"),
    "gunicorn-gthread-close": ("gunicorn-gthread", "--keep-alive", "0"),
}
CHURNED = ("gunicorn-gthread", "gunicorn-gevent", "gunicorn-sync", "waitress")
RESET = struct.pack("ii", 1, 0)
WAYS = ("FIN", "RST", "bytes, FIN", "half-close")
HELD = ("fds", "threads", "greenlets")


def serving(kind, *options, **more):
    """Return a server of the subscribers."""
    kind, *own = OPTIONS.get(kind, (kind,))
    if kind.startswith("gunicorn"):
        # For longer than an `Asker` may be busy elsewhere; gunicorn's own are 2 s.
        own = ["--keep-alive", "60", *own]
    return LiveServer(kind, APP, *own, *options, **more)


def unchunked(framed):
    """Return the bytes of all chunks, the last may be a part; and whether it ended."""
    parts, place = [], 0
    while True:
        mark = framed.find(b"\r\n", place)
        if mark < 0:
            return b"".join(parts), False
        size = int(framed[place:mark], 16)
        start, place = mark + 2, mark + 2 + size + 2
        if not size:
            assert framed[start:] in (b"", b"\r", b"\r\n"), framed[mark:]
            return b"".join(parts), framed[start:] == b"\r\n"
        parts.append(bytes(framed[start : start + size]))
        if len(framed) < place:
            return b"".join(parts), False
        assert framed[place - 2 : place] == b"\r\n", framed[start:place]


def body_of(data):
    """Return the body of a response so far, and whether its end was marked."""
    head, blank, framed = bytes(data).partition(b"\r\n\r\n")
    if not blank:
        return b"", False
    assert head.startswith((b"HTTP/1.1 200 ", b"HTTP/1.0 200 ")), head
    if b"transfer-encoding: chunked" in head.lower():
        return unchunked(framed)
    return framed, False


def wire(ids, texts):
    """Return what these events are in a stream."""
    return b"".join(
        f"id: {id}\ndata: {text}\n\n".encode()
        for id, text in zip(ids, texts, strict=True)
    )


class Asker:
    """Asks, on a connection that is kept as long as the server keeps it."""

    def __init__(self, server):
        self._server = server
        self._client = None

    def ask(self, path, body=None):
        """Return a response's body."""
        client = self._client or self._connect()
        if body is None:
            client.request("GET", path)
        else:
            data = json.dumps(body)
            length = {"Content-Length": str(len(data))}
            client.request("POST", path, headers=length)
            client.send(data)
        client.read_head()
        assert client.status == 200, client.status
        found = client.rest()
        # gunicorn's sync, Werkzeug's and uWSGI's answer says that they close.
        keeps = client.headers.get("connection", "").lower() != "close"
        if not keeps or self._server.kind in ("gunicorn-sync", "werkzeug", "uwsgi"):
            client.close()
            client = None
        self._client = client
        return found

    def _connect(self):
        client = self._server.connect()
        # A request in two pieces would wait for an acknowledgement.
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return client

    def publish(self, channel, texts, options=""):
        """Return the ids."""
        return json.loads(self.ask(f"/publish/{channel}{options}", texts))

    def close(self):
        if self._client is not None:
            self._client.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()


def state(server, query=""):
    """Return what the server's process holds; with "?all=1", greenlets, too."""
    with server.get(f"/state{query}", version="1.0") as client:
        return json.loads(client.rest())


def settled(server):
    """Return the state once connections of before are closed, and it is steady."""
    seen = [state(server, "?all=1")]
    names = (*HELD, "open")
    while len(seen) < 4 or any(seen[-1][n] != seen[-3][n] for n in names):
        time.sleep(0.1)
        seen.append(state(server, "?all=1"))
        assert len(seen) < 200, seen[-3:]
    return seen[-1]


def await_state(server, is_so, query=""):
    """Wait for a state of which something is so; return it."""
    found = []

    def look():
        found[:] = [state(server, query)]
        return is_so(found[0])

    await_true(look, lambda: f"{found}\n{server.log()[-2000:]}")
    return found[0]


def leave(sock, how):
    """Leave, as clients do."""
    if how == "RST":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    elif how == "bytes, FIN":
        sock.sendall(b"GET /plain?tag=foreign HTTP/1.1\r\nHost: x\r\n\r\n")
    elif how == "half-close":
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass
    sock.close()


def visit(server, asker, tag, rng):
    """Subscribe to a channel of one's own, get some events, leave."""
    with server.connect() as client:
        client.request("GET", f"/events/{tag}")
        data, expected = bytearray(), OPENING
        while True:
            body, _ = body_of(data)
            if len(body) >= len(expected):
                assert body == expected, (tag, body, expected)
                if expected != OPENING:
                    break
                texts = [f"{tag} {n} {'x' * rng.randrange(50)}" for n in range(3)]
                assert asker.ask(f"/plain?tag={tag}") == tag.encode()
                expected += wire(asker.publish(tag, texts[:1]), texts[:1])
                expected += wire(asker.publish(tag, texts[1:]), texts[1:])
                continue
            more = client.socket.recv(65536)
            assert more, f"{tag} was ended: {bytes(data)!r}"
            data += more
        # Whatever else came would be foreign.
        leave(client.socket, rng.choice(WAYS))


def churn(server, count, workers=4, seed=0):
    """Have so many visits, some at a time."""

    def work(k):
        rng = random.Random(f"{seed} {k}")
        with Asker(server) as asker:
            for n in range(count // workers):
                visit(server, asker, f"t{seed}-{k}-{n}", rng)

    with ThreadPoolExecutor(workers) as pool:
        for job in [pool.submit(work, k) for k in range(workers)]:
            job.result()


def warmed(server):
    """Let all be there that comes once; return what the process holds then."""
    if server.kind != "gunicorn-sync":  # which has one thread
        occupy(server, 8)
    churn(server, 40, seed="warm")
    await_state(server, lambda now: not now["open"])
    return settled(server)


def occupy(server, threads):
    """Have so many threads of the server be busy at once: it starts them then."""
    key = unique_key()

    def nap():
        with Asker(server) as asker:
            assert asker.ask(f"/nap/{key}") == b"ok"

    with ThreadPoolExecutor(threads) as pool:
        jobs = [pool.submit(nap) for _ in range(threads)]
        for _ in jobs:
            server.control.next(f"{key}-naps")
        server.control.open(f"{key}-wake", threads)
        for job in jobs:
            job.result()


def await_return(server, before):
    """Wait until the process holds no more than it held before."""

    def is_so(now):
        return all(now[name] <= before[name] for name in HELD)

    await_state(server, is_so, "?all=1")


def idle_cpu(server, seconds=1.0):
    """Return which part of a CPU the process takes when nothing happens."""
    before = state(server)["cpu"]
    time.sleep(seconds)
    return (state(server)["cpu"] - before) / seconds


class Crowd:
    """Many subscribers, read by one epoll in the thread that asks for it.

    Attributes:
        data: What each of them has got, by descriptor.
    """

    def __init__(self, server, count, path):
        self._epoll = select.epoll()
        self._sockets = {}
        self.data = {}
        self.ended = set()
        try:
            for _ in range(count):
                sock = socket.create_connection(("127.0.0.1", server.port), TIMEOUT)
                self._sockets[sock.fileno()] = sock
                self.data[sock.fileno()] = bytearray()
                sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                sock.setblocking(False)
                self._epoll.register(sock, select.EPOLLIN)
                self._read(0)
            self.read_until(lambda body: body.startswith(OPENING))
        except BaseException:
            self.close()
            raise

    def _read(self, timeout):
        for fd, _ in self._epoll.poll(timeout):
            try:
                data = self._sockets[fd].recv(1 << 18)
            except BlockingIOError:
                continue
            if not data:
                self.ended.add(fd)
                self._epoll.unregister(fd)
            self.data[fd] += data

    def read_until(self, is_done, limit=60):
        """Read until something is so of all bodies."""
        deadline = time.monotonic() + limit
        left = list(self.data)
        while left := [fd for fd in left if not is_done(self.body(fd))]:
            assert time.monotonic() < deadline, f"{len(left)} wait"
            self._read(0.1)

    def await_size(self, size):
        """Read until all bodies have so many bytes."""
        self.read_until(lambda body: len(body) >= size)

    def body(self, fd):
        return body_of(self.data[fd])[0].replace(KEEPALIVE, b"")

    def bodies(self):
        return [self.body(fd) for fd in self.data]

    def close(self):
        for sock in self._sockets.values():
            sock.close()
        self._epoll.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()


def listen(server, count, events):
    """Have so many clients at once, and events for all; return bytes for each."""
    with Asker(server) as asker:
        with Crowd(server, 20, "/events/all"):
            asker.publish("all", ["warm"])
        await_state(server, lambda now: not now["open"])
        before = settled(server)
        with Crowd(server, count, "/events/all") as crowd:
            during = state(server)
            assert during["parked"] == count, during
            expected = OPENING
            for n in range(events):
                texts = [f"{n} {k} {'x' * 60}" for k in range(1 + n % 3)]
                expected += wire(asker.publish("all", texts), texts)
                assert asker.ask(f"/plain?tag=p{n}") == f"p{n}".encode()
            crowd.await_size(len(expected))
            assert set(crowd.bodies()) == {expected}
        await_state(server, lambda now: not now["open"])
        await_return(server, before)
    return (during["rss"] - before["rss"]) / count


def allow_descriptors(count):
    """Raise our own limit; there must be so many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return min(count, hard - 200)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--handovers", type=int, default=20_000)
    parser.add_argument("--clients", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    options = parser.parse_args()
    # So that the servers are stopped then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    print(f"Python {platform.python_version()}, --seed {options.seed}", flush=True)
    print("\n| | hand-overs | seconds | fds | threads | greenlets | idle CPU |")
    print("|---|" + "---:|" * 6, flush=True)
    for kind in CHURNED:
        with serving(kind) as server:
            before, began = warmed(server), time.monotonic()
            churn(server, options.handovers // len(CHURNED), seed=options.seed)
            seconds = time.monotonic() - began
            await_state(server, lambda now: not now["open"])
            await_return(server, before)
            after = settled(server)
            cells = [f"{before[name]} → {after[name]}" for name in HELD]
            cpu = idle_cpu(server, 5.0)
            print(
                f"| {kind} | {options.handovers // len(CHURNED):,} | {seconds:.0f} |"
                f" {' | '.join(cells)} | {cpu:.1%} |",
                flush=True,
            )
            for name in HELD:
                assert after[name] <= before[name], (name, before, after)
            assert cpu < 0.05, cpu
            assert server.tracebacks() == 0, server.log()[-20_000:]
    count = allow_descriptors(options.clients)
    with serving("gunicorn-sync", env={"SOFT_LIMIT": "1024"}) as server:
        began = time.monotonic()
        cost = listen(server, count, 50)
        assert server.tracebacks() == 0, server.log()[-20_000:]
        print(
            f"\n{count:,} clients of one sync worker got all of 99 events in order,"
            f" in {time.monotonic() - began:.0f} s; one that is idle costs"
            f" {cost:,.0f} bytes"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
