"""Do streams leave anything behind? Ten minutes of clients, and a look at the server.

    python -m tests.soak.streams [--minutes 10] [--clients 200] [--seed N]

In the repository's folder; ``tox -e soak`` runs it. gunicorn's gthread and gevent
workers run side by side, one process each. To each of them come 200 clients at a time,
by one epoll loop in this process; when one has gone, the next one comes. Half of the
places belong to clients that stay for long and hear nothing but keepalives; in the
others clients read a little and leave, in every way there is, at any moment; read a
flood slowly, or stop reading it until they are dropped; or stay to the end, and ask
for more on the same connection. Half of all ask for a response of ours, half for a
generator by hand under `StreamMiddleware`.

Before, there is a round of the same kind, after which the server's threads are all
there and its memory has its size. At the end, when all clients have gone: no stream is
open, each source that has begun has ended, threads, descriptors, greenlets, the
watch's timers are what they were after the first round, the memory has not grown by
more than 5 MB, and the log has no traceback. A client that was dropped must have
stopped reading, and one that has must have been dropped.
"""

import argparse
import ast
import collections
import heapq
import itertools
import platform
import random
import select
import signal
import socket
import struct
import sys
import time
from contextlib import ExitStack

from tests.support.live import LiveServer
from tests.support.waits import TIMEOUT

THREADS = 300  # for each client, for those that have just left, and some
SERVERS = {
    "gunicorn-gthread": ("--threads", str(THREADS)),
    "gunicorn-gevent": (),
}
SEND_TIMEOUT = 2.0
KEEPALIVE = 1.0
# Beyond it: what still has room in the kernel's buffers, and the watch's looks.
FROZEN = 2 * SEND_TIMEOUT + 3
MAX_WAIT = 5.0  # seconds, for the end after a FIN
MAX_GROWTH = 5_000_000  # bytes
TURN = 0.05  # seconds between two reads of one who reads slowly
GONE = select.EPOLLHUP | select.EPOLLERR
RESET = struct.pack("ii", 1, 0)
WAYS = ("FIN", "RST", "bytes, FIN", "half-close")

buffer = bytearray(1 << 18)
order = itertools.count()


