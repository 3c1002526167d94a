"""What servers tell of themselves, asked of real ones: syncstream/servers."""

import json
import os
import signal
import socket
import sys
import time
from types import SimpleNamespace
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest

from syncstream import servers
from syncstream.servers import server_of
from tests.support import live
from tests.support.live import SERVERS, LiveServer, unique_key
from tests.support.waits import await_true

APP = "tests.apps.servers_app:app"
PROMPT = 5  # seconds from the signal to the streams; usually 0.05

# What the servers of tests/support/live.py are told, or have by default.
THREADS = {
    "gunicorn-sync": 1,
    "gunicorn-gthread": 8,
    "gunicorn-gevent": 1000,
    "pywsgi": None,
    "werkzeug": None,
    "waitress": 8,
    "cheroot": 8,
    "uwsgi": 8,
}
GUNICORN = ["gunicorn-sync", "gunicorn-gthread", "gunicorn-gevent", "gunicorn-pywsgi"]
# tests/support/live.py gives uWSGI threads; with more than one, its gevent crashes.
GEVENT = ("--threads", "1", "--gevent", "50")
PYWSGI_WORKER = ("-k", "gevent_pywsgi")


def options_of(kind):
    return PYWSGI_WORKER if kind == "gunicorn-pywsgi" else ()


def serve(kind, *options, **env):
    """Return a running server; ``gunicorn-pywsgi`` is gunicorn's gevent_pywsgi."""
    if kind in GUNICORN:  # it kills no worker that is slow today
        options = ("--graceful-timeout", "30", *options)
    options = options_of(kind) + options
    kind = "gunicorn-gevent" if kind == "gunicorn-pywsgi" else kind
    return LiveServer(kind, APP, *options, env=env)


@pytest.fixture(scope="module", params=[*SERVERS, "gunicorn-pywsgi"])
def server(request):
    with serve(request.param) as server:
        server.name = request.param
        yield server


@pytest.fixture
def program(monkeypatch):
    """Return what runs a configuration of tests/apps/servers_app.py."""

    def command(kind, app, port, *options):
        return [sys.executable, "-m", "tests.apps.servers_app", kind, str(port)]

    def run(configuration):
        monkeypatch.setattr(live, "command", command)
        return LiveServer(configuration, APP)

    return run


def ask(server, path):
    with server.get(path, headers={"Connection": "close"}) as client:
        return json.loads(client.rest())


@pytest.mark.parametrize("path", ["/facts", "/late"])
def test_a_server_tells_how_many_requests_it_serves(server, path):
    """Asked in the application's call, or in the iteration."""
    expected = {"gunicorn-pywsgi": 1000, **THREADS}[server.name]
    facts = ask(server, path)
    name = "pywsgi" if server.name == "gunicorn-pywsgi" else server.name
    assert facts["name"] == name.split("-")[0]
    assert facts["threads"] == expected


@pytest.mark.parametrize("path", ["/facts", "/late"])
def test_a_running_server_does_not_stop(server, path):
    """It says so; of uWSGI nothing is to be learned."""
    assert ask(server, path)["stopping"] is (None if server.name == "uwsgi" else False)


def test_a_server_that_is_fine_is_not_warned_of(server):
    """Of all that the tests run, only gunicorn's sync worker is."""
    warnings = ask(server, "/facts")["warnings"]
    assert len(warnings) == (server.name == "gunicorn-sync"), warnings


def test_what_a_middleware_has_added_is_among_the_headers(server):
    """Before and after they are sent, though ``write`` comes from the server."""
    if server.name == "uwsgi":
        # Its write is a function in C: nothing is known of the headers.
        assert server_of({"uwsgi.version": b""}).headers(print) is None
        return
    key = unique_key()
    with server.get(f"/headers?key={key}") as client:
        assert client.rest() == b".."
        assert client.headers["x-encoding"] == "gzip"
    for _ in range(2):
        headers = server.control.next(key)
        assert ["X-Encoding", "gzip"] in headers
        assert ["Content-Type", "text/plain"] in headers


