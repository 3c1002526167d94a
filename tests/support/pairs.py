"""Connections without a server: TCP pairs, and the places where a stream runs."""

from __future__ import annotations

import ctypes
import queue
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from syncstream.fanout.departure import Departure
from syncstream.protocol import sse
from syncstream.runtime.sockets import is_hung_up
from syncstream.runtime.watch import watch
from syncstream.streams.contract import Format
from syncstream.streams.stream import Stream
from tests import ROOT
from tests.support.waits import TIMEOUT, await_true

WORK = 4 * TIMEOUT  # seconds that what runs beside a test may take, if it is much
EVENTS = Format(sse.encoder(), sse.ends_blank, is_events=True)


class Line:
    """A connection as a stream sees it."""

    label = "GET '/test'"
    last_event_id = None
    is_event_source = True
    parses_events = False
    write = None
    stopping = None
    server_key = None
    may_vanish = False
    is_multiprocess = False
    shows_errors = False
    lets_exits_through = False
    hooks = ()

    def __init__(self, sock: socket.socket | None = None) -> None:
        self.sock = sock

    server = SimpleNamespace(clears_environ=False)

    @property
    def fd(self) -> int | None:
        return None if self.sock is None else self.sock.fileno()

    def before_wait(self) -> None:
        """Nothing is held."""

    def warn(self) -> None:
        """Nothing is wrong with it."""

    def find_write(self) -> None:
        """There is none but ours."""

    def leave_write(self) -> None:
        """There is none but ours."""

    def has_got(self, size: int) -> bool:
        return True

    def is_full(self) -> bool:
        return False

    def unsent(self) -> int:
        return 0

    def swap(self) -> None:
        """It stays where it is."""

    def is_hung_up(self) -> bool:
        return self.sock is not None and is_hung_up(self.sock.fileno())

    def drop(self) -> None:
        """Nobody waits for a write."""

    def cut(self) -> BaseException:
        return ConnectionResetError("cut")


class Browser(Line):
    """One of an EventSource's."""

    is_event_source = parses_events = True


def stream_of(source: Any, line: Any = None, **options: Any) -> Stream:
    """Return a stream of events, to a line."""
    stream = Stream(source, EVENTS, departure=Departure, **options)
    if line is not None:
        stream.connect(line)
    return stream


@contextmanager
def tcp_pair() -> Any:
    """Give a server's and a client's end of one connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    with server, client:
        yield server, client


def leave(client: socket.socket, how: str = "FIN") -> None:
    """Leave as clients do: "FIN", "RST" or "bytes, FIN"."""
    if how == "RST":
        linger = struct.pack("ii", 1, 0)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    elif how == "bytes, FIN":
        client.sendall(b"GET /health HTTP/1.1\r\n\r\n")
    client.close()


def vanish(client: socket.socket) -> None:
    """Let the kernel drop what comes for a client: nothing is acknowledged any more."""
    drop_all = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
    program = struct.pack("HL", 1, ctypes.addressof(drop_all))  # struct sock_fprog
    attach_filter = 26  # SO_ATTACH_FILTER, asm-generic/socket.h
    client.setsockopt(socket.SOL_SOCKET, attach_filter, program)


class Threads:
    """Streams in threads."""

    name = "threads"

    def pause(self, seconds: float = 0.002) -> None:
        time.sleep(seconds)

    def await_true(self, condition: Callable[[], Any]) -> None:
        await_true(condition)

    def watch(self) -> Any:
        return watch()

    def start(self, function: Callable[[], object]) -> Callable[[], Any]:
        """Run something beside us; return what waits for its outcome."""
        outcome: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def run() -> None:
            try:
                outcome.put((function(), None))
            except BaseException as error:
                outcome.put((None, error))

        thread = threading.Thread(target=run)
        thread.start()

        def join() -> Any:
            thread.join(WORK)
            value, error = outcome.get(timeout=0.1)
            if error is not None:
                raise error
            return value

        return join


class Greenlets:
    """Streams in greenlets; the standard library is not patched."""

    name = "gevent"

    def pause(self, seconds: float = 0.002) -> None:
        import gevent

        gevent.sleep(seconds)

    def await_true(self, condition: Callable[[], Any]) -> None:
        import gevent

        await_true(condition, pause=gevent.sleep)

    def watch(self) -> Any:
        import gevent

        return gevent.spawn(watch).get()

    def start(self, function: Callable[[], object]) -> Callable[[], Any]:
        """Run something beside us; return what waits for its outcome."""
        import gevent

        greenlet = gevent.spawn(_outcome, function)

        def join() -> Any:
            value, error = greenlet.get(timeout=WORK)
            if error is not None:
                raise error
            return value

        return join


def _outcome(function: Callable[[], object]) -> tuple[object, BaseException | None]:
    try:
        return function(), None
    except BaseException as error:
        return None, error


def serve(stream: Any) -> list[bytes]:
    """Do what a server does with a stream; return what it yields."""
    try:
        return list(stream)
    finally:
        stream.close()


def run_script(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a Python script by itself, in Python's development mode."""
    return subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", script, *words],
        capture_output=True,
        text=True,
        timeout=100,  # CI gives a test 120
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )


def check_script(script: str, *words: str) -> str:
    """Run a script that must succeed and complain of nothing; return its output."""
    done = run_script(script, *words)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


def read_for_the_newest(hub: Any) -> int:
    """Return how many events a hub reads of its broker to give the newest of five."""
    hub.publish_many("newest", "12345")
    read, count = hub.broker.read, 0

    def counted(*words: Any) -> Any:
        nonlocal count
        page = read(*words)
        count += len(page.entries)
        return page

    hub.broker.read = counted
    subscription = hub.subscribe("newest", after=1)
    try:
        assert [event.data for event in subscription.read(TIMEOUT)] == ["5"]
    finally:
        subscription.close()
        hub.broker.read = read
    return count


def come_and_go(here: Any, there: Any) -> None:
    """Check that two hubs, which keep 3 events, tell of who comes and keep all events.

    Its watchers are at both, one of them by a pattern.
    """
    ids = here.publish_many("room", "123")
    watchers = [
        hub.subscribe(*names)
        for hub, names in ((here, ["room"]), (there, ["room"]), (there, ["#"]))
    ]
    for watcher in watchers:
        watcher.begin()
    for _ in range(3):
        guest = here.subscribe("room", who="ann", announce=True)
        guest.begin()
        guest.close()
    for watcher in watchers:
        told: list[Any] = []
        while len(told) < 6:
            events = watcher.read(TIMEOUT)
            assert events, f"waited {TIMEOUT} s in vain, after {told}"
            told += [event.event or event.data for event in events]
        assert told == ["join", "leave"] * 3
        watcher.close()
    assert [entry.id for entry in there.broker.read("room", "0").entries] == ids
    assert here.head("room") == ids[-1]
