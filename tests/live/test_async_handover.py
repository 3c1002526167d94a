"""Asynchronous sources whose clients have left their server: no thread serves them."""

import os
import re
import signal
import time
from contextlib import ExitStack

import pytest

from tests.live.promises import end_of
from tests.support.live import EVENT_SOURCE, GUNICORN, LiveServer, unique_key
from tests.support.waits import await_true

pytestmark = pytest.mark.matrix

APP = "tests.apps.flask_app:app"
BODY = {"Content-Type": "application/json", "Content-Length": "2"}


@pytest.fixture(scope="module")
def sync():
    """A server of one thread: what holds it is seen by all others."""
    with LiveServer("gunicorn-sync", APP) as server:
        yield server


@pytest.fixture(scope="module")
def impatient():
    """A server whose master kills a worker that is silent for 3 s."""
    options = ("--timeout", "3", "--graceful-timeout", "20")
    with LiveServer("gunicorn-sync", APP, *options, "--max-requests", "1000") as server:
        yield server


@pytest.fixture
def key():
    return unique_key()


def ask(server, method, path, **options):
    """Return a client that has sent a request, a POST's with its body."""
    client = server.connect()
    if method == "POST":
        options["headers"] = {**options.get("headers", {}), **BODY}
    client.request(method, path, **options)
    if method == "POST":
        client.send("{}")
    return client


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("way", ["sse", "ndjson", "raw"])
def test_it_holds_no_thread(sync, key, way, method, version):
    """Others are answered while it waits; a leave ends it, and runs its ``finally``."""
    if (way, method) == ("raw", "POST"):
        way = "sse"
    name = "async-text" if way == "raw" else "async-waiting"
    path = f"/{way}/{name}?key={key}"
    with ask(sync, method, path, version=version) as client:
        assert client.chunk()
        sync.control.next(f"{key}-waiting")
        for _ in range(3):
            with sync.get("/health") as other:
                assert other.rest() == b"ok"
        left = time.monotonic()
    assert sync.control.next(f"{key}-ended") == "CancelledError"
    assert time.monotonic() - left < 5  # benchmarks/leave.py has the figures
    assert sync.control.next(f"{key}-left") == "left"
    assert sync.tracebacks() == 0, sync.log()


def test_what_a_browser_is_told_at_its_end(sync, key):
    """Not to come back: by GET; whoever has posted is no EventSource."""
    for method, end in ("GET", b"id: syncstream-end\n\n"), ("POST", b""):
        path = f"/sse/async-three?key={key}"
        with ask(sync, method, path, headers=EVENT_SOURCE) as client:
            assert client.rest() == b": ok\ndata: 0\n\ndata: 1\n\ndata: 2\n\n" + end
            assert client.is_whole
        assert sync.control.next(f"{key}-ended") == "finished"


@pytest.mark.parametrize("kind", GUNICORN)
@pytest.mark.parametrize("way", ["sse", "ndjson"])
def test_finite_work_goes_on_while_its_server_stops(kind, key, way):
    """Whole, in its executor's threads, too; then the process ends."""
    with LiveServer(kind, APP, "--graceful-timeout", "20") as server:
        server.control.open(key)
        with ask(server, "POST", f"/{way}/async-gated?key={key}") as client:
            assert client.chunk()
            server.control.next(f"{key}-started")
            server.signal_one(signal.SIGTERM)
            time.sleep(0.5)  # the server has nothing else to wait for
            for _ in range(2):
                server.control.open(key)
                assert client.chunk()
        assert end_of(server, key) in ("CancelledError", "GeneratorExit")
        await_true(lambda: not server.is_running(), server.log)
        assert server.tracebacks() == 0, server.log()


def test_an_end_of_the_drain_cuts(key):
    """Its ``finally`` runs, and its client sees that something is missing."""
    with LiveServer("gunicorn-sync", APP, env={"SYNCSTREAM_DRAIN": "0.5"}) as server:
        with ask(server, "POST", f"/sse/async-waiting?key={key}") as client:
            assert client.chunk()
            server.control.next(f"{key}-waiting")
            server.signal_one(signal.SIGTERM)
            assert b"retry" not in client.rest()
            assert not client.is_whole
        assert server.control.next(f"{key}-ended") == "CancelledError"
        await_true(lambda: not server.is_running(), server.log)