def test_what_tells_of_the_stop_keeps_no_request(server):
    """The request's environ and body are gone when it has ended."""
    if server.name == "uwsgi":
        assert ask(server, "/facts")["stopping"] is None  # there is nothing to keep it
        return
    with server.get("/leave", headers={"Connection": "close"}) as client:
        assert client.rest() == b"left\n"
    # The thread may still be on its way out of the request.
    await_true(lambda: ask(server, "/left") == [True, [False, False]])


def test_what_the_server_keeps_for_a_client_is_counted(server):
    """waitress keeps what the kernel does not take; when it is sent, it is nothing."""
    key = unique_key()
    if server.name != "waitress":  # writes wait for the kernel, and keep nothing
        assert ask(server, "/facts")["unsent"] == 0
        return
    with server.get(f"/fill?key={key}") as client:
        written, unsent = server.control.next(key)
        assert 0 < unsent < written
        server.control.open(key)
        assert len(client.rest()) == written
        assert server.control.next(key) == [written, 0]


class Stop:
    """A request in flight, and what it notes of its server's stop."""

    def __init__(self, server):
        self.server = server
        self.key = unique_key()
        self.client = server.get(f"/stop?key={self.key}")
        try:
            begins = server.control.next(f"{self.key}-begins")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{server.log()}") from None
        self.pid, self.parent, self.was_stopping = begins

    def signal(self, number, pid=None):
        self.sent = time.monotonic()
        os.kill(self.parent if pid is None else pid, number)

    def seen(self):
        """Wait until the application has seen it, and return after how long."""
        return self.server.control.next(f"{self.key}-stopping") - self.sent

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.server.control.open(self.key)
        self.client.close()


# That streams of gunicorn's other workers, of Werkzeug, waitress and cheroot end on a
# signal, which they can do only if they see it, is in tests/live/test_life.py.
PRELOAD = ("--preload",)


@pytest.mark.parametrize(
    ("kind", "options", "wraps"),
    [
        ("gunicorn-pywsgi", (), False),
        ("gunicorn-pywsgi", (), True),
        ("gunicorn-pywsgi", PRELOAD, False),
        *[(kind, PRELOAD, True) for kind in GUNICORN],
    ],
)
def test_sigterm_to_gunicorn_is_seen_by_a_stream(kind, options, wraps):
    """With a handler of the application's above gunicorn's, and with --preload."""
    env = {"WRAP_SIGNALS": "1"} if wraps else {}
    with serve(kind, *options, **env) as server, Stop(server) as stop:
        assert stop.was_stopping is False
        stop.signal(signal.SIGTERM)
        assert stop.seen() < PROMPT
        # preloaded, it wraps the master's, which is replaced; the worker's own is not
        if wraps and not options:
            assert "wrapped" in server.log()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT])
def test_gunicorns_other_signals_are_seen_by_a_stream(number):
    """SIGHUP replaces the workers; SIGQUIT, like Ctrl-C, leaves them 0.1 s."""
    with serve("gunicorn-pywsgi") as server, Stop(server) as stop:
        assert stop.was_stopping is False
        stop.signal(number)
        assert stop.seen() < PROMPT


@pytest.mark.parametrize("kind", GUNICORN)
def test_the_death_of_gunicorns_master_is_seen_by_a_stream(kind):
    """Its workers stop without having been told."""
    with serve(kind) as server, Stop(server) as stop:
        assert stop.was_stopping is False
        stop.signal(signal.SIGKILL)
        assert stop.seen() < PROMPT


@pytest.mark.parametrize("kind", ["gunicorn-gthread", "gunicorn-gevent"])
def test_max_requests_is_seen_by_a_stream(kind):
    """As soon as the last of them begins, which is told so from its start."""
    server = serve(kind, "--max-requests", "3")  # the first of them was /health
    with server, Stop(server) as stop, Stop(server) as last:
        stop.sent = time.monotonic()
        assert not stop.was_stopping
        assert last.was_stopping
        assert stop.seen() < PROMPT