class Client:
    """One client: what it asks for, and how it leaves. See `Soak.come`."""

    def __init__(self, soak, is_long, kind, path, stays, way, requests):
        self.soak, self.is_long, self.kind, self.path = soak, is_long, kind, path
        self.way, self.requests = way, requests
        self.until = time.monotonic() + stays
        self.body = b""
        self.seen = 0
        self.is_gone = self.is_frozen = False
        self.left_at = -MAX_WAIT  # when it has left half way
        # One that freezes may read a little before.
        self.appetite = random.choice((0, 0, 100_000, 1_000_000))
        self.socket = socket.socket()
        self.socket.setblocking(False)
        if kind in ("slow", "frozen"):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 15)
        self.socket.connect_ex(("127.0.0.1", soak.server.port))
        self.fd = self.socket.fileno()
        soak.loop.add(self, select.EPOLLOUT)

    def ready(self, events):
        """Go on, as epoll says."""
        if events & GONE and (self.kind == "early" or self.is_frozen):
            self.soak.left[self.kind] += 1
            self.go()
            return
        if events & select.EPOLLOUT:
            self.ask()
            return
        self.read()
        if self.is_gone:
            return
        if self.kind == "slow":
            self.soak.loop.change(self, 0)
            self.soak.loop.call_at(time.monotonic() + TURN, self.read_on)
        elif self.kind == "frozen" and self.seen >= self.appetite:
            self.freeze()

    def ask(self):
        text = f"GET {self.path} HTTP/1.1\r\nHost: localhost\r\n\r\n"
        try:
            self.socket.sendall(text.encode())
        except OSError as error:
            self.fail(f"could not ask: {error!r}")
            return
        if self.kind == "frozen" and not self.appetite:
            self.freeze()
        else:
            reads = 0 if self.kind == "early" else select.EPOLLIN
            self.soak.loop.change(self, reads)

    def freeze(self):
        """Read no more, and leave when the server must have given up."""
        self.is_frozen = True
        self.soak.loop.change(self, 0)
        self.soak.loop.call_at(time.monotonic() + FROZEN, self.leave)

    def read_on(self):
        if not self.is_gone:
            self.soak.loop.change(self, select.EPOLLIN)

    def read(self):
        try:
            size = self.socket.recv_into(buffer, 16384 if self.kind == "slow" else 0)
        except BlockingIOError:
            return
        except OSError as error:
            self.fail(f"could not read: {error!r}")
            return
        self.seen += size
        if self.kind != "stays":
            if not size:
                # To those who have not left half way this must not happen.
                if self.kind != "half gone":
                    self.fail(f"was ended after {self.seen} bytes")
                self.go()
            elif self.kind == "idle":
                self.soak.keepalives += buffer.count(b": keepalive", 0, size)
            return
        self.body += buffer[:size]
        if self.body.endswith(b"\r\n0\r\n\r\n"):
            self.check()
        elif not size:
            self.fail(f"got no whole response: {self.body[-100:]!r}")

    def check(self):
        """See that the response is whole, and ask for the next one."""
        count = self.body.count(b"data: ")
        if count != 5 or self.body.count(b": ok\n\n") != 1:
            self.fail(f"got another response: {self.body!r}")
            return
        self.soak.left["stays"] += 1
        self.body = b""
        self.requests -= 1
        if self.requests:
            self.ask()
        else:
            self.go()

    def fail(self, problem):
        self.soak.problem(f"a client ({self.kind}, {self.path}) {problem}")
        self.go()

    def leave(self):
        """Leave, as it was to; or begin to."""
        if self.is_gone or time.monotonic() < self.left_at + MAX_WAIT:
            return
        is_reading = self.kind == "frozen" and not self.is_frozen
        if self.kind in ("stays", "half gone") or is_reading:
            self.fail("is still waiting for its end")
            return
        self.soak.left[self.kind] += 1
        try:
            if self.way == "RST":
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            elif self.way == "bytes, FIN":
                self.socket.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            elif self.way == "half-close" and self.kind != "frozen":
                self.socket.shutdown(socket.SHUT_WR)
                self.left_at = time.monotonic()
                self.kind = "half gone"
                self.soak.loop.change(self, select.EPOLLIN)
                self.soak.loop.call_at(self.left_at + MAX_WAIT, self.leave)
                return
        except OSError:
            pass  # a frozen one's connection has gone already
        self.go()

    def go(self):
        """Close, and let the next one come."""
        if self.is_gone:
            return
        self.is_gone = True
        self.soak.loop.remove(self)
        self.socket.close()
        self.soak.gone(self)


class Loop:
    """An epoll, and a heap of calls to make."""

    def __init__(self):
        self._epoll = select.epoll()
        self._clients = {}
        self._calls = []

    def add(self, client, events):
        self._clients[client.fd] = client
        self._epoll.register(client.fd, events)

    def change(self, client, events):
        self._epoll.modify(client.fd, events)

    def remove(self, client):
        self._epoll.unregister(client.fd)
        del self._clients[client.fd]

    def call_at(self, when, call):
        heapq.heappush(self._calls, (when, next(order), call))

    def run(self, is_done):
        """Run until something is so, asked ten times a second."""
        while not is_done():
            end = time.monotonic() + 0.1
            while (now := time.monotonic()) < end:
                while self._calls and self._calls[0][0] <= now:
                    heapq.heappop(self._calls)[2]()
                until = min(end, self._calls[0][0]) if self._calls else end
                for fd, events in self._epoll.poll(max(0, until - now)):
                    if fd in self._clients:
                        self._clients[fd].ready(events)