def test_what_may_delay_a_worker_s_successor_is_said(impatient, key):
    """By finite work alone, of what has left; it does not hold the worker's thread."""
    line = "gunicorn replaces a worker that has served its max_requests only after"
    for method, count in ("GET", 0), ("POST", 1), ("POST", 1):
        path = f"/sse/async-three?key={key}"
        with ask(impatient, method, path, headers=EVENT_SOURCE) as client:
            client.rest()
        assert impatient.log().count(line) == count
    assert "serves nothing else" not in impatient.log()


def test_a_worker_that_waits_for_finite_work_is_not_killed(impatient, key):
    """The work is cut before, though the worker sends no heartbeats any more."""
    with ask(impatient, "POST", f"/ndjson/async-waiting?key={key}") as client:
        assert client.chunk()
        impatient.control.next(f"{key}-waiting")
        os.kill(impatient.control.next(f"{key}-started"), signal.SIGTERM)
        client.rest()
        assert not client.is_whole
    assert impatient.control.next(f"{key}-ended") == "CancelledError"
    with impatient.get("/health") as client:  # another worker, so this one has ended
        assert client.rest() == b"ok"
    assert "TIMEOUT" not in impatient.log()


def test_a_drain_ends_at_once(impatient, key):
    """In silence, though the interpreter is at its end."""
    with ask(impatient, "POST", f"/ndjson/async-waiting?key={key}") as client:
        assert client.chunk()
        impatient.control.next(f"{key}-waiting")
        pid = impatient.control.next(f"{key}-started")
        os.kill(pid, signal.SIGTERM)
        exiting = f"Worker exiting (pid: {pid})"
        await_true(lambda: exiting in impatient.log(), impatient.log)
        time.sleep(0.2)  # it drains
        os.kill(pid, signal.SIGQUIT)
        client.rest()
        assert not client.is_whole
    assert impatient.control.next(f"{key}-ended") == "CancelledError"
    await_true(lambda: not os.path.exists(f"/proc/{pid}"), impatient.log)
    assert "Exception ignored" not in impatient.log()
    assert impatient.tracebacks() == 0, impatient.log()


def body_of(server, key, name, query="", **options):
    """Return the body of a browser's stream, and whether its end is marked."""
    path = f"/sse/async-{name}?key={key}{query}"
    with server.get(path, headers={**EVENT_SOURCE, **options}) as client:
        body = b""
        while chunk := client.chunk():
            body += chunk
        return body.removeprefix(b": ok\n"), client.is_whole


def test_what_cannot_be_encoded_is_thrown_at_the_yield(sync, key):
    body, is_whole = body_of(sync, key, "unencodable")
    assert body == b"data: thrown: TypeError\n\nid: syncstream-end\n\n"
    assert is_whole


def test_a_failure_is_told(sync, key):
    """By ``on_error``, whose event the end in order follows; or by a cut."""
    before = len(sync.log())
    body, is_whole = body_of(sync, key, "failing", "&tells=1")
    assert re.fullmatch(rb"data: 0\n\ndata: told: MARK\n\nretry: \d+\n\n", body)
    assert is_whole
    body, is_whole = body_of(sync, key, "failing")
    assert re.fullmatch(rb"data: 0\n\nretry: \d+\n\n", body)
    assert not is_whole
    await_true(lambda: sync.log()[before:].count("Error: MARK") == 2, sync.log)


def test_an_answer_that_comes_too_late(sync, key):
    """A browser does not come back for it, and the log says why."""
    before = len(sync.log())
    body, is_whole = body_of(sync, key, "aborted")
    assert body == b"data: 0\n\nid: syncstream-end\n\n"
    assert is_whole
    said = "the response's head has left before the source began"
    await_true(lambda: said in sync.log()[before:], sync.log)


def test_keepalives_come_between_events(sync, key):
    """None in the middle of one that is yielded in parts."""
    path = f"/sse/async-half?key={key}&keepalive=0.05"
    with sync.get(path, headers=EVENT_SOURCE) as client:
        assert client.block() == b": ok\n"
        sync.control.next(f"{key}-started")
        time.sleep(0.3)
        sync.control.open(key)
        text = b""
        while b"\n\n: keepalive\n" not in text:
            text += client.chunk()
    assert text.startswith(b"data: ab\n\n: keepalive\n")


def test_a_last_event_is_completed(sync, key):
    """One without its blank line, after which clients would not see the end, either."""
    body, is_whole = body_of(sync, key, "incomplete")
    assert body == b"data: a\n\nid: syncstream-end\n\n"
    assert is_whole
    await_true(lambda: "no blank line behind it" in sync.log(), sync.log)


