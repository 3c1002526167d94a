"""What does a send to one of many subscribers cost, and what if a thread computes?

    python -m benchmarks.senders [--quick]

In the repository's folder, with what ``pip install .`` installs. About 3 minutes;
--quick half a one.

Each sender of `syncstream.fanout.sender` sends the same 100 bytes to 500, to 64 and to
8 TCP connections on loopback, 20 times a second: *write* is os.write, *aio* Linux AIO,
and *chosen* what `open_sender` picks here. Once alone, and once beside a thread that
computes in Python. They take turns, of a few seconds each, three times over. The CPU
time is the sending thread's, system time and the kernel's work for the receiver with
it. A fan is all subscribers once: its time is what the last of them waits. What was
received is read between two fans, while the other thread rests. The times want a
machine that does nothing else, the CPU times do not.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field

from syncstream.fanout.sender import Sender, open_sender

from .machine import describe, verdict

COUNTS = (500, 64, 8)
DATA = b"data: " + b"x" * 92 + b"\n\n"
RATE = 20.0  # fans a second
READ_EVERY = 10  # fans
AIO_GOAL, SPIN_GOAL = 1.0, 0.1  # of write's CPU time; seconds

SENDERS: dict[str, Callable[[], Sender]] = {
    "write": lambda: open_sender("write"),
    "aio": lambda: open_sender("aio"),
    "chosen": open_sender,
}


@dataclass
class Found:
    """What one sender did."""

    cpu: float = 0.0  # seconds
    fans: list[float] = field(default_factory=list)  # seconds each


class Spinner:
    """A thread that computes, where it is let."""

    def __init__(self) -> None:
        self._is_on, self._is_over = threading.Event(), False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._is_over:
            self._is_on.wait()
            sum(range(500))

    def let(self, is_on: bool) -> None:
        (self._is_on.set if is_on else self._is_on.clear)()

    def close(self) -> None:
        self._is_over = True
        self._is_on.set()
        self._thread.join()


@contextmanager
def connections(count: int) -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    with ExitStack() as stack, socket.create_server(("127.0.0.1", 0)) as listener:
        pairs = []
        for _ in range(count):
            near = stack.enter_context(socket.create_connection(listener.getsockname()))
            far = stack.enter_context(listener.accept()[0])
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            near.setblocking(False)
            pairs.append((near, far))
        yield pairs


def measure(
    pairs: list[tuple[socket.socket, socket.socket]],
    senders: dict[str, Sender],
    is_spinning: bool,
    turns: int,
    seconds: float,
) -> dict[str, Found]:
    fds = [near.fileno() for near, _ in pairs]
    found = {name: Found() for name in senders}
    with closing(Spinner()) as spinner:
        for _ in range(turns):
            for name, sender in senders.items():
                end = time.monotonic() + seconds
                while time.monotonic() < end:
                    for _ in range(READ_EVERY):
                        spinner.let(is_spinning)
                        time.sleep(1 / RATE)
                        fan(sender, fds, found[name])
                    spinner.let(False)
                    for _, far in pairs:
                        far.recv(1 << 20)
    return found


def fan(sender: Sender, fds: list[int], found: Found) -> None:
    wall, cpu = time.monotonic(), time.thread_time()
    rest = sender.send_to_all(fds, DATA)
    found.cpu += time.thread_time() - cpu
    found.fans.append(time.monotonic() - wall)
    if rest:
        raise RuntimeError(f"{len(rest)} connections did not take {len(DATA)} bytes")


def available() -> dict[str, Sender]:
    senders = {}
    for name, opens in SENDERS.items():
        try:
            senders[name] = opens()
        except OSError as error:
            print(f"{name}: {error}")
    return senders


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one turn, of a second")
    options = parser.parse_args()
    turns, seconds = (1, 1.0) if options.quick else (3, 2.5)
    print(describe(), flush=True)
    began, senders = time.monotonic(), available()
    print(
        "\n| to | beside | sender | CPU µs a send | / write | p50 ms | p99 ms | fans |"
    )
    print("|---:|---|---|---:|---:|---:|---:|---:|")
    ratios, worst = {}, {}
    for count in COUNTS:
        with connections(count) as pairs:
            for is_spinning in (False, True):
                found = measure(pairs, senders, is_spinning, turns, seconds)
                for name, one in found.items():
                    ratio, p99 = table(count, is_spinning, name, one, found["write"])
                    ratios[count, is_spinning, name] = ratio
                    worst[count, is_spinning, name] = p99
    print()
    most = COUNTS[0]
    if "aio" in senders:
        ratio = ratios[most, False, "aio"]
        print(
            f"{verdict(ratio <= AIO_GOAL):11} aio to {most:,}: {ratio:.2f} of"
            f" write's CPU time, target {AIO_GOAL}"
        )
    for name in (name for name in senders if name != "write"):
        p99 = worst[most, True, name]
        print(
            f"{verdict(p99 <= SPIN_GOAL):11} {name} to {most:,} beside a thread that"
            f" computes: p99 {p99 * 1000:.0f} ms, target {SPIN_GOAL * 1000:.0f}"
        )
    for sender in senders.values():
        sender.close()
    print(f"\n{time.monotonic() - began:.0f} s")


def table(
    count: int, is_spinning: bool, name: str, one: Found, base: Found
) -> tuple[float, float]:
    """Print a line; return the CPU time's ratio to write's, and p99 in seconds."""
    cost, other = one.cpu / len(one.fans), base.cpu / len(base.fans)
    p99 = statistics.quantiles(one.fans, n=100, method="inclusive")[98]
    print(
        f"| {count:,} | {'a spinner' if is_spinning else 'nothing'} | {name}"
        f" | {cost / count * 1e6:.2f} | {cost / other:.2f}"
        f" | {statistics.median(one.fans) * 1000:.2f} | {p99 * 1000:.1f}"
        f" | {len(one.fans)} |",
        flush=True,
    )
    return cost / other, p99


if __name__ == "__main__":
    main()
