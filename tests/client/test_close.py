"""`close` and `reconnect` from another thread or greenlet, while the server is silent.

Each way of being silent, over HTTP and HTTPS; with threads here, with gevent in a
process of its own, which runs this file.
"""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from syncstream import SSEResponse, current_stream
from syncstream.client import EventSource
from syncstream.streams.links import Link
from syncstream.testing import Client
from tests import ROOT
from tests.support.raw_server import HEAD, RawServer, Request, answer

pytestmark = pytest.mark.timeout(60)

AT_ONCE = 1.0  # seconds: what a busy machine may take for what takes a millisecond

CHUNKED = HEAD[:-2] + b"Transfer-Encoding: chunked\r\n\r\n"
EVENT = b"id: 1\ndata: a\n\n"
# What the server sends before it says no more, and how many events that holds.
SILENCES = {
    "before the head": (b"", 0),
    "in the head": (HEAD[:30], 0),
    "after the head": (HEAD, 0),
    "after an event": (HEAD + EVENT, 1),
    "in an event": (HEAD + EVENT + b"data: b", 1),
    "in a chunk": (CHUNKED + b"%x\r\n" % 100 + EVENT, 1),
    "between chunks": (CHUNKED + b"%x\r\n%b\r\n" % (len(EVENT), EVENT), 1),
    "of gzip": (HEAD[:-2] + b"Content-Encoding: gzip\r\n\r\n\x1f\x8b", 0),
}