def test_max_requests_is_seen_by_the_last_stream_of_a_sync_worker():
    """From its start, though its worker serves it to its end."""
    with serve("gunicorn-sync", "--max-requests", "2") as server, Stop(server) as last:
        assert last.was_stopping


@pytest.mark.parametrize(
    "configuration",
    ["pywsgi stop", "waitress sockets", "waitress close", "werkzeug shutdown"],
)
def test_an_end_by_program_is_seen_by_a_stream(program, configuration):
    """Also of several listening sockets, and of a server that is closed."""
    with program(configuration) as server, Stop(server) as stop:
        assert stop.was_stopping is False
        stop.signal(signal.SIGINT, stop.pid)
        assert stop.seen() < PROMPT


@pytest.mark.parametrize(
    ("configuration", "threads"),
    [
        ("pywsgi pool", 7),
        ("werkzeug single", 1),
        ("werkzeug processes", None),
        ("waitress sockets", 3),
    ],
)
def test_other_configurations_have_other_limits(program, configuration, threads):
    """A pool's size, one, none, and what waitress was told."""
    with program(configuration) as server:
        facts = ask(server, "/late")
    assert facts["threads"] == threads
    assert facts["stopping"] is False
    assert facts["warnings"] == []


@pytest.mark.parametrize(
    ("options", "threads"),
    [
        ((), 8),  # the last of several wins
        (("--threads", "3"), 3),
        ((*GEVENT, "--gevent-monkey-patch"), 50),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_uwsgis_cores_are_counted(options, threads):
    """Threads, or greenlets."""
    with serve("uwsgi", *options) as server:
        assert ask(server, "/late")["threads"] == threads


def test_the_sync_worker_is_warned_of():
    """With what ends its streams, and with what to do."""
    with serve("gunicorn-sync", "--timeout", "17") as server:
        (warning,) = ask(server, "/late")["warnings"]
    assert "--timeout kills it after 17 s" in warning
    assert "-k gthread" in warning
    with serve("gunicorn-sync", "--timeout", "0") as server:
        (warning,) = ask(server, "/late")["warnings"]
    assert "timeout" not in warning
    assert "-k gthread" in warning


def test_a_single_worker_with_max_requests_is_warned_of():
    """Nobody serves between it and its successor; two workers take turns."""
    options = ("--max-requests", "1000")
    with serve("gunicorn-gthread", *options) as server:
        (warning,) = ask(server, "/late")["warnings"]
    assert "max_requests" in warning
    assert "two workers" in warning
    with serve("gunicorn-gthread", *options, "-w", "2") as server:
        assert ask(server, "/late")["warnings"] == []


def test_the_sync_workers_timeout_ends_a_stream():
    """The fact that the warning tells."""
    # Not less, or one that boots slowly is killed, too.
    with serve("gunicorn-sync", "--timeout", "3") as server, Stop(server) as stop:
        assert stop.client.chunk() == b"open\n"
        server.await_log("WORKER TIMEOUT")
        assert stop.client.rest() == b""
        assert not stop.client.is_whole


def test_gevent_without_its_patches_is_warned_of(program):
    """pywsgi without patch_all()."""
    with program("pywsgi unpatched") as server:
        assert "patch_all" in ask(server, "/late")["warnings"][0]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (GEVENT, "patch_all"),
        ((*GEVENT, "--gevent-monkey-patch"), None),
        (("--harakiri", "60"), "older than 60 s"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_uwsgis_options_are_warned_of(options, word):
    """Of gevent unpatched, and of harakiri."""
    with serve("uwsgi", *options) as server:
        warnings = ask(server, "/late")["warnings"]
    assert len(warnings) == (word is not None)
    assert all(word in warning for warning in warnings)


@pytest.mark.parametrize("kind", ["a2wsgi", "uvicorn", "hypercorn"])
def test_bridges_of_asgi_servers_are_warned_of(program, kind):
    """They are known by their environ."""
    with program(kind) as server:
        facts = ask(server, "/late")
    assert facts["name"] == "ASGI bridge"
    assert "keeps its thread for ever" in facts["warnings"][0]
    assert (facts["threads"], facts["stopping"], facts["unsent"]) == (None, None, 0)


# As they came from the servers named: PEP 3333's keys that matter here.
BRIDGES = {
    "a2wsgi 1.10": {"asgi.scope": {}, "SERVER_PORT": "80"},
    "uvicorn 0.54": {"SERVER_PORT": 80},
    "uvicorn 0.54, unix socket": {"SERVER_PORT": None},
    "hypercorn 0.18": {"SERVER_PORT": 80},
}


@pytest.mark.parametrize("environ", BRIDGES.values(), ids=BRIDGES)
def test_an_environ_of_a_bridge_is_known(environ):
    """By what they have in common."""
    many = {"wsgi.multithread": True, "wsgi.multiprocess": True}
    server = server_of({"SERVER_PROTOCOL": "HTTP/1.1", **many, **environ})
    assert server.name == "ASGI bridge"


def test_an_unknown_server_tells_nothing():
    """And nothing is said of it."""
    environ = {"wsgi.multithread": True, "wsgi.multiprocess": True, "SERVER_PORT": "1"}
    server = server_of(environ)
    assert server.name == "another server"
    assert server.headers(print) is None
    assert server.unsent(environ) == 0
    assert server.stopping(environ) is None
    assert server.threads(environ) is None
    assert list(server.warnings(environ)) == []


@pytest.mark.parametrize(
    "name", ["gunicorn", "werkzeug", "waitress", "uwsgi", "pywsgi", "cheroot"]
)
def test_a_write_that_is_not_the_servers_has_no_headers(name):
    """A newer server may keep them elsewhere: nothing breaks."""
    server = next(server for server in servers.SERVERS if server.name == name)
    assert server.headers(lambda data: None) is None
    assert server.headers(print) is None


def test_http_2_is_warned_of():
    """gunicorn serves the streams of a connection one after another."""
    environ = {"gunicorn.socket": None, "SERVER_PROTOCOL": "HTTP/2.0"}
    (warning,) = server_of(environ).warnings(environ)
    assert "--http-protocols h1" in warning


def test_a_wsgiref_server_without_threads_is_warned_of():
    """It serves one request at a time; what it serves is found all the same."""
    found = []

    def app(environ, start_response):
        server = server_of(environ)
        fd = server.socket(environ).fileno()
        del environ["wsgi.input"]
        assert server.socket(environ).fileno() == fd
        warnings = tuple(server.warnings(environ))
        found.append((server.name, server.threads(environ), warnings))
        found.append(server.stopping(environ))
        start_response("200 OK", [("Content-Length", "0")])
        return []

    with (
        make_server("127.0.0.1", 0, app, handler_class=Quiet) as server,
        socket.create_connection(server.server_address, 10) as client,
    ):
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        server.handle_request()
        assert b" 200 OK" in client.recv(1000)
        (name, threads, (warning,)), stopping = found
        assert (name, threads) == ("wsgiref", 1)
        assert "serves nothing else while a stream is open" in warning
        assert not stopping()
    assert stopping()


class Quiet(WSGIRequestHandler):
    def log_message(self, *args):
        """Say nothing."""


@pytest.mark.parametrize("is_closed", [False, True])
def test_a_sync_worker_is_silent_while_it_serves(is_closed):
    """Its work is to end before its master kills it; as it ends, nothing tells when."""
    from gunicorn.config import Config
    from gunicorn.workers.sync import SyncWorker

    def last_update():
        if is_closed:
            raise ValueError("I/O operation on closed file")
        return time.monotonic() - 20

    worker = object.__new__(SyncWorker)
    worker.cfg, worker.tmp = Config(), SimpleNamespace(last_update=last_update)
    worker.ppid, worker.alive, worker.reloader = os.getppid(), True, None
    stop = servers.gunicorn.stopping(worker)
    assert servers.gunicorn.stopping(worker) is stop  # of its hook
    assert stop() is None
    worker.alive = False
    left = stop() - time.monotonic()
    # Of 30 s each: 2.5 s less than the graceful timeout, 1 s than the other.
    assert left == pytest.approx(27.5 if is_closed else 9, abs=1)