def test_checkpoints_keep_nobody_else_waiting(sync, key):
    other = unique_key()
    path = f"/sse/async-checkpoints?key={key}"
    with sync.get(path, headers=EVENT_SOURCE) as client:
        assert client.block() == b": ok\n"
        sync.control.open(key)
        assert body_of(sync, other, "three")[1]
        assert client.rest() == b"data: something\n\nid: syncstream-end\n\n"


def test_its_stream_is_its_own(sync, key):
    """It lives as long as its source, and knows its client, and its end."""
    sync.control.open(key)
    body, is_whole = body_of(sync, key, "own", **{"Last-Event-ID": "7"})
    assert body == b'data: [true,true,"7"]\n\nid: syncstream-end\n\n'
    assert is_whole
    assert sync.control.next(f"{key}-ended") == "CancelledError"
    assert sync.control.next(f"{key}-told") == "finished"


@pytest.mark.parametrize("way", ["sse", "ndjson"])
def test_a_client_that_lags_gets_all(sync, key, way):
    """Nothing is asked of its source before it has taken what there is."""
    with sync.get(f"/{way}/async-large?key={key}") as client:
        client.read_head()
        sync.control.next(f"{key}-started")
        time.sleep(0.2)
        assert sync.control.pending(f"{key}-ended") == []
        body = client.rest()
        assert client.is_whole
    assert body.count(b"a" * 3_000_000) == body.count(b"b" * 3_000_000) == 1
    assert sync.control.next(f"{key}-ended") == "finished"


@pytest.mark.parametrize("kind", ["gunicorn-gthread", "gunicorn-gevent"])
def test_the_first_ones_may_come_together(kind, key):
    """One of them starts the loop; under gevent others run while it imports."""
    with LiveServer(kind, APP) as server, ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(8)]
        for client in clients:
            client.request("GET", f"/sse/async-waiting?key={key}")
        for client in clients:
            assert client.block() + client.block() == b": ok\n\ndata: 0\n\n"


def test_a_read_of_what_is_linked_ends_with_its_client(sync, key):
    """In whatever thread it is; and others' ends wait for none of it."""
    for _ in range(2):
        with sync.get(f"/sse/async-linked?key={key}") as client:
            assert client.block() + client.block() == b": ok\n\ndata: 0\n\n"
            sync.control.next(f"{key}-waiting")
        assert sync.control.next(f"{key}-read") == "ended"
        assert sync.control.next(f"{key}-ended") == "CancelledError"


def test_a_place_is_free_when_the_source_has_ended(key):
    """Not before: who comes and leaves could start any number of sources."""
    path = f"/sse/async-slow-end?key={key}"
    with LiveServer("gunicorn-sync", "tests.apps.flask_app:single") as server:
        with server.get(path) as client:
            assert client.block() + client.block() == b": ok\n\ndata: 0\n\n"
        server.control.next(f"{key}-ending")
        with server.get(path) as client:
            client.read_head()
            assert client.status == 503
        assert server.control.next(f"{key}-ended") == "in time"
        await_true(lambda: status_of(server, path) == 200, server.log)


def status_of(server, path):
    with server.get(path) as client:
        client.read_head()
        return client.status


@pytest.mark.parametrize("kind", ["gunicorn-sync", "gunicorn-gevent"])
def test_a_stop_waits_for_the_ends_of_sources(kind, key):
    """Of those whose clients have left before, too."""
    options = ("--graceful-timeout", "20")
    with (
        LiveServer(kind, APP, *options, env={"SYNCSTREAM_DRAIN": "0"}) as server,
        ask(server, "POST", f"/sse/async-slow-end?key={key}") as client,
    ):
        with ask(server, "POST", f"/sse/async-slow-end?key={key}") as other:
            for one in (client, other):
                assert one.block() + one.block() == b": ok\n\ndata: 0\n\n"
                server.control.next(f"{key}-waiting")
        server.control.next(f"{key}-ending")
        server.signal_one(signal.SIGTERM)
        for _ in range(2):
            assert server.control.next(f"{key}-ended") == "in time"
        await_true(lambda: not server.is_running(), server.log)


def test_a_frozen_reader_does_not_keep_its_worker(key):
    """Of finite work: it is cut long before the server's own time is over."""
    with (
        LiveServer("gunicorn-sync", APP, "--graceful-timeout", "40") as server,
        ask(server, "POST", f"/ndjson/async-large?key={key}") as client,
    ):
        client.read_head()
        server.control.next(f"{key}-started")
        server.signal_one(signal.SIGTERM)
        assert server.wait(15) == 0  # its --timeout would end it after 29
        assert server.control.next(f"{key}-ended") != "finished"
