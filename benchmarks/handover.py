"""What does an event cost whose subscribers have been handed over?

    python -m benchmarks.handover [--quick] [--chart FILE.svg]

In the repository's folder, with ``pip install flask gunicorn gevent`` and a C compiler;
for better-sse Node and ``npm install -g better-sse``, for nchan Debian's nginx with
libnginx-mod-nchan: what is not there is left out. Linux only, with a limit of 8,500
open files, or there are fewer clients. About 12 minutes; --quick, everything once
and smaller, two and a half.

*A channel.* As benchmarks/fanout.py: 1,000 clients subscribe to one channel of one
process, 200 events of 120 bytes are published at once (*burst*), and then 200 one by
one (*paced*, 50 a second). The Flask view returns ``SSEResponse(hub.subscribe(...))``,
and is handed over: under gunicorn's sync worker once with each sender, under gthread
with 8 threads and gevent with the one that is chosen here. Beside it the same view
attached, a greenlet a client; broadcaster.c, raw epoll and send(2); better-sse on Node;
nchan in nginx, which is published to by requests. CPU time is that of the process that
sends, system time and all threads, by delivered event; ratios are to broadcaster.c in
the same round, and the table has their medians. *Events a read* is 1 where a server
keeps up with paced events. *Client* is the CPU time of the clients, a program in C,
while they waited for paced events.

*Beside a request that computes*, in another thread of the same gthread worker: paced
once more, with each sender.

*Beside 20 that stopped* reading, for whom 400 kB wait: the 1,000 others with and
without them, in turns, on one sync worker.

*8,000 clients* on one sync worker: its memory while they idle, and the time of an
ordinary request, 20 a second, each on a connection of its own, while events go out.

Every client must get every event once, in order: the run ends if not.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

from syncstream import Hub, SSEResponse
from syncstream.fanout.sender import VARIABLE, open_sender
from syncstream.runtime.process import process

from .chart import MINE, THEIRS, THEIRS_TOO, Bar, bars
from .clients import Came, Clients, compiled, ended, pauses, payload
from .machine import describe, verdict

if TYPE_CHECKING:
    from flask import Flask

CLIENTS, FIRST, EVENTS, SIZE, RATE = 1_000, 50, 200, 120, 50
ROUNDS, PAIRS = 5, 7
STOPPED, FILL, FILL_SIZE = 20, 40, 10_000  # clients; events, bytes each, to fill them
MANY, MANY_RATE, ASK_EVERY = 8_000, 5, 0.05  # clients, events/s, seconds
FILES = 500  # open ones beside a client's each
TIMEOUT = 120.0
BURST_GOAL, FASTER_GOAL = 0.25, 10  # µs; times better-sse's events/s
COST_GOALS = {"write": 1.25, "aio": 1.0}  # of the broadcaster's CPU time
P99_GOAL = 1.5  # of the broadcaster's
RSS_GOAL, ASK_GOAL = 1024, 0.05  # bytes a client; seconds
BUSY_GOAL, CLAIM_NONE = 0.05, "write"  # seconds; who claims nothing there
STOPPED_P99_GOAL, STOPPED_COST_GOAL = 1.2, 1.1  # "nothing measurable"

JOINED = 1.05  # events a read, from which on CPU times are no longer comparable

OUR_NAME = "syncstream"
HERE = Path(__file__).parent
NCHAN = Path("/usr/lib/nginx/modules/ngx_nchan_module.so")
NGINX = """\
load_module {module};
daemon off;
worker_processes 1;
worker_rlimit_nofile 20000;
pid {folder}/pid;
error_log stderr crit;
events {{ worker_connections 16000; use epoll; multi_accept on; }}
http {{
  access_log off;
  client_body_temp_path {folder}/1; proxy_temp_path {folder}/2;
  fastcgi_temp_path {folder}/3; uwsgi_temp_path {folder}/4; scgi_temp_path {folder}/5;
  keepalive_requests 1000000;
  nchan_shared_memory_size 256M;
  server {{
    listen 127.0.0.1:{port} backlog=1000;
    location = /events {{
      nchan_subscriber eventsource;
      nchan_channel_id all;
      nchan_subscriber_first_message newest;
    }}
    location = /publish {{
      nchan_publisher;
      nchan_channel_id all;
      nchan_message_buffer_length 1000;
    }}
    location = /state {{ nchan_stub_status; }}
  }}
}}
"""


# The servers' side: what gunicorn runs.


def app(handover: bool | None = None) -> Flask:
    from flask import Flask, request

    flask, hub = Flask(__name__), Hub()
    is_computing = False

    @flask.get("/events")
    def events() -> Any:
        # Those that stop are to stay.
        source = hub.subscribe("all")
        return SSEResponse(source, handover=handover, send_timeout=None)

    @flask.get("/publish")
    def publish() -> str:
        count, rate, size = (
            int(request.args[key]) for key in ("count", "rate", "size")
        )

        def run() -> None:
            for n, pause in pauses(count, rate):
                if pause:
                    time.sleep(pause)
                hub.publish("all", payload(n, size))

        # Not in the request: it would hold the sync worker.
        threading.Thread(target=run).start()
        return "ok"

    @flask.get("/state")
    def state() -> dict[str, int]:
        return {
            "pid": os.getpid(),
            "subscribers": hub.stats()["subscribers"],
            "attached": process().attached_streams,
        }

    @flask.get("/")
    def ordinary() -> str:
        return "ok"

    @flask.get("/compute")
    def compute() -> str:
        nonlocal is_computing
        is_computing = True
        deadline = time.monotonic() + TIMEOUT
        while is_computing and time.monotonic() < deadline:
            sum(range(500))
        return "ok"

    @flask.get("/rest")
    def rest() -> str:
        nonlocal is_computing
        is_computing = False
        return "ok"

    return flask


# The servers, as they are run.


@dataclass(frozen=True)
class Server:
    """One line of the table.

    Attributes:
        name, on: What it is called.
        command: With {fd}, {port}, {folder}.
        sender: For `VARIABLE`; "": what is chosen.
    """

    name: str
    on: str
    command: tuple[str, ...]
    sender: str = ""


def gunicorn(worker: str, *, sender: str = "", is_attached: bool = False) -> Server:
    return Server(
        f"{OUR_NAME}, attached" if is_attached else OUR_NAME,
        f"{worker}, {sender}" if sender else worker,
        (
            *(sys.executable, "-m", "gunicorn", "-w", "1", "-k", worker),
            # With threads a sync worker would be a gthread one.
            *(("--threads", "8") if worker == "gthread" else ()),
            *("-b", "fd://{fd}", "--worker-connections", "10000"),
            *("--graceful-timeout", "1", "--timeout", "120", "--log-level", "error"),
            "--no-control-socket",
            f"benchmarks.handover:app(handover={False if is_attached else None!r})",
        ),
        sender,
    )


ATTACHED = gunicorn("gevent", is_attached=True)
BROADCASTER = Server("broadcaster.c", "epoll, send(2)", ("broadcaster", "{fd}"))
BETTER_SSE = Server(
    "better-sse", "Node", ("node", str(HERE / "better_sse.mjs"), "{fd}")
)
NCHAN_SERVER = Server(
    "nchan", "nginx", ("nginx", "-p", "{folder}", "-c", "conf", "-e", "log")
)


def here() -> list[Server]:
    """Return the servers that can be run; say what is missing."""
    servers = [gunicorn("sync", sender=sender) for sender in COST_GOALS if has(sender)]
    servers += [gunicorn("gthread"), gunicorn("gevent"), ATTACHED, BROADCASTER]
    if version_of_better_sse():
        servers.append(BETTER_SSE)
    else:
        print("Left out: better-sse, which needs Node and npm install -g better-sse.")
    if shutil.which("nginx") and NCHAN.exists():
        servers.append(NCHAN_SERVER)
    else:
        print("Left out: nchan, which needs nginx and libnginx-mod-nchan.")
    return servers


def has(sender: str) -> bool:
    try:
        open_sender(sender).close()
    except OSError as error:
        print(f"Left out: {sender}, {error}.")
        return False
    return True


def version_of_better_sse() -> str:
    """Return "" if it is not installed."""
    if not shutil.which("node"):
        return ""
    if "NODE_PATH" not in os.environ and shutil.which("npm"):
        os.environ["NODE_PATH"] = output("npm", "root", "-g")
    script = (
        "const { join, dirname } = require('path');"
        "const folder = dirname(dirname(require.resolve('better-sse')));"
        "console.log(require(join(folder, 'package.json')).version)"
    )
    return output("node", "-e", script)


def output(*command: str) -> str:
    """Return what a program prints; "" if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return (done.stdout or done.stderr).strip() if done.returncode == 0 else ""


