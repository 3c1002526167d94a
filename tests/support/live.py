"""Real servers in subprocesses, a control line to their generators, a raw client.

The control line: an application under test calls `note` and `gate` of
``tests.apps.control``, over a TCP connection of its own, so that a test steps through a
generator and learns what it did, whatever the server's threads are doing.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import queue
import random
import re
import signal
import socket
import socketserver
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests import ROOT
from tests.support.waits import TIMEOUT, await_true

EVENT_SOURCE = {"Accept": "text/event-stream", "Cache-Control": "no-cache"}
"""What an EventSource asks with."""

GUNICORN = {
    "gunicorn-sync": ["-k", "sync"],
    "gunicorn-gthread": ["-k", "gthread", "--threads", "8"],
    "gunicorn-gevent": ["-k", "gevent"],
}
SERVERS = (
    *GUNICORN,
    "pywsgi",
    "werkzeug",
    "waitress",
    "cheroot",
    "uwsgi",
)
# Django's development server is in the table of docs/servers.md; beyond the promises
# themselves, nothing is asked of it.
TABLE = (*SERVERS, "runserver")
UNMARKED = ("uwsgi", "runserver")  # they never chunk: a response ends by closing


_reserved: deque[socket.socket] = deque()


def free_port() -> int:
    """Return a port nobody listens on, outside of the range of outgoing ones.

    It stays ours until a hundred others have been asked for: no other run of tests
    takes it before the server that it is for. That has SO_REUSEADDR, as all have.
    """
    while True:
        port = random.randrange(15000, 32000)
        probe = socket.socket()
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            probe.close()
            continue
        # From now on Linux lets servers bind it, and no other probe.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _reserved.append(probe)
        if len(_reserved) > 100:
            _reserved.popleft().close()
        return port


@atexit.register
def _release_ports() -> None:
    while _reserved:
        _reserved.popleft().close()


def command(kind: str, app: str, port: int, *options: str) -> list[str]:
    """Return the command that serves ``module:attribute`` by one worker."""
    if kind in GUNICORN:
        return [
            *(sys.executable, "-m", "gunicorn", *GUNICORN[kind], "-w", "1"),
            *("-b", f"127.0.0.1:{port}", "--graceful-timeout", "2"),
            *("--no-control-socket", "--log-level", "info", *options, app),
        ]
    if kind == "uwsgi":
        return [
            *(str(Path(sys.executable).with_name("uwsgi")), "--need-app"),
            *("--http-socket", f"127.0.0.1:{port}", "--threads", "8"),
            *("--die-on-term", "--wsgi", app, "--home", sys.prefix, *options),
        ]
    return [sys.executable, "-m", "tests.apps.serve", kind, app, str(port)]


class LiveServer:
    """A running server; its log and its control messages.

    Args:
        kind: One of `SERVERS`.
        app: ``module:attribute`` of the WSGI application, importable from the root.
        options: More words for the server's command line.
        env: More environment variables.
        ready: Method and path of the request that a server that is ready answers
            with 200. HEAD starts no stream.
        tls: The server speaks TLS.
        before: Words before the command: a program that runs it.
    """

    def __init__(
        self,
        kind: str,
        app: str,
        *options: str,
        env: dict[str, str] | None = None,
        ready: str = "GET /health",
        tls: bool = False,
        before: Sequence[str] = (),
    ) -> None:
        self.kind = kind
        self.control = Control()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed in stop())
        self._command = (kind, app, options)
        self._env = env or {}
        self._ready = ready
        self._tls = tls
        self._before = before
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    def start(self, port: int | None = None) -> None:
        """Start it, on the same port as before if that is given."""
        kind, app, options = self._command
        self.port = port or free_port()
        self._process = subprocess.Popen(
            [*self._before, *command(kind, app, self.port, *options)],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "CONTROL": str(self.control.port),
                **self._env,
            },
            start_new_session=True,
        )
        self._await_ready()

    def _await_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + 3 * TIMEOUT
        while True:
            try:
                with self.connect() as client:
                    client.send(f"{self._ready} HTTP/1.0\r\nHost: {self.host}\r\n\r\n")
                    if b"200" in client.read_until(b"\r\n"):
                        return
            except OSError:
                pass
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.kind} did not start:\n{self.log()}")
            time.sleep(0.02)

    @property
    def pid(self) -> int:
        """The process that was started."""
        assert self._process is not None
        return self._process.pid

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.host}"

    def connect(self) -> Client:
        sock = socket.create_connection(("127.0.0.1", self.port), TIMEOUT)
        if self._tls:
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            sock = context.wrap_socket(sock)
        return Client(sock)

    def get(self, path: str, **options: Any) -> Client:
        """Return a client that has sent a request; see `Client.request`."""
        client = self.connect()
        client.request("GET", path, **options)
        return client

    def log(self) -> str:
        """Return what the server has written so far."""
        # The server writes at the same file position: to seek would move it.
        fd = self._log.fileno()
        return os.pread(fd, os.fstat(fd).st_size, 0).decode(errors="replace")

    def tracebacks(self) -> int:
        """Count the tracebacks that the server has written.

        cheroot's own are left out: from Python 3.13 on each client that leaves
        while cheroot writes to it gets an "Exception ignored" when the file that
        could not be flushed is collected (cheroot 11.1, any application).
        """
        ignored = r"Exception ignored in: <function IOBase\.__del__.*?\n\w+Error: "
        return re.sub(ignored, "", self.log(), flags=re.DOTALL).count("Traceback")

    def await_log(self, text: str) -> None:
        """Wait until the server has written this."""
        await_true(lambda: text in self.log(), lambda: self.log())

    def signal(self, number: int) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def wait(self, timeout: float) -> int:
        """Wait for the end of the process that was started; return its status."""
        assert self._process is not None
        return self._process.wait(timeout)

    def signal_one(self, number: int) -> None:
        """Signal the process that was started, and none of its children."""
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self) -> None:
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGTERM)
        try:
            self._process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            self._process.wait()
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)  # workers that were left behind
        self._process = None

    def __enter__(self) -> LiveServer:
        return self

    def close(self) -> None:
        """Stop it, and forget its log."""
        self.control.close()
        self.stop()
        self._log.close()

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class Control:
    """The test's end of the control line.

    An application's message waits in `messages`, under the key it has chosen;
    a gate stays shut until the test opens it.
    """

    def __init__(self) -> None:
        self._queues: dict[str, queue.Queue[Any]] = {}
        self._gates: dict[str, threading.Semaphore] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        control = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                for line in self.rfile:
                    verb, key, value = json.loads(line)
                    if verb == "note":
                        control._queue(key).put(value)
                        answer = True
                    else:
                        answer = control._pass(key)
                    with contextlib.suppress(OSError):
                        self.wfile.write(json.dumps(answer).encode() + b"\n")

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            block_on_close = False
            request_queue_size = 100

            def handle_error(self, *args: object) -> None:
                """The application's process has ended: nothing to report to."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )
        self._thread.start()

    def _queue(self, key: str) -> queue.Queue[Any]:
        with self._lock:
            return self._queues.setdefault(key, queue.Queue())

    def _gate(self, key: str) -> threading.Semaphore:
        with self._lock:
            return self._gates.setdefault(key, threading.Semaphore(0))

    def _pass(self, key: str) -> bool:
        gate = self._gate(key)
        while not self._closed.is_set():
            if gate.acquire(timeout=0.1):
                return True
        return False

    def open(self, key: str, times: int = 1) -> None:
        """Let an application through a gate, that many times."""
        if times:
            self._gate(key).release(times)

    def next(self, key: str, timeout: float = TIMEOUT) -> Any:
        """Wait for the next message under a key."""
        try:
            return self._queue(key).get(timeout=timeout)
        except queue.Empty:
            raise AssertionError(f"no message {key!r} in {timeout} s") from None

    def pending(self, key: str) -> list[Any]:
        """Return the messages under a key that have come by now."""
        waiting = self._queue(key)
        return [waiting.get() for _ in range(waiting.qsize())]

    def close(self) -> None:
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Client:
    """A raw HTTP/1 client: sees what is on the wire, as it comes."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._buffer = b""
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body: Iterator[bytes] | None = None
        self._asks_for_events = False
        self.is_whole = False  # the body's end was marked, or it had a length

    def send(self, text: str) -> None:
        self.socket.sendall(text.encode())

    def request(
        self,
        method: str,
        path: str,
        *,
        version: str = "1.1",
        headers: dict[str, str] | None = None,
    ) -> None:
        """Send a request."""
        self._asks_for_events = "event-stream" in (headers or {}).get("Accept", "")
        lines = [f"{method} {path} HTTP/{version}", "Host: localhost"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        self._method = method
        self.send("\r\n".join([*lines, "", ""]))

    def _receive(self) -> bytes:
        return self.socket.recv(65536)

    def read_until(self, mark: bytes) -> bytes:
        """Return what comes up to and with a mark; all there is if it ends before."""
        while mark not in self._buffer:
            data = self._receive()
            if not data:
                break
            self._buffer += data
        found, self._buffer = self._split(mark)
        return found

    def _split(self, mark: bytes) -> tuple[bytes, bytes]:
        head, mark, rest = self._buffer.partition(mark)
        return head + mark, rest

    def read_head(self) -> None:
        """Read the response's head into `status` and `headers`."""
        head = self.read_until(b"\r\n\r\n").decode("latin-1")
        if not head:
            raise EOFError("the connection ended before the head")
        first, *lines = head.split("\r\n")
        self.status = int(first.split()[1])
        pairs = (line.partition(":") for line in lines if line)
        self.headers = {name.lower(): value.strip() for name, _, value in pairs}
        self.body = self._decode()

    def _decode(self) -> Iterator[bytes]:
        """Yield the body's pieces as they come, without the chunks' framing."""
        if self.headers.get("transfer-encoding", "") == "chunked":
            while True:
                size_line = self.read_until(b"\r\n")
                if not size_line.endswith(b"\r\n"):
                    return
                size = int(size_line, 16)
                while len(self._buffer) < size + 2:
                    data = self._receive()
                    if not data:
                        return
                    self._buffer += data
                data, self._buffer = self._buffer[:size], self._buffer[size + 2 :]
                if size == 0:
                    self.is_whole = True
                    return
                yield data
        left = int(self.headers.get("content-length", sys.maxsize))
        while left:
            data = self._buffer or self._receive()
            self._buffer = b""
            if not data:
                return
            left -= len(data)
            yield data
        self.is_whole = True

    def chunk(self) -> bytes:
        """Return the next piece of the body, ``b""`` at its end."""
        if self.body is None:
            self.read_head()
        assert self.body is not None
        return next(self.body, b"")

    def block(self) -> bytes:
        """Return the body up to the next blank line, and not a byte more.

        Or a comment's line alone, where the client has asked for an event stream: then
        no blank line follows. Whatever else has come is kept for the next call.
        """
        if self.body is None:
            self.read_head()
        self._text = getattr(self, "_text", b"")
        while (mark := self._mark()) not in self._text:
            data = self.chunk()
            if not data:
                break
            self._text += data
        block, mark, self._text = self._text.partition(mark)
        return block + mark

    def _mark(self) -> bytes:
        is_line = self._asks_for_events and self._text.startswith(b":")
        return b"\n" if is_line else b"\n\n"

    def rest(self) -> bytes:
        """Return the body up to its end."""
        if self.body is None:
            self.read_head()
        assert self.body is not None
        text = getattr(self, "_text", b"")
        self._text = b""
        return text + b"".join(self.body)

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


EVENT_SOURCE = {"Accept": "text/event-stream", "Cache-Control": "no-cache"}
"""What a browser's EventSource sends, and we tell it by."""

_keys = itertools.count()


def unique_key() -> str:
    """Return a key for the control line that no other test uses."""
    return f"k{next(_keys)}-{os.getpid()}"