class Soak:
    """The clients of one server, and what is found out about it."""

    def __init__(self, loop, server, clients, longest):
        self.loop, self.server, self.longest = loop, server, longest
        self.places = clients
        self.is_over = True
        self.here = set()
        self.came = collections.Counter()
        self.left = collections.Counter()
        self.problems = collections.Counter()
        self.keepalives = 0

    def problem(self, text):
        self.problems[text] += 1

    def forget(self):
        """Count from here on; but not forget the problems."""
        self.came.clear()
        self.left.clear()
        self.keepalives = 0

    def begin(self):
        self.is_over = False
        for n in range(self.places):
            # Not all at once, but soon.
            when = time.monotonic() + random.uniform(0, 2)
            self.loop.call_at(when, lambda is_long=n % 2: self.come(is_long))

    def end(self):
        """Let nobody come any more, and all who are here leave."""
        self.is_over = True
        for client in list(self.here):
            if client.kind not in ("frozen", "stays", "half gone"):
                self.loop.call_at(time.monotonic() + random.uniform(0, 1), client.leave)

    def come(self, is_long):
        if self.is_over:
            return
        way = random.choice(WAYS)
        prefix = random.choice(("", "/hand"))
        life = f"keepalive={KEEPALIVE}&send_timeout={SEND_TIMEOUT}"
        requests = 1
        if is_long:
            kind = "idle"
            source = random.choice(("idle", "idle", "busy"))
            stays = random.uniform(0.1, 1) * self.longest
        else:
            kind = random.choice(
                ("reads", "reads", "reads", "early", "stays", "slow", "frozen")
            )
            source = {"slow": "flood", "frozen": "flood"}.get(kind, "ticks")
            stays = random.expovariate(1) if kind == "reads" else random.uniform(0, 5)
            if kind == "early":
                stays = random.uniform(0, 0.02)
            elif kind in ("frozen", "stays"):
                stays, requests = 30, random.choice((1, 3))  # a limit
        n = 5 if kind == "stays" else 10_000
        wait = random.choice(("sleep", "queue", "event"))
        path = f"{prefix}/{source}?n={n}&wait={wait}&{life}"
        client = Client(self, is_long, kind, path, stays, way, requests)
        self.came[kind] += 1
        self.here.add(client)
        self.loop.call_at(client.until, client.leave)

    def gone(self, client):
        self.here.discard(client)
        pause = random.uniform(0, 0.5)
        self.loop.call_at(time.monotonic() + pause, lambda: self.come(client.is_long))

    # The server.

    def state(self):
        """Return what the server holds when nobody is there, once that is steady."""
        seen = []
        # gunicorn closes a connection that may serve more after 2 s.
        while len(seen) < 4 or (len(seen) < TIMEOUT and not is_quiet(seen)):
            time.sleep(1)
            seen.append(self.ask())
        return seen[-1]

    def ask(self):
        with self.server.get("/state", headers={"Connection": "close"}) as client:
            return ast.literal_eval(client.rest().decode())

    def fill(self, count):
        """Hold so many streams at once, so that all threads there may be are there."""
        path = f"/idle?wait=sleep&keepalive={KEEPALIVE}&send_timeout={SEND_TIMEOUT}"
        with ExitStack() as clients:
            for _ in range(count):
                client = clients.enter_context(self.server.get(path))
                client.block()


def is_quiet(states):
    names = ("threads", "fds", "greenlets", "streams", "watched", "timers")
    is_steady = all(states[-1][name] == states[-2][name] for name in names)
    return is_steady and not states[-1]["open"]


def reasons(before, after):
    """Return how many streams have ended for each reason meanwhile."""
    return {
        reason: total["streams"]
        - before["ended"].get(reason, {"streams": 0})["streams"]
        for reason, total in after["ended"].items()
    }


def judge(soak, before, after):
    """Return what is not as it should be, one line each."""
    found = [f"{count} times: {text}" for text, count in soak.problems.items()]
    if after["open"] or after["streams"] > before["streams"]:
        found.append(f"{after['open']} open, {after['streams']} streams are left")
    if after["begun"] != after["ended_sources"]:
        found.append(
            f"{after['begun'] - after['ended_sources']} sources have not ended"
        )
    for name in ("threads", "fds", "greenlets", "watched", "timers"):
        if after[name] > before[name]:
            found.append(f"{name}: {before[name]} before, {after[name]} after")
    if not soak.keepalives:
        found.append("no keepalive has come")
    growth = after["rss"] - before["rss"]
    if growth >= MAX_GROWTH:
        found.append(f"memory has grown by {growth / 1e6:.1f} MB")
    if soak.server.tracebacks():
        found.append(f"{soak.server.tracebacks()} tracebacks in the log")
    ends = reasons(before, after)
    if ends.get("send_timeout", 0) != soak.left["frozen"]:
        found.append(
            f"{ends.get('send_timeout', 0)} streams were dropped,"
            f" {soak.left['frozen']} clients had stopped reading"
        )
    if ends.get("finished", 0) != soak.left["stays"]:
        found.append(
            f"{ends.get('finished', 0)} streams finished,"
            f" {soak.left['stays']} came whole"
        )
    if strange := set(ends) - {"send_timeout", "finished", "disconnected"}:
        found.append(f"streams ended by {sorted(strange)}")
    return found


