"""Finite work and the stop of its server: finished in time, or visibly cut.

An EventSource comes back after an end in good order, everybody else takes that for the
end of the answer. test_life.py has the stops of event sources.
"""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests import ROOT
from tests.support.live import EVENT_SOURCE, GUNICORN, LiveServer, free_port, unique_key
from tests.support.waits import TIMEOUT, await_true

ROWS = b"".join(b"row %d\n" % n for n in range(20))
PATIENT = ("--graceful-timeout", "30")


@pytest.fixture
def key():
    return unique_key()


def request(server, method, path):
    """Return a client that has asked as fetch and curl do."""
    client = server.connect()
    client.request(method, path, headers={"Content-Length": "0"})
    return client


def stopped(kind, key, source, stop, *options, env=None, path="/raw", method="GET"):
    """Stop a server amid a response; return the client, its body and its source's end.

    The server has gone, or has begun anew, and nobody was killed for that.
    """
    with LiveServer(kind, "tests.apps.life:app", *PATIENT, *options, env=env) as server:
        url = f"{path}/{source}?key={key}"
        with request(server, method, url) as client:
            server.control.next(f"{key}-waiting")
            pid = server.control.next(f"{key}-started")
            body = client.chunk()
            stop(server, pid)
            body += client.rest()
            _, error, same = server.control.next(f"{key}-ended")
        assert same
        await_true(lambda: not is_running(pid), server.log)
        # A worker that is told to stop while it begins does not hear it.
        await_true(lambda: not is_running(server.pid) or is_serving(server), server.log)
        assert "SIGKILL" not in server.log()
        return client, body, error


def is_serving(server):
    try:
        with server.get("/health") as client:
            return client.rest() == b"ok"
    except (OSError, EOFError):
        return False


def is_asleep(pid):
    """Tell whether all threads of a process wait, at ten looks in a row."""
    for _ in range(10):
        time.sleep(0.02)
        for thread in psutil.Process(pid).threads():
            try:
                with open(f"/proc/{pid}/task/{thread.id}/stat") as stat:
                    state = stat.read().rpartition(")")[2].split()[0]
            except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
                return False
            if state != "S":
                return False
    return True


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter while it is read
        return False


def tell(number):
    return lambda server, pid: server.signal_one(number)


@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("kind", GUNICORN)
def test_finite_work_is_finished(kind, number, key):
    """A raw response, 20 rows: none is missing, and its end is marked."""
    stop = tell(getattr(signal, number))
    client, body, error = stopped(kind, key, "finishing", stop)
    assert (body, client.is_whole, error) == (ROWS, True, "finished")


@pytest.mark.parametrize(("method", "path"), [("GET", "/ndjson"), ("POST", "/sse")])
def test_other_finite_work_is_finished(method, path, key):
    """NDJSON, and events for who is no EventSource."""
    stop = tell(signal.SIGTERM)
    client, body, error = stopped(
        "gunicorn-gevent", key, "finishing", stop, path=path, method=method
    )
    assert body.count(b"row ") == 20
    assert (client.is_whole, error) == (True, "finished")


@pytest.mark.parametrize("kind", GUNICORN)
def test_what_is_not_finished_in_time_is_cut(kind, key):
    """After SYNCSTREAM_DRAIN seconds: `finally` runs, and the end is not marked."""
    env = {"SYNCSTREAM_DRAIN": "0.5"}
    stop = tell(signal.SIGTERM)
    client, body, error = stopped(kind, key, "endless", stop, env=env)
    assert (client.is_whole, error) == (False, "GeneratorExit")
    assert body.count(b"row\n") > 1


@pytest.mark.parametrize(
    ("kind", "number", "error"),
    [
        ("gunicorn-sync", "SIGABRT", "SystemExit"),
        ("gunicorn-sync", "SIGQUIT", "SystemExit"),
        ("gunicorn-gthread", "SIGABRT", "GeneratorExit"),
        ("gunicorn-gthread", "SIGQUIT", "GeneratorExit"),
        ("gunicorn-gevent", "SIGQUIT", "GeneratorExit"),
        ("gunicorn-gthread", "orphan", "GeneratorExit"),
    ],
)
def test_an_end_at_once_cuts(kind, number, error, key):
    """By gunicorn's quick stop, for a silent worker, and after its master's end."""

    def stop(server, pid):
        if number == "orphan":
            server.signal_one(signal.SIGKILL)
        else:
            os.kill(pid, getattr(signal, number))

    client, _, found = stopped(kind, key, "endless", stop)
    # The exit of a sync worker may hit between two steps.
    assert found in (error, "GeneratorExit")
    assert not client.is_whole


