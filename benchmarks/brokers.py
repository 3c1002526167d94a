"""How fast is each broker, between four processes of one machine?

    python -m benchmarks.brokers [--quick] [--only NAME …]

In the repository's folder, with ``pip install gevent`` and what a broker needs; one
whose engine is not there is left out, and said to be. About a minute for each row;
--quick about a third of that.

Four processes share a broker, by threads, or patched by gevent. *publish -> receive*:
one of them publishes 200 events a second by its hub, and all four read a subscription;
the time is from before ``hub.publish`` to after ``subscription.read``, by one clock,
of all that all have read. *single*: two threads (greenlets) of each publish one event
after the other, as fast as they can, to one channel, and all four are told of each;
*batched*: a hundred by each call. *10,000*: the p99 where all four listen to so many
channels, and one of them publishes 200 events a second, by turns to all; *CPU*: what
that takes of a process that only listens. *alone*: one thread of one process, and
nobody listens. *idle*: CPU time of a process that listens, and nothing comes. *floor*:
the p99 of a bare datagram from one to all four, in the same minute: what the machine's
other work costs anybody.

Each event has 200 bytes. Every run checks that everybody got every event once, and in
the order of its publisher. Each row is measured three times; the table has the best of
each figure, because other work on the machine only ever makes them worse.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from syncstream import Hub
from syncstream.brokers import open_broker
from syncstream.brokers.log import Entry
from syncstream.errors import BrokerError

from .machine import describe, verdict

PROCESSES, THREADS, SIZE, BATCH = 4, 2, 200, 100
RATE, TIMEOUT, CHANNELS = 200, 60.0, 10_000
KEPT = 200_000  # events: no one is to fall behind what is kept


class Missing(Exception):
    """An engine is not there; says what to install."""


@contextmanager
def local() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="syncstream-") as folder:
        yield f"local:{folder}/log"


@contextmanager
def redis_server() -> Iterator[str]:
    program = shutil.which("redis-server")
    if program is None or importlib.util.find_spec("redis") is None:
        raise Missing("apt-get install redis-server; pip install redis")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    words = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
        try:
            url = f"redis://127.0.0.1:{port}?publish_timeout=10"
            await_broker(url, process)
            yield url
        finally:
            process.terminate()


@contextmanager
def postgresql() -> Iterator[str]:
    """Start a server as its Debian package would have it, commits are flushed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    program = shutil.which("initdb") or (str(found[-1]) if found else None)
    if program is None or importlib.util.find_spec("psycopg") is None:
        raise Missing("apt-get install postgresql; pip install 'psycopg[binary]'")
    # It does not run as root.
    user: Any = {} if os.geteuid() else {"user": "postgres", "extra_groups": []}
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="syncstream-") as folder:
        if user:
            shutil.chown(folder, "postgres", "postgres")
        quiet: Any = {"stdout": subprocess.DEVNULL, "cwd": folder, **user}
        data = f"{folder}/data"
        words = [program, "-D", data, "-U", "postgres", "--auth=trust"]
        subprocess.run(words, check=True, **quiet)
        words = [str(Path(program).with_name("postgres")), "-D", data, "-p", str(port)]
        words += ["-h", "127.0.0.1", "-k", folder]
        with subprocess.Popen(words, stderr=subprocess.DEVNULL, **quiet) as process:
            try:
                url = f"postgresql://postgres@127.0.0.1:{port}/postgres"
                await_broker(url, process)
                yield url
            finally:
                process.send_signal(signal.SIGINT)  # clients or not