def report(soaks, states):
    """Print what has happened, and what is left."""
    rows = {"clients": [sum(soak.came.values()) for soak in soaks]}
    for kind in ("reads", "early", "stays", "slow", "frozen", "idle"):
        rows[f"- {kind}"] = [soak.came[kind] for soak in soaks]
    rows["keepalives that came to idle ones"] = [soak.keepalives for soak in soaks]
    ends = [reasons(before, after) for before, after in states]
    rows["streams that ended"] = [sum(each.values()) for each in ends]
    for reason in sorted(set().union(*ends)):
        rows[f"- {reason}"] = [each.get(reason, 0) for each in ends]
    names = {
        "open": "open streams",
        "streams": "Stream objects",
        "watched": "watched connections",
    }
    for name in ("open", "streams", "watched", "timers", "threads", "fds", "greenlets"):
        rows[f"{names.get(name, name)}, before → after"] = [
            f"{before[name]} → {after[name]}" for before, after in states
        ]
    rows["sources begun, ended"] = [
        f"{after['begun']:,}, {after['ended_sources']:,}" for _, after in states
    ]
    rows["memory, MB"] = [
        f"{before['rss'] / 1e6:.1f} → {after['rss'] / 1e6:.1f}"
        for before, after in states
    ]
    rows["CPU, s"] = [f"{after['cpu'] - before['cpu']:.1f}" for before, after in states]
    rows["tracebacks in the log"] = [soak.server.tracebacks() for soak in soaks]
    print("\n| | " + " | ".join(soak.server.kind for soak in soaks) + " |")
    print("|---|" + "---:|" * len(soaks))
    for name, cells in rows.items():
        cells = [f"{cell:,}" if isinstance(cell, int) else cell for cell in cells]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print()


def round_of(loop, soaks, seconds):
    """Let clients come and go for a time, and then all leave."""
    for soak in soaks:
        soak.begin()
    end = time.monotonic() + seconds
    loop.run(lambda: time.monotonic() > end)
    for soak in soaks:
        soak.end()
    limit = time.monotonic() + 45
    loop.run(lambda: not any(soak.here for soak in soaks) or time.monotonic() > limit)
    assert not any(soak.here for soak in soaks)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=200, help="of each server")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    options = parser.parse_args()
    random.seed(options.seed)
    # So that the servers are stopped then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    seconds = options.minutes * 60
    with ExitStack() as servers:
        loop = Loop()
        soaks = []
        for kind, words in SERVERS.items():
            server = servers.enter_context(
                LiveServer(kind, "tests.apps.soak_app:app", *words)
            )
            soaks.append(Soak(loop, server, options.clients, seconds / 5))
        print(
            f"Python {platform.python_version()}, {options.minutes:g} minutes,"
            f" {options.clients} clients at a time, --seed {options.seed}",
            flush=True,
        )
        for soak in soaks:
            soak.fill(THREADS)
        round_of(loop, soaks, max(20, seconds / 10))
        before = [soak.state() for soak in soaks]
        for soak in soaks:
            soak.forget()
        print("the first round is over", flush=True)
        round_of(loop, soaks, seconds)
        states = list(zip(before, [soak.state() for soak in soaks], strict=True))
        report(soaks, states)
        is_clean = True
        for soak, (first, last) in zip(soaks, states, strict=True):
            found = judge(soak, first, last)
            is_clean = is_clean and not found
            print(f"{'FAIL' if found else 'PASS'} {soak.server.kind}")
            for line in found:
                print(f"  {line}")
            if soak.server.tracebacks():
                print(soak.server.log()[-20_000:])
    return 0 if is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