@pytest.mark.parametrize("kind", GUNICORN)
def test_a_subscription_ends_at_once(kind, key):
    """With its mark for an EventSource; for others, who see no end there, cut."""
    with LiveServer(kind, "tests.apps.life:app", *PATIENT) as server:
        with (
            server.get(f"/sub?key={key}", headers=EVENT_SOURCE) as source,
            server.get(f"/sub?key={key}") as other,
        ):
            for client in (source, other):
                client.read_head()
                assert client.chunk().startswith(b": ok\n")
            await_true(lambda: b"'open': 2" in stats(server))
            server.signal_one(signal.SIGTERM)
            assert b"retry: " in source.rest()
            other.rest()
        assert (source.is_whole, other.is_whole) == (True, False)


def stats(server):
    with server.get("/stats") as client:
        return client.rest()


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        ("gunicorn-sync", "SIGTERM"),
        ("gunicorn-gthread", "SIGHUP"),
        ("gunicorn-gevent", "SIGTERM"),
    ],
)
def test_a_frozen_reader_does_not_keep_its_worker(kind, number, key):
    """Its write blocks for ever; `finally` runs, and the worker goes like others."""
    with (
        LiveServer(kind, "tests.apps.life:app", *PATIENT) as server,
        server.get(f"/raw/flood?key={key}&send_timeout=None") as client,
    ):
        pid = server.control.next(f"{key}-started")
        client.read_head()
        if kind == "gunicorn-sync":  # it can tell nothing meanwhile
            await_true(lambda: is_asleep(pid))
        else:
            await_true(lambda: is_blocked(server, key))
        server.signal_one(getattr(signal, number))
        server.control.next(f"{key}-ended")
        await_true(lambda: not is_running(pid), server.log)


def is_blocked(server, key):
    """Tell whether a source has yielded nothing for a while: its write blocks."""
    with server.get(f"/moment?key={key}") as client:
        moment = client.rest()
    return moment != b"None" and time.monotonic() - float(moment) > 0.5


@pytest.mark.parametrize("leaves", [False, True], ids=["stays", "left"])
@pytest.mark.parametrize("kind", ["gunicorn-sync", "gunicorn-gthread"])
def test_a_generator_that_hears_nothing_does_not_keep_its_worker(kind, leaves, key):
    """It neither yields nor waits in `syncstream.sleep`: it ends when it next runs."""
    env = {"SYNCSTREAM_DRAIN": "0.5"}
    with LiveServer(kind, "tests.apps.life:app", *PATIENT, env=env) as server:
        with server.get(f"/raw/deaf?key={key}") as client:
            assert client.chunk() == b"row\n"
            pid = server.control.next(f"{key}-started")
            server.control.next(f"{key}-waiting")
            if leaves:
                client.close()
            server.signal_one(signal.SIGTERM)
            _, error, same = server.control.next(f"{key}-ended")
            if not leaves:
                client.rest()
        assert (error, same) == ("GeneratorExit", True)
        assert not client.is_whole
        await_true(lambda: not is_running(pid), server.log)


def test_a_long_system_call_does_not_keep_a_sync_worker(key):
    """The main thread gets out of it, and `finally` runs."""
    env = {"SYNCSTREAM_DRAIN": "0.5"}
    stop = tell(signal.SIGTERM)
    client, _, error = stopped("gunicorn-sync", key, "time.sleep", stop, env=env)
    assert (client.is_whole, error) == (False, "GeneratorExit")


APP = """
from flask import Flask
from syncstream import SSEResponse, StreamResponse
import signal, sys, time
app = Flask(__name__)

@app.get("/health")
def health():
    return "ok"

@app.get("/stream")
def stream():
    def rows():
        try:
            for n in range(600):
                yield "row\\n"
                time.sleep(0.05)
        finally:
            print("finally", flush=True)
    return StreamResponse(rows())

@app.get("/exit")
def exits():
    def rows():
        yield "row\\n"
        sys.exit(3)
    return StreamResponse(rows())

def leave(number, frame):
    sys.exit(7)

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, leave)
    app.run(port=int(sys.argv[1]), threaded=False)
"""


@pytest.mark.parametrize(("number", "status"), [("SIGINT", 0), ("SIGTERM", 7)])
def test_werkzeug_ends_by_a_signal_in_a_generator(number, status, tmp_path):
    """Without threads its main thread runs the generator, and what hits it there."""
    (tmp_path / "app.py").write_text(APP)
    port = free_port()
    command = [sys.executable, "app.py", str(port)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    outputs = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=tmp_path, env=env, **outputs) as process:
        try:
            server = Plain(port)
            await_true(lambda: is_serving(server), timeout=3 * TIMEOUT)
            with server.get("/exit") as client:
                assert client.chunk() == b"row\n"
                with pytest.raises(ConnectionResetError):
                    client.chunk()  # a failed source, and no more
            with server.get("/stream") as client:
                assert client.chunk() == b"row\n"
                process.send_signal(getattr(signal, number))
                output, _ = process.communicate(timeout=TIMEOUT)
                with pytest.raises(ConnectionResetError):
                    client.rest()
        finally:
            process.kill()
    assert process.returncode == status
    assert output.count(b"finally") == 1


class Plain(LiveServer):
    """A server that somebody else has started."""

    def __init__(self, port):
        self.port = port
        self._tls = False