def versions() -> str:
    """Return those of what is no Python package."""
    found = [output("cc", "--version").partition("\n")[0]]
    if version := version_of_better_sse():
        found += [f"Node {output('node', '--version')}", f"better-sse {version}"]
    if shutil.which("nginx"):
        found.append(output("nginx", "-v"))
    return ", ".join(found)


@contextmanager
def serving(server: Server) -> Iterator[Running]:
    """Start a server on a socket of ours, for as long as the block runs."""
    with ExitStack() as stack:
        listener = stack.enter_context(
            socket.create_server(("127.0.0.1", 0), backlog=1000)
        )
        listener.setblocking(False)  # as nginx and the broadcaster want it
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        fd, port = listener.fileno(), listener.getsockname()[1]
        conf = NGINX.format(module=NCHAN, folder=folder, port=port)
        Path(folder, "conf").write_text(conf)
        program, *words = (part.format(fd=fd, folder=folder) for part in server.command)
        if server is BROADCASTER:
            program = compiled(program)
        environ = {**os.environ, VARIABLE: server.sender}
        if server is NCHAN_SERVER:
            environ["NGINX"] = f"{fd};"  # as it hands its sockets to a new version
        child = subprocess.Popen([program, *words], pass_fds=[fd], env=environ)
        stack.enter_context(ended(child))
        yield Running(server, port, child.pid)