def await_broker(url: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until an engine answers."""
    broker = open_broker(url)
    while True:
        try:
            broker.read("bench", None)
        except BrokerError:
            if process.poll() is not None:
                raise
            time.sleep(0.05)
        else:
            break
    broker.close()


# A broker's name: what starts its engine, and yields its URL; it may raise `Missing`.
OPENERS: dict[str, Callable[[], AbstractContextManager[str]]] = {
    "local": local,
    "redis": redis_server,
    "postgresql": postgresql,
}


@dataclass(frozen=True)
class Goal:
    """Milliseconds, publishes a second, percent of a CPU; ``None``: no goal."""

    p99: float | None = None
    single: float | None = None
    batched: float | None = None
    many_p99: float | None = None
    many_cpu: float | None = None


GOALS = {
    "local": Goal(p99=2.0, single=4_000, batched=15_000),
    "redis": Goal(many_p99=3.0, many_cpu=5.0),
}


# One of the processes.


class Control:
    """Lines of JSON between the processes; by a socket, so that greenlets can wait."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._file = sock.makefile("r")

    def send(self, value: Any) -> None:
        self.socket.sendall(json.dumps(value).encode() + b"\n")

    def receive(self) -> Any:
        line = self._file.readline()
        if not line:
            raise EOFError("the other process has ended")
        return json.loads(line)

    def close(self) -> None:
        self._file.close()
        self.socket.close()


def payload(number: int, at: float = 0.0) -> str:
    return f"{number} {at!r} ".ljust(SIZE, "x")


def paced(control: Control, url: str, count: int, is_publisher: bool) -> Any:
    """Return the milliseconds that each event took."""
    with_hub = Hub(url)
    subscription = with_hub.subscribe("bench")
    subscription.begin()
    control.send("ready")
    control.receive()

    def publish() -> None:
        begin = time.monotonic()
        for number in range(count):
            time.sleep(max(0.0, begin + number / RATE - time.monotonic()))
            with_hub.publish("bench", payload(number, time.monotonic()))

    publisher = threading.Thread(target=publish)
    if is_publisher:
        publisher.start()
    times: list[float] = []
    while len(times) < count:
        events = subscription.read(TIMEOUT)
        now = time.monotonic()
        assert events, "nothing came"
        for event in events:
            number, at, _ = (event.data or "").split(" ")
            assert int(number) == len(times), f"{number} came as {len(times)}"
            times.append((now - float(at)) * 1000)
    if is_publisher:
        publisher.join()
    with_hub.close()
    return times


class Timed:
    """A sink that takes the time."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def deliver(self, channel: str, entry: Entry) -> None:
        number, at, _ = entry.payload.split(b" ", 2)
        assert int(number) == len(self.times), f"{number!r} came too soon"
        self.times.append((time.monotonic() - float(at)) * 1000)

    def resync(self, channels: Iterable[str] | None) -> None:
        """Shows by what is missing."""

    def state(self, is_up: bool, reason: str) -> None:
        """The same."""

    def deny(self, name: str, reason: str) -> None:
        """The same."""


def many(control: Control, url: str, count: int, is_publisher: bool) -> Any:
    """Return the milliseconds of each event, of many channels; and the CPU's part."""
    broker, timed = open_broker(url), Timed()
    broker.attach(timed)
    for number in range(CHANNELS):
        broker.watch(f"bench:{number}")
    control.send("ready")
    control.receive()
    cpu, begin = time.process_time(), time.monotonic()
    if is_publisher:
        for number in range(count):
            time.sleep(max(0.0, begin + number / RATE - time.monotonic()))
            text = payload(number, time.monotonic()).encode()
            broker.publish([(f"bench:{number * 7919 % CHANNELS}", text)])
    while len(timed.times) < count:
        assert time.monotonic() - begin < count / RATE + TIMEOUT, "nothing came"
        time.sleep(0.1)
    percent = (time.process_time() - cpu) / (time.monotonic() - begin) * 100
    broker.close()
    return [timed.times, percent]


class Told:
    """A sink that counts, and checks the order of each publisher."""

    def __init__(self) -> None:
        self.count = 0
        self.reason = ""
        self._numbers: dict[bytes, int] = {}

    def deliver(self, channel: str, entry: Entry) -> None:
        who, number, _ = entry.payload.split(b" ", 2)
        if int(number) != self._numbers.get(who, -1) + 1:
            self.reason = f"{number!r} after {self._numbers.get(who)}"
        self._numbers[who] = int(number)
        self.count += 1

    def resync(self, channels: Iterable[str] | None) -> None:
        self.reason = "some may be lost"

    def state(self, is_up: bool, reason: str) -> None:
        """Shows by what is missing."""

    def deny(self, name: str, reason: str) -> None:
        self.reason = reason


def flat_out(
    control: Control,
    url: str,
    name: str,
    seconds: float,
    batch: int,
    threads: int,
    listens: bool,
) -> Any:
    """Return how many were published in which time; all of them must be told."""
    broker = open_broker(url, capacity=KEPT)
    told = Told()
    if listens:
        broker.attach(told)
        broker.watch("bench")
    control.send("ready")
    control.receive()
    end = time.monotonic() + seconds
    counts = [0] * threads

    def publish(who: int) -> None:
        while time.monotonic() < end:
            first = counts[who]
            items = [
                ("bench", f"{name}.{who} {number} ".encode().ljust(SIZE, b"x"))
                for number in range(first, first + batch)
            ]
            broker.publish(items)
            counts[who] += batch

    began = time.monotonic()
    publishers = [threading.Thread(target=publish, args=(n,)) for n in range(threads)]
    for publisher in publishers:
        publisher.start()
    for publisher in publishers:
        publisher.join()
    control.send([sum(counts), time.monotonic() - began])
    total = control.receive()
    deadline = time.monotonic() + TIMEOUT
    while listens and told.count < total and time.monotonic() < deadline:
        time.sleep(0.01)
    is_right = not listens or (told.count == total and not told.reason)
    broker.close()
    return "ok" if is_right else f"{told.count} of {total} told, {told.reason}"


def idle(control: Control, url: str, seconds: float) -> Any:
    """Return the percentage of a CPU."""
    hub = Hub(url)
    subscription = hub.subscribe("bench")
    subscription.begin()
    subscription.read(0.5)
    before, began = time.process_time(), time.monotonic()
    subscription.read(seconds)
    used = time.process_time() - before
    percent = used / (time.monotonic() - began) * 100
    hub.close()
    return percent


def floor(
    control: Control, url: str, folder: str, name: int, count: int, is_publisher: bool
) -> Any:
    """Return the milliseconds that each bare datagram took."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(TIMEOUT)
        sock.bind(f"{folder}/{name}")
        control.send("ready")
        control.receive()

        def send() -> None:
            begin = time.monotonic()
            for number in range(count):
                time.sleep(max(0.0, begin + number / RATE - time.monotonic()))
                for other in range(PROCESSES):
                    text = repr(time.monotonic()).encode()
                    sock.sendto(text, f"{folder}/{other}")

        sender = threading.Thread(target=send)
        if is_publisher:
            sender.start()
        times = []
        for _ in range(count):
            at = float(sock.recv(100))
            times.append((time.monotonic() - at) * 1000)
        if is_publisher:
            sender.join()
    return times


def node(fd: int, url: str) -> None:
    control = Control(socket.socket(fileno=fd))
    tasks: dict[str, Callable[..., Any]] = {
        "paced": paced,
        "many": many,
        "flat_out": flat_out,
        "idle": idle,
        "floor": floor,
    }
    while True:
        try:
            name, options = control.receive()
        except EOFError:
            return
        control.send(tasks[name](control, url, **options))


# The one that measures.


@contextmanager
def processes(url: str, kind: str, count: int) -> Iterator[list[Control]]:
    with ExitStack() as stack:
        controls = []
        for _ in range(count):
            ours, theirs = socket.socketpair()
            with theirs:
                fd = theirs.fileno()
                words = ["-m", "benchmarks.brokers", "--node", kind, str(fd), url]
                process = subprocess.Popen([sys.executable, *words], pass_fds=[fd])
            stack.callback(process.wait, TIMEOUT)
            ours.settimeout(2 * TIMEOUT)
            controls.append(Control(ours))
            stack.callback(controls[-1].close)
        yield controls


def all_do(
    controls: list[Control], name: str, *, each: list[dict[str, Any]] | None = None
) -> None:
    """Have all begin a task, and wait until they are ready."""
    for place, control in enumerate(controls):
        control.send([name, each[place] if each else {}])


def answers(controls: list[Control]) -> list[Any]:
    return [control.receive() for control in controls]


def one_publishes(controls: list[Control], task: str, count: int) -> list[Any]:
    """Have one publish so many events while all take them; return the answers."""
    each = [{"count": count, "is_publisher": not n} for n in range(len(controls))]
    all_do(controls, task, each=each)
    assert set(answers(controls)) == {"ready"}
    for control in controls:
        control.send("go")
    return answers(controls)


def measure_paced(controls: list[Control], count: int) -> tuple[float, float]:
    found = one_publishes(controls, "paced", count)
    times = sorted(time for each in found for time in each)
    return times[len(times) // 2], times[len(times) * 99 // 100]


def measure_many(controls: list[Control], count: int) -> tuple[float, float]:
    found = one_publishes(controls, "many", count)
    times = sorted(time for took, _ in found for time in took)
    return times[len(times) * 99 // 100], max(percent for _, percent in found[1:])


def measure_floor(controls: list[Control], count: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        each = [
            {"folder": folder, "name": n, "count": count, "is_publisher": not n}
            for n in range(len(controls))
        ]
        all_do(controls, "floor", each=each)
        assert set(answers(controls)) == {"ready"}
        for control in controls:
            control.send("go")
        times: list[float] = sorted(each for took in answers(controls) for each in took)
    return times[len(times) * 99 // 100]


def measure_flat_out(
    controls: list[Control], seconds: float, batch: int, *, threads: int = THREADS
) -> float:
    each = [
        {
            "name": str(number),
            "seconds": seconds,
            "batch": batch,
            "threads": threads,
            "listens": len(controls) > 1,
        }
        for number in range(len(controls))
    ]
    all_do(controls, "flat_out", each=each)
    assert set(answers(controls)) == {"ready"}
    for control in controls:
        control.send("go")
    found: list[tuple[int, float]] = answers(controls)
    total = sum(count for count, _ in found)
    for control in controls:
        control.send(total)
    for answer in answers(controls):
        assert answer == "ok", answer
    return total / max(seconds for _, seconds in found)


def measure_idle(control: Control, seconds: float) -> float:
    control.send(["idle", {"seconds": seconds}])
    percent: float = control.receive()
    return percent


@dataclass(frozen=True)
class Row:
    p50: float  # ms
    p99: float
    single: float  # publishes a second
    batched: float
    alone: float
    idle: float  # percent
    floor: float  # ms, p99
    many_p99: float  # ms
    many_cpu: float  # percent


def measure(name: str, kind: str, quick: bool) -> Row:
    seconds = 1.0 if quick else 3.0
    with OPENERS[name]() as url, processes(url, kind, PROCESSES) as controls:
        count = 400 if quick else 1000
        p50, p99 = measure_paced(controls, count)
        with processes(url, "threads", PROCESSES) as plain:
            least = measure_floor(plain, count)
        single = measure_flat_out(controls, seconds, 1)
        batched = measure_flat_out(controls, seconds, BATCH)
        alone = measure_flat_out(controls[:1], seconds, 1, threads=1)
        percent = measure_idle(controls[0], 2 * seconds)
        many_p99, many_cpu = measure_many(controls, count)
    return Row(p50, p99, single, batched, alone, percent, least, many_p99, many_cpu)


def best(rows: list[Row]) -> Row:
    return Row(
        min(row.p50 for row in rows),
        min(row.p99 for row in rows),
        max(row.single for row in rows),
        max(row.batched for row in rows),
        max(row.alone for row in rows),
        min(row.idle for row in rows),
        min(row.floor for row in rows),
        min(row.many_p99 for row in rows),
        min(row.many_cpu for row in rows),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="shorter, and once")
    parser.add_argument("--only", nargs="+", choices=OPENERS, default=list(OPENERS))
    parser.add_argument("--node", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.node:
        kind, fd, url = options.node
        if kind == "gevent":
            from gevent import monkey

            monkey.patch_all()
        node(int(fd), url)
        return
    print(describe("gevent", "redis", "psycopg"))
    print(
        f"{PROCESSES} processes, {THREADS} publishers each, {SIZE} bytes an event;"
        f" batches of {BATCH}\n"
    )
    print(f"{'':21} {'publish -> receive, ms':>39} {'publishes a second':>29}")
    heads: tuple[str, ...] = ("p50", "p99", "floor", "10,000")
    heads += ("single", "batched", "alone", "idle, %", "CPU, %")
    print(f"{'broker':12} {'by':8}", *(f"{head:>9}" for head in heads))
    verdicts = []
    for name in options.only:
        for kind in ("threads", "gevent"):
            try:
                rows = [
                    measure(name, kind, options.quick)
                    for _ in range(1 if options.quick else 3)
                ]
            except Missing as missing:
                print(f"{name:12} {kind:8} left out: {missing}")
                continue
            row = best(rows)
            print(
                f"{name:12} {kind:8} {row.p50:9.2f} {row.p99:9.2f} {row.floor:9.2f}"
                f" {row.many_p99:9.2f} {row.single:9,.0f} {row.batched:9,.0f}"
                f" {row.alone:9,.0f} {row.idle:9.2f} {row.many_cpu:9.2f}",
                flush=True,
            )
            goal = GOALS.get(name, Goal())
            for text, value, limit in (
                ("p99 under {} ms", row.p99, goal.p99),
                ("p99 at 10,000 channels under {} ms", row.many_p99, goal.many_p99),
                ("CPU at 10,000 channels under {} %", row.many_cpu, goal.many_cpu),
                ("{:,} single", -row.single, goal.single and -goal.single),
                ("{:,} batched", -row.batched, goal.batched and -goal.batched),
            ):
                if limit is not None:
                    said = text.format(abs(limit))
                    verdicts.append(
                        f"{verdict(value <= limit)}: {name} by {kind}, {said}"
                    )
    print("", *verdicts, sep="\n")
    print(f"load {' '.join(f'{value:.2f}' for value in os.getloadavg())} at the end")


if __name__ == "__main__":
    main()