@pytest.fixture(scope="module")
def context(tmp_path_factory: Any) -> ssl.SSLContext:
    """A certificate that nobody trusts."""
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-nodes", "-days", "2"]
    command += ["-pkeyopt", "ec_paramgen_curve:prime256v1", "-subj", "/CN=localhost"]
    subprocess.run(
        [*command, "-keyout", key, "-out", cert], check=True, capture_output=True
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return context


@pytest.fixture(scope="module")
def servers(context) -> Iterator[dict[str, RawServer]]:
    def serve(request: Request, sock: Any) -> None:
        name = list(SILENCES)[int(request.path.strip("/").partition("/")[0])]
        sock.sendall(SILENCES[name][0])
        servers[scheme_of(sock)].wait_for_hang_up(sock)

    def scheme_of(sock: Any) -> str:
        return "https" if isinstance(sock, ssl.SSLSocket) else "http"

    with RawServer(serve) as plain, RawServer(serve, context) as secure:
        servers = {"http": plain, "https": secure}
        yield servers


def session_for(server: RawServer) -> requests.Session:
    session = requests.Session()
    session.trust_env = False  # the name of a bundle there would win
    session.verify = not server.url.startswith("https")
    return session


class Reader:
    """A thread (under gevent a greenlet) that iterates a source."""

    def __init__(self, source: EventSource) -> None:
        self.events: list[Any] = []
        self.error: BaseException | None = None
        self._source = source
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for event in self._source:
                self.events.append(event.data)
        except BaseException as error:
            self.error = error

    def join(self, timeout: float) -> bool:
        """Wait for its end; ``False`` if it has not come."""
        self._thread.join(timeout)
        return not self._thread.is_alive()


def await_silence(server: RawServer, reader: Reader, path: str, count: int) -> None:
    """Wait until the client has all that the server sends."""
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        asked = any(request.path == path for request in server.requests)
        if asked and len(reader.events) >= count:
            return
        time.sleep(0.002)
    raise AssertionError(f"{path} {reader.events} {reader.error!r}")


@pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning")
@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("silence", SILENCES)
def test_close_ends_a_blocked_read(servers, silence, scheme):
    """It returns at once, the iteration ends at once, and the server sees it leave."""
    server = servers[scheme]
    path = f"/{list(SILENCES).index(silence)}"
    server.hung_up.clear()
    with session_for(server) as session:
        source = EventSource(server.url + path[1:], session=session, read_timeout=None)
        reader = Reader(source)
        await_silence(server, reader, path, SILENCES[silence][1])
        began = time.monotonic()
        source.close()
        closed = time.monotonic() - began
        assert reader.join(15)
        ended = time.monotonic() - began
    assert reader.error is None
    assert reader.events == ["a"] * SILENCES[silence][1]
    assert source.state == "closed"
    assert closed < AT_ONCE
    assert ended < AT_ONCE
    assert server.hung_up.wait(15)


@pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning")
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_reconnect_ends_a_blocked_read(servers, scheme):
    """The next attempt begins at once, with the last event's id, and no error."""
    server = servers[scheme]
    number = list(SILENCES).index("in an event")
    path = f"/{number}/{scheme}/{os.getpid()}/{time.monotonic()}"
    errors: list[Any] = []
    with (
        session_for(server) as session,
        EventSource(
            server.url + path[1:],
            session=session,
            backoff=(100, 100),
            on_error=errors.append,
        ) as source,
    ):
        reader = Reader(source)
        for count in range(1, 4):
            await_silence(server, reader, path, count)
            began = time.monotonic()
            source.reconnect()
        await_silence(server, reader, path, 4)
        assert time.monotonic() - began < AT_ONCE
        assert source.state == "open"
    assert reader.join(15)
    assert (errors, reader.error, reader.events) == ([], None, ["a"] * 4)
    asked = [r for r in server.requests if r.path == path]
    assert [r.headers.get("last-event-id") for r in asked] == [None, "1", "1", "1"]


@pytest.mark.parametrize("how", ["close", "reconnect"])
def test_a_wait_for_the_next_attempt_ends(how):
    """It is cut short."""
    waiting = threading.Event()
    with (
        RawServer([answer(500), answer(204, kind="")]) as server,
        EventSource(
            server.url, backoff=(100, 100), on_error=lambda _: waiting.set()
        ) as source,
    ):
        reader = Reader(source)
        assert waiting.wait(15)
        time.sleep(0.05)  # into the wait, most often; before it, it ends as well
        began = time.monotonic()
        getattr(source, how)()
        assert reader.join(15)
        assert time.monotonic() - began < AT_ONCE
        assert len(server.requests) == (1 if how == "close" else 2)
    assert reader.error is None


def test_close_between_two_events():
    """Nobody reads just then: what has come already is not delivered any more."""
    with RawServer([HEAD + EVENT * 3]) as server:
        source = EventSource(server.url)
        assert next(source).data == "a"
        closing = threading.Thread(target=source.close)
        closing.start()
        closing.join()
        assert list(source) == []
        source.close()
        source.reconnect()
        assert list(source) == []
    assert len(server.requests) == 1


def test_close_before_the_first_read():
    """Nothing is asked."""
    with RawServer([HEAD]) as server:
        source = EventSource(server.url)
        source.close()
        assert (list(source), source.state, server.requests) == ([], "closed", [])


def test_the_connection_is_closed_with_the_block():
    """Leaving a loop and the block hangs up."""

    def serve(request, sock):
        sock.sendall(HEAD + EVENT)
        server.wait_for_hang_up(sock)

    with RawServer(serve) as server, EventSource(server.url) as source:
        for _ in source:
            break
        assert not server.hung_up.is_set()
        source.close()
        assert server.hung_up.wait(15)


def test_close_at_any_moment(servers):
    """A race of the two threads ends with both, and leaves nothing open."""
    server = servers["http"]
    number = list(SILENCES).index("after an event")
    fds = "/proc/self/fd"
    before = len(os.listdir(fds)) if os.path.isdir(fds) else 0
    for turn in range(60):
        source = EventSource(f"{server.url}{number}/{turn}")
        reader = Reader(source)
        time.sleep(turn / 20000)
        source.close()
        assert reader.join(15)
        assert reader.error is None
    deadline = time.monotonic() + 15  # the server's ends are in this process, too
    while os.path.isdir(fds) and len(os.listdir(fds)) > before + 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_read_timeout():
    """Silence ends the connection; a comment is a sign of life."""
    errors: list[str] = []

    def serve(request, sock):
        sock.sendall(HEAD)
        for _ in range(5 if request.number else 0):
            time.sleep(0.05)
            sock.sendall(b": alive\n\n")
        if request.number == 1:
            sock.sendall(EVENT)
        server.wait_for_hang_up(sock)

    with (
        RawServer(serve) as server,
        EventSource(
            server.url,
            read_timeout=0.2,
            backoff=(0.001, 0.001),
            on_error=lambda error: errors.append(str(error)),
        ) as source,
    ):
        assert next(source).data == "a"
        assert len(server.requests) == 2
    assert errors == ["the response broke off: ReadTimeoutError"]


def test_a_source_can_be_linked(servers):
    """A stream's ``link`` closes it, so that it does not connect again."""
    server = servers["http"]
    path = f"/{list(SILENCES).index('after an event')}/linked"
    source = EventSource(server.url + path[1:])
    reader = Reader(source)
    await_silence(server, reader, path, 1)
    assert current_stream() is None
    Link(source).unblock()
    assert reader.join(15)
    assert (source.state, reader.error) == ("closed", None)


GEVENT = """
import gevent.monkey
gevent.monkey.patch_all()
import sys, pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_with_gevent(tmp_path):
    """All of this file with greenlets, in a process that gevent has patched."""
    program = tmp_path / "program.py"
    program.write_text(GEVENT)
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "not gevent"]
    done = subprocess.run(
        [sys.executable, program, *options, str(Path(__file__).relative_to(ROOT))],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_a_wait_ends_with_the_stream():
    """In a stream's generator, the departure of its client ends a wait between."""
    waiting, closed = threading.Event(), threading.Event()

    def relay(url: str) -> Iterator[Any]:
        try:
            with EventSource(
                url, backoff=(100, 100), on_error=lambda _: waiting.set()
            ) as source:
                yield from source
        finally:
            closed.set()

    with RawServer([answer(body=EVENT)]) as server:
        app = SSEResponse(relay(server.url))
        with Client(app).stream("GET", "/") as stream:
            assert stream.events(1)[0].data == "a"
            assert waiting.wait(15)
            stream.disconnect()
            assert closed.wait(15)