class Running:
    """A server that runs.

    Args:
        pid: Of the process that was started.
    """

    def __init__(self, server: Server, port: int, pid: int) -> None:
        self.server = server
        self.port = port
        told = self.state()
        if server is NCHAN_SERVER:
            (pid,) = map(
                int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            )
        self._pid = told.get("pid", pid)  # the one that sends

    def get(self, path: str) -> str:
        url = f"http://127.0.0.1:{self.port}{path}"
        with urlopen(url, timeout=TIMEOUT) as answer:
            text: str = answer.read().decode()
        return text

    def state(self) -> dict[str, int]:
        text = self.get("/state")
        if self.server is NCHAN_SERVER:
            lines = dict(line.split(": ") for line in text.splitlines())
            return {"subscribers": int(lines["subscribers"])}
        state: dict[str, int] = json.loads(text)
        return state

    def await_subscribers(self, count: int) -> None:
        """Wait for so many; all handed over, unless they are not to be."""
        wanted = {"subscribers": count}
        if self.server.name == OUR_NAME:
            wanted["attached"] = 0
        deadline = time.monotonic() + TIMEOUT
        while not wanted.items() <= (now := self.state()).items():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{now} is not {wanted}")
            time.sleep(0.05)

    def cpu(self) -> float:
        """Return the seconds of CPU time of the process, nanoseconds exact."""
        time.sleep(0.1)  # what it does after the last event is its, too
        return time.clock_gettime((~self._pid << 3) | 2)  # CPUCLOCK_SCHED

    def rss(self) -> int:
        pages = int(Path(f"/proc/{self._pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def publish(self, count: int, rate: int, size: int = SIZE) -> None:
        """Have it publish; rate 0: at once."""
        if self.server is not NCHAN_SERVER:
            self.get(f"/publish?count={count}&rate={rate}&size={size}")
            return
        with socket.create_connection(("127.0.0.1", self.port), TIMEOUT) as publisher:
            publisher.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for n, pause in pauses(count, rate):
                time.sleep(pause)
                publisher.sendall(
                    "POST /publish HTTP/1.1\r\nHost: localhost\r\n"
                    f"Content-Length: {size}\r\n\r\n{payload(n, size)}".encode()
                )
            answers = 0
            while answers < count:
                answers += publisher.recv(65536).count(b"HTTP/1.1 2")


# What is measured.


@dataclass(frozen=True)
class Found:
    """One line of the table."""

    burst_rate: float  # delivered events a second
    burst: float  # µs of CPU time a delivered event
    paced: float  # the same
    joined: float  # paced events by a read: 1, where the server keeps up
    p50: float  # ms
    p99: float
    share: float  # the clients' CPU time by the time


def warm_up(running: Running) -> None:
    """Have everything imported that is imported late."""
    with Clients(running.port) as clients:
        clients.come(FIRST)
        running.await_subscribers(FIRST)
        for _ in range(2):
            clients.collect(EVENTS, lambda: running.publish(EVENTS, 0))
    running.await_subscribers(0)


def fan(
    running: Running, clients: Clients, count: int, rate: int
) -> tuple[Came, float]:
    """Have so many events published; return what came, and µs of CPU time an event."""
    before = running.cpu()
    came = clients.collect(count, lambda: running.publish(count, rate))
    return came, (running.cpu() - before) / came.deliveries * 1e6


def measure(server: Server) -> Found:
    with serving(server) as running:
        warm_up(running)
        with Clients(running.port) as clients:
            clients.come(CLIENTS)
            running.await_subscribers(CLIENTS)
            burst, burst_cost = fan(running, clients, EVENTS, 0)
            paced, cost = fan(running, clients, EVENTS, RATE)
    return Found(
        burst_rate=burst.deliveries / burst.seconds,
        burst=burst_cost,
        paced=cost,
        joined=paced.deliveries / paced.reads,
        p50=paced.p50 * 1e3,
        p99=paced.p99 * 1e3,
        share=paced.share,
    )


def beside_computing(sender: str) -> Came:
    with serving(gunicorn("gthread", sender=sender)) as running:
        warm_up(running)
        with Clients(running.port) as clients:
            clients.come(CLIENTS)
            running.await_subscribers(CLIENTS)
            with ThreadPoolExecutor(1) as pool:
                request = pool.submit(running.get, "/compute")
                try:
                    came = fan(running, clients, EVENTS, RATE)[0]
                finally:
                    running.get("/rest")
                request.result()
                return came


def beside_stopped(pairs: int) -> dict[bool, list[tuple[float, float]]]:
    """Return p99 in ms, and µs of CPU time an event, without and with them."""
    found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    with serving(gunicorn("sync")) as running:
        warm_up(running)
        with Clients(running.port) as clients:
            clients.come(CLIENTS)
            for number in range(pairs):
                for is_beside in (True, False) if number % 2 else (False, True):
                    with Clients(running.port) as others:
                        others.come(0, STOPPED if is_beside else 0)
                        running.await_subscribers(CLIENTS + STOPPED * is_beside)
                        # More than the kernel keeps for them.
                        clients.collect(
                            FILL, lambda: running.publish(FILL, 0, FILL_SIZE)
                        )
                        came, cost = fan(running, clients, EVENTS, RATE)
                    found[is_beside].append((came.p99 * 1e3, cost))
    return found


@contextmanager
def asking(running: Running) -> Iterator[list[float]]:
    """Make ordinary requests while the block runs; tell their times, seconds."""
    seconds: list[float] = []
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.wait(ASK_EVERY):
            start = time.monotonic()
            running.get("/")
            seconds.append(time.monotonic() - start)

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask)
        try:
            yield seconds
        finally:
            is_over.set()
        asked.result()


@dataclass(frozen=True)
class Many:
    """What so many clients of one worker come to.

    Attributes:
        rss: Bytes a client.
        burst, paced: What came.
        costs: µs of CPU time an event, of both.
        asked: Seconds of each ordinary request.
    """

    count: int
    rss: float
    burst: Came
    paced: Came
    costs: tuple[float, float]
    asked: list[float]


def many(count: int, events: int) -> Many:
    with serving(gunicorn("sync")) as running:
        warm_up(running)
        before = running.rss()
        with Clients(running.port) as clients:
            clients.come(count)
            running.await_subscribers(count)
            rss = (running.rss() - before) / count
            with asking(running) as asked:
                burst, burst_cost = fan(running, clients, EVENTS, 0)
                paced, cost = fan(running, clients, events, MANY_RATE)
    return Many(count, rss, burst, paced, (burst_cost, cost), asked)


# What is printed.


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="all once, and smaller")
    parser.add_argument("--chart", type=Path, help="write a chart to this SVG file")
    options = parser.parse_args()
    # So that the servers are stopped then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    began = time.monotonic()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < CLIENTS + FILES:
        sys.exit(f"it needs a limit of {CLIENTS + FILES:,} open files, not {hard:,}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(describe("flask", "gunicorn", "gevent"))
    print(versions(), flush=True)
    servers = here()
    rounds, pairs = (1, 1) if options.quick else (ROUNDS, PAIRS)
    found: dict[Server, list[Found]] = {server: [] for server in servers}
    for _ in range(rounds):
        for server in servers:
            found[server].append(measure(server))
    table(found)
    goals(found)
    computing_goals(rounds)
    stopped_goals(pairs)
    many_goals(many(min(MANY, hard - FILES), 25 if options.quick else 100))
    if options.chart is not None:
        options.chart.write_text(chart(found))
    print(f"\n{time.monotonic() - began:.0f} s")


def median(rounds: list[Found]) -> Found:
    names = [one.name for one in fields(Found)]
    return Found(
        *(statistics.median(getattr(one, name) for one in rounds) for name in names)
    )


def ratio(mine: list[Found], theirs: list[Found], kind: str) -> float:
    """Return the median of the rounds' ratios."""
    return statistics.median(
        float(getattr(a, kind) / getattr(b, kind))
        for a, b in zip(mine, theirs, strict=True)
    )


def table(found: dict[Server, list[Found]]) -> None:
    print(
        f"\n{CLIENTS:,} clients, {EVENTS} events of {SIZE} bytes\n\n"
        "| | on | burst: events/s | CPU µs an event | / C"
        f" | paced, {RATE}/s: CPU µs an event | / C | events a read"
        " | p50 ms | p99 ms | / C | client |\n|---|---|" + "---:|" * 10
    )
    base = found[BROADCASTER]
    for server, rounds in found.items():
        one = median(rounds)
        print(
            f"| {server.name} | {server.on} | {one.burst_rate:,.0f} | {one.burst:.2f}"
            f" | {ratio(rounds, base, 'burst'):.2f} | {one.paced:.2f}"
            f" | {ratio(rounds, base, 'paced'):.2f} | {one.joined:.2f}"
            f" | {one.p50:.1f} | {one.p99:.1f} | {ratio(rounds, base, 'p99'):.2f}"
            f" | {one.share:.0%} |"
        )
    print(flush=True)


def say(is_met: bool, text: str) -> None:
    print(f"{verdict(is_met):11} {text}", flush=True)


def goals(found: dict[Server, list[Found]]) -> None:
    base = found[BROADCASTER]
    mine = [server for server in found if server.name == OUR_NAME]
    for server in mine:
        one = median(found[server])
        say(
            one.burst <= BURST_GOAL,
            f"{server.on}, burst: {one.burst:.3f} µs an event, goal {BURST_GOAL}",
        )
        if BETTER_SSE in found:
            faster = ratio(found[server], found[BETTER_SSE], "burst_rate")
            say(
                faster >= FASTER_GOAL,
                f"{server.on}, burst: {faster:.1f} times better-sse's events/s,"
                f" goal {FASTER_GOAL}",
            )
    for server in mine:
        if server.sender:
            goal = COST_GOALS[server.sender]
            cost = ratio(found[server], base, "paced")
            p99 = ratio(found[server], base, "p99")
            say(
                cost <= goal,
                f"{server.on}, paced: {cost:.2f} of C's CPU time, goal {goal}",
            )
            say(
                p99 <= P99_GOAL,
                f"{server.on}, paced: {p99:.2f} of C's p99, goal {P99_GOAL}",
            )

    if any(median(found[server]).joined > JOINED for server in (*mine, BROADCASTER)):
        print("Paced events came joined: this machine was too busy to compare them.")


def computing_goals(rounds: int) -> None:
    senders = [*filter(has, COST_GOALS)]
    found: dict[str, list[Came]] = {sender: [] for sender in senders}
    for _ in range(rounds):
        for sender in senders:
            found[sender].append(beside_computing(sender))
    print(
        "\nThe same paced, beside a request that computes, gthread\n\n"
        "| sender | p50 ms | p99 ms | longest ms | events a read |\n"
        "|---|---:|---:|---:|---:|"
    )
    p99s = {}
    for sender, came in found.items():
        p99s[sender] = statistics.median(one.p99 for one in came)
        p50 = statistics.median(one.p50 for one in came)
        most = statistics.median(one.most for one in came)
        joined = statistics.median(one.deliveries / one.reads for one in came)
        print(
            f"| {sender} | {p50 * 1e3:.1f} | {p99s[sender] * 1e3:.1f}"
            f" | {most * 1e3:.0f} | {joined:.2f} |"
        )
    print()
    for sender, p99 in p99s.items():
        if sender != CLAIM_NONE:
            say(
                p99 < BUSY_GOAL,
                f"{sender}, beside a request that computes: p99 {p99 * 1e3:.0f} ms,"
                f" goal {BUSY_GOAL * 1e3:.0f}",
            )


def stopped_goals(pairs: int) -> None:
    found = beside_stopped(pairs)
    print(
        f"\n{CLIENTS:,} that read, paced, sync; {STOPPED} that have stopped\n\n"
        "| | without them | with them | ratio | of each pair |\n"
        "|---|---:|---:|---:|---|"
    )
    ratios = []
    for index, what in enumerate(("p99 ms", "CPU µs an event")):
        without, beside = ([one[index] for one in found[key]] for key in (False, True))
        each = [b / a for a, b in zip(without, beside, strict=True)]
        ratios.append(statistics.median(each))
        print(
            f"| {what} | {statistics.median(without):.2f}"
            f" | {statistics.median(beside):.2f} | {ratios[-1]:.2f}"
            f" | {' '.join(f'{one:.2f}' for one in each)} |"
        )
    print()
    for what, one, goal in (
        ("p99", ratios[0], STOPPED_P99_GOAL),
        ("CPU time", ratios[1], STOPPED_COST_GOAL),
    ):
        say(
            one <= goal,
            f"beside those that stopped: {one:.2f} of the {what}, goal {goal}",
        )


def many_goals(found: Many) -> None:
    asked = sorted(found.asked)
    p99 = asked[len(asked) * 99 // 100]
    print(
        f"\n{found.count:,} clients, sync: {found.rss:,.0f} bytes of memory each;"
        f" burst {found.burst.deliveries / found.burst.seconds:,.0f} events/s,"
        f" {found.costs[0]:.2f} µs of CPU time an event; {MANY_RATE} events/s"
        f" {found.costs[1]:.2f} µs, p50 {found.paced.p50 * 1e3:.0f} ms,"
        f" p99 {found.paced.p99 * 1e3:.0f} ms;\n{len(asked)} ordinary requests"
        f" meanwhile: p50 {statistics.median(asked) * 1e3:.1f} ms,"
        f" p99 {p99 * 1e3:.1f} ms, the longest {asked[-1] * 1e3:.1f} ms\n"
    )
    delivered = found.burst.deliveries + found.paced.deliveries
    say(True, f"{found.count:,} clients: all {delivered:,} deliveries, in order")
    say(
        found.rss <= RSS_GOAL,
        f"{found.count:,} clients: {found.rss:,.0f} bytes each, goal {RSS_GOAL:,}",
    )
    say(
        p99 < ASK_GOAL,
        f"{found.count:,} clients, an ordinary request: p99 {p99 * 1e3:.0f} ms,"
        f" goal {ASK_GOAL * 1e3:.0f}",
    )


def chart(found: dict[Server, list[Found]]) -> str:
    """Draw CPU µs by delivered event."""
    colours = {OUR_NAME: MINE, BROADCASTER.name: THEIRS, ATTACHED.name: THEIRS}
    groups: dict[str, list[Bar]] = {}
    for heading, kind in (
        (f"{EVENTS} events at once", "burst"),
        (f"{RATE} events/s", "paced"),
    ):
        groups[heading] = [
            Bar(
                server.name,
                server.on if server is not BROADCASTER else "",
                getattr(median(rounds), kind),
                colours.get(server.name, THEIRS_TOO),
            )
            for server, rounds in found.items()
        ]
    return bars(
        f"CPU time of a delivered event, {CLIENTS:,} subscribers, one process", groups
    )


if __name__ == "__main__":
    main()
