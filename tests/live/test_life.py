"""The life of a stream on every server: hang-up, keepalive, time-outs, ends.

Done by real clients on real servers; the table of docs/servers.md is
made from this file, too.
"""

import ast
import contextlib
import os
import re
import signal
import socket
import socketserver
import struct
import threading
import time

import psutil
import pytest

from syncstream.protocol.sse import Decoder
from tests.support.live import (
    EVENT_SOURCE,
    GUNICORN,
    TABLE,
    UNMARKED,
    LiveServer,
    unique_key,
)
from tests.support.pairs import vanish
from tests.support.programs import certificate
from tests.support.waits import await_true

GEVENT = ("gunicorn-gevent", "pywsgi")
LEAVES = ("FIN", "RST", "bytes, FIN")
WAITS = ("sleep", "queue", "event", "condition", "run", "linked")


@pytest.fixture(scope="module", params=TABLE)
def server(request):
    """Each server in turn."""
    with LiveServer(request.param, "tests.apps.life:app") as server:
        yield server


@pytest.fixture
def key():
    return unique_key()


@pytest.fixture(scope="module")
def upstream():
    """A server that sends one line, and then nothing."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            while self.rfile.readline().strip():
                pass
            self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            self.wfile.write(b"8\r\nwaiting\n\r\n")
            self.rfile.read()  # until the other side has gone

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


def leave(client, how):
    """Leave as clients do; return when."""
    if how == "RST":
        linger = struct.pack("ii", 1, 0)
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    elif how == "bytes, FIN":
        client.send("GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    now = time.monotonic()
    client.socket.close()
    return now


@pytest.mark.parametrize("how", LEAVES)
@pytest.mark.parametrize("wait", WAITS)
def test_a_client_that_leaves_ends_a_wait(server, wait, how, key, upstream):
    """At once, in the generator's own thread or greenlet, `finally` and all."""
    with server.get(f"/sse/{wait}?key={key}&upstream={upstream}") as client:
        assert client.block() == b": ok\n\n"
        assert client.block() == b"data: waiting\n\n"
        if wait != "linked":
            server.control.next(f"{key}-waiting")
        left = leave(client, how)
        at, error, same = server.control.next(f"{key}-ended")
    assert same
    if wait != "linked":
        assert error == "ClientDisconnected"
    assert at - left < 5  # benchmarks/leave.py has the figures
    assert server.tracebacks() == 0, server.log()


@pytest.mark.parametrize("how", LEAVES)
def test_a_client_that_leaves_ends_a_plain_sleep(server, how, key, record_property):
    """Under gevent at once, as any call that it has patched; a thread wakes first."""
    in_hub = server.kind in GEVENT
    with server.get(f"/sse/{'time.sleep' if in_hub else 'told'}?key={key}") as client:
        assert client.block() + client.block() == b": ok\n\ndata: waiting\n\n"
        server.control.next(f"{key}-waiting")
        left = leave(client, how)
        if not in_hub:
            assert server.control.next(f"{key}-told") == "disconnected"
            wakes = time.monotonic()
            server.control.open(key)
        at, error, same = server.control.next(f"{key}-ended")
    assert same
    if in_hub:
        assert (error, at - left < 5) == ("ClientDisconnected", True)
    else:
        record_property("cell", "when it wakes")
        assert (error, at > wakes) == ("GeneratorExit", True)
    assert server.tracebacks() == 0, server.log()


def test_a_generator_that_swallows_its_end_is_closed(server, key):
    """What it yields then is dropped; it does not go on."""
    with server.get(f"/sse/stubborn?key={key}") as client:
        assert client.block() + client.block() == b": ok\n\ndata: waiting\n\n"
        server.control.next(f"{key}-started")
        leave(client, "FIN")
        _, error, same = server.control.next(f"{key}-ended")
    assert same
    assert error == "GeneratorExit"  # at the yield in its except
    assert server.control.pending(f"{key}-went-on") == []


KEEPALIVE = b": keepalive\n\n"


def await_waiting(client):
    """Read up to the first event; it may take its time, and comments come then."""
    while b"data" not in (block := client.block()):
        assert block.startswith(b": ")
    assert block.endswith(b"data: waiting\n\n")


@pytest.mark.parametrize("app", ["app", "wrapped"])
@pytest.mark.parametrize("kind", TABLE)
def test_silence_is_broken(kind, app, key, record_property):
    """A keepalive every 0.2 s while the generator blocks in a plain call."""
    if kind == "uwsgi":
        record_property("cell", "between yields")
        return
    with LiveServer(kind, f"tests.apps.life:{app}") as server:
        began = time.monotonic()
        with server.get(f"/sse/blocked?key={key}&keepalive=0.2") as client:
            await_waiting(client)
            assert [client.block() for _ in range(5)] == [KEEPALIVE] * 5
            assert 5 * 0.2 <= time.monotonic() - began < 10  # usually 1.3
            server.control.open(key)
            assert client.rest().replace(KEEPALIVE, b"") == b"data: woken\n\n"


@pytest.mark.parametrize("path", ["/sse/pieces", "/hand/pieces"])
@pytest.mark.parametrize("kind", TABLE)
def test_keepalives_corrupt_no_event(kind, path, key):
    """300 events, two thirds of them in pieces, among keepalives every ms.

    They come at 25 gates at least, where no time limit is needed to see them.
    """
    app = "wrapped" if path == "/hand/pieces" else "app"
    with (
        LiveServer(
            kind, f"tests.apps.life:{app}", env={"KEEPALIVE": "0.001"}
        ) as server,
        server.get(f"{path}?key={key}&n=300&keepalive=0.001&end=reconnect") as client,
    ):
        body, passed = b"", 25 if kind == "uwsgi" else 0
        server.control.open(key, passed)
        while data := client.chunk():
            body += data
            seen = min(25, body.count(KEEPALIVE))
            if seen > passed:
                server.control.open(key, seen - passed)
                passed = seen
        assert client.is_whole or kind in UNMARKED
        assert server.tracebacks() == 0, server.log()
    decoder = Decoder()
    events = decoder.feed(body)
    decoder.close()
    assert [(event.id, event.data) for event in events] == [
        (str(n), f"event {n}") for n in range(300)
    ]
    comments = body.count(KEEPALIVE)
    assert comments == 0 if kind == "uwsgi" else comments >= 25


TLS = ("gunicorn-gthread", "gunicorn-gevent")


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    """gunicorn's options for a certificate that is signed by nobody else."""
    cert, key = certificate(tmp_path_factory.mktemp("tls"))
    return "--certfile", str(cert), "--keyfile", str(key)


@pytest.mark.parametrize("kind", TLS)
def test_the_same_over_tls(kind, tls, key, upstream):
    """Hang-up, keepalive, and the frozen client, where the server speaks TLS."""
    waits = [*WAITS] + (["time.sleep"] if kind in GEVENT else [])
    with LiveServer(kind, "tests.apps.life:app", *tls, tls=True) as server:
        for wait in waits:
            for how in ("FIN", "RST"):
                one = f"{key}-{wait}-{how}"
                with server.get(f"/sse/{wait}?key={one}&upstream={upstream}") as c:
                    assert c.block() + c.block() == b": ok\n\ndata: waiting\n\n"
                    if wait != "linked":
                        server.control.next(f"{one}-waiting")
                    left = leave(c, how)
                    at, _, same = server.control.next(f"{one}-ended")
                assert same
                assert at - left < 5
        with server.get(f"/sse/blocked?key={key}&keepalive=0.2") as client:
            await_waiting(client)
            assert [client.block() for _ in range(3)] == [KEEPALIVE] * 3
            server.control.open(key)
        with server.get(f"/sse/flood?key={key}-flood&send_timeout=1") as client:
            client.block()
            _, _, same = server.control.next(f"{key}-flood-ended")
            assert same
        assert server.tracebacks() == 0, server.log()


def moment(server, key):
    """Return when a flood yielded its last chunk; `time.monotonic`."""
    with server.get(f"/moment?key={key}") as client:
        return float(client.rest())


def state(server):
    with server.get("/stats") as client:
        return ast.literal_eval(client.rest().decode())


def dropped(server):
    """Return how many streams the time-out has ended, of those that are over."""
    return state(server)["ended"].get("send_timeout", {"streams": 0})["streams"]


# What the server itself keeps for a client that does not read.
BUFFERS = {"waitress": 20 << 20}


def test_a_client_that_does_not_read_is_dropped(server, key, record_property):
    """`send_timeout` after the kernel takes no more; nobody else notices."""
    before, dropped_before = state(server), dropped(server)
    path = f"/sse/flood?key={key}&send_timeout=1.5"
    began = time.monotonic()
    with server.get(path) as frozen:
        assert frozen.block() == b": ok\n\n"
        if server.kind != "gunicorn-sync":
            # Another stream, meanwhile.
            with server.get(f"/sse/ticking?key={key}-other") as other:
                blocks = [other.block() for _ in range(10)]
            assert blocks[-1] == b"data: 8\n\n"
        at, error, same = server.control.next(f"{key}-ended")
    assert (error, same) == ("GeneratorExit", True)
    yielded = moment(server, key)
    if server.kind in BUFFERS:
        record_property("cell", "yes, and it buffers 16 MiB itself")
        assert at - began > 1
    else:
        assert at - yielded > 1
    assert at - yielded < 8
    # It is counted when it is over: a moment after its generator.
    await_true(lambda: dropped(server) > dropped_before)
    grown = state(server)["rss"] - before["rss"]
    assert grown < 10 << 20 or grown < BUFFERS.get(server.kind, 0)
    assert server.tracebacks() == 0, server.log()


@pytest.mark.parametrize("source", ["told", "sleep"])
def test_a_client_that_vanishes_is_dropped(server, source, key):
    """No FIN, no RST: what is sent, be it a keepalive, is not acknowledged in time."""
    if server.kind == "uwsgi":  # silent it stays: TCP's own probes need a minute
        source = "told"
    dropped_before = dropped(server)
    path = f"/sse/{source}?key={key}&send_timeout=1&keepalive=0.2"
    with server.get(path) as client:
        assert client.block() == b": ok\n\n"
        client.block()
        vanished = time.monotonic()
        vanish(client.socket)
        if source == "told":
            # One event, and no more: the server's next write might take the kernel's
            # error before the watch does, and log it.
            server.control.open(key)
            assert server.control.next(f"{key}-told") == "send_timeout"
            server.control.open(key)
        at, error, same = server.control.next(f"{key}-ended")
    assert same
    assert error in ("ClientDisconnected", "GeneratorExit")
    assert 0.9 < at - vanished < 8
    await_true(lambda: dropped(server) > dropped_before)
    assert server.tracebacks() == 0, server.log()


def test_a_stream_ends_after_its_time(server, key):
    """`max_duration`: with a `retry:`, in good order, though the source sleeps."""
    began = time.monotonic()
    path = f"/sse/sleep?key={key}&max_duration=1&end=stop"
    with server.get(path, headers=EVENT_SOURCE) as client:
        body = client.rest()
        at, error, same = server.control.next(f"{key}-ended")
    assert re.fullmatch(rb": ok\n+data: waiting\n\nretry: \d+\n\n", body)
    assert client.is_whole or server.kind in UNMARKED
    assert (error, same) == ("GeneratorExit", True)
    assert 0.9 <= at - began < 6  # a tenth early, so that not all return at once


def test_who_does_not_come_back_is_cut(server, key):
    """`max_duration`, for a client that would take an end in order for all there is."""
    with server.get(f"/raw/sleep?key={key}&max_duration=0.5") as client:
        if server.kind in UNMARKED:  # only a reset tells
            with pytest.raises(ConnectionResetError):
                client.rest()
        else:
            assert client.rest() == b"waiting"
        _, error, same = server.control.next(f"{key}-ended")
    assert not client.is_whole
    assert (error, same) == ("GeneratorExit", True)


# gunicorn would wait for them so long, and then kill its workers.
SLOWLY = ("--graceful-timeout", "30")
STOPS = {
    "gunicorn-sync": ("SIGTERM", "SIGHUP", "SIGQUIT", "SIGINT"),
    "gunicorn-gthread": ("SIGTERM", "SIGHUP", "SIGQUIT", "SIGINT"),
    "gunicorn-gevent": ("SIGTERM", "SIGHUP", "SIGQUIT", "SIGINT"),
    "pywsgi": ("SIGINT",),
    "werkzeug": ("SIGINT",),
    "waitress": ("SIGINT",),
    "cheroot": ("SIGINT",),
    "uwsgi": ("SIGTERM",),
    "runserver": ("SIGINT",),
}


def assert_stops(server, send, key, count=1, gone=lambda: None):
    """Streams end with a `retry:` and an end mark; `finally` has run."""
    path = f"/sse/sleep?key={key}"
    clients = [server.get(path, headers=EVENT_SOURCE) for _ in range(count)]
    try:
        for client in clients:
            if send is None:  # it has stopped already: this is its last request
                assert re.fullmatch(rb": ok\n+retry: \d+\n\n", client.rest())
                return 0, 0
            await_waiting(client)
        for _ in clients:
            server.control.next(f"{key}-waiting")
        sent = time.monotonic()
        send()
        ends = []
        for client in clients:
            assert re.fullmatch(rb"retry: \d+\n\n", client.rest())
            ends.append(time.monotonic() - sent)
            client.close()
        for client in clients:
            _, error, same = server.control.next(f"{key}-ended")
            # A sync worker's own exit hits in the generator, and goes on.
            is_exit = error == "SystemExit" and server.kind == "gunicorn-sync"
            assert is_exit or error == "GeneratorExit"
            assert is_exit or client.is_whole or server.kind in UNMARKED
            assert same
        gone()
        return max(ends), time.monotonic() - sent
    finally:
        for client in clients:
            client.close()


@pytest.mark.parametrize(
    ("kind", "number"), [(kind, n) for kind, names in STOPS.items() for n in names]
)
def test_streams_end_when_the_server_stops(kind, number, key, record_property):
    """At once, though gunicorn would wait 30 s for them, and then kill them."""
    if kind == "uwsgi":
        record_property("cell", "cut by it")
        with (
            LiveServer(kind, "tests.apps.life:app") as server,
            server.get(f"/sse/sleep?key={key}") as client,
        ):
            assert client.block() + client.block() == b": ok\n\ndata: waiting\n\n"
            server.signal(signal.SIGTERM)
            assert client.rest() == b""
        return
    if kind not in GUNICORN:
        record_property("cell", "on Ctrl-C")
    count = {"gunicorn-sync": 1, "waitress": 6, "cheroot": 6}.get(kind, 20)
    options = [*SLOWLY] if kind in GUNICORN else []
    options += ["--threads", "24"] if kind == "gunicorn-gthread" else []
    with LiveServer(kind, "tests.apps.life:app", *options) as server:
        pid = state(server)["pid"]
        ended, gone = assert_stops(
            server,
            lambda: server.signal_one(getattr(signal, number)),
            key,
            count,
            gone=lambda: await_true(lambda: not is_running(pid), server.log),
        )
        assert ended < 5  # usually 0.05
        assert gone < 8  # usually 0.3, and 1.3 for gevent
        # It prints one of its own for Ctrl-C, and for a sync worker's exit.
        is_quiet = number in ("SIGTERM", "SIGHUP")
        if is_quiet or (number == "SIGQUIT" and kind != "gunicorn-sync"):
            assert server.tracebacks() == 0, server.log()


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_reloading(server, watched):
    """Change a file once more; tell whether gunicorn has seen a change of it.

    The first may come before its reloader has looked for the first time.
    """
    later = max(time.time(), watched.stat().st_mtime) + 1
    os.utime(watched, (later, later))
    return "Worker reloading" in server.log()


@pytest.mark.parametrize("kind", GUNICORN)
@pytest.mark.parametrize("how", ["preload", "handlers", "max_requests", "reload"])
def test_streams_end_however_gunicorn_is_told(kind, how, key, tmp_path):
    """With --preload; handlers that are wrapped; max_requests; --reload."""
    options = [*SLOWLY]
    env = {}
    if how == "preload":
        options += ["--preload"]
    elif how == "handlers":
        env = {"WRAP_HANDLERS": "1"}
    elif how == "max_requests":
        options += ["--max-requests", "2" if kind == "gunicorn-sync" else "4"]
    else:
        watched = tmp_path / "watched.txt"
        watched.write_text("before")
        options += ["--reload", "--reload-extra-file", str(watched)]
        options += ["--reload-engine", "poll"]
    with LiveServer(kind, "tests.apps.life:app", *options, env=env) as server:

        def send():
            if how == "reload":
                await_true(lambda: is_reloading(server, watched), server.log)
            elif how == "max_requests":
                for _ in range(2):
                    with server.get("/health") as client:
                        client.rest()
            else:
                server.signal_one(signal.SIGTERM)

        is_last = how == "max_requests" and kind == "gunicorn-sync"
        assert_stops(server, None if is_last else send, key)


def test_ordinary_requests_go_on_beside_streams(key):
    """4 threads, 20 streams asked for, `reserve_threads=1`; the others get a 503."""
    with (
        LiveServer(
            "gunicorn-gthread", "tests.apps.life:limited", "--threads", "4"
        ) as server,
        contextlib.ExitStack() as stack,
    ):
        path = f"/sse/ticking?key={key}"
        clients = [stack.enter_context(server.get(path)) for _ in range(20)]
        for client in clients:
            client.read_head()
        assert sorted(client.status for client in clients) == [200] * 3 + [503] * 17
        for client in clients:
            if client.status == 503:
                assert 2 <= int(client.headers["retry-after"]) <= 6
                assert client.rest() == b"too many streams, please retry later\n"
        for _ in range(20):
            with server.get("/health") as ordinary:
                assert ordinary.rest() == b"ok"
        for _ in range(3):
            server.control.next(f"{key}-started")
        assert server.control.pending(f"{key}-started") == []
        # An EventSource would give up for good on a 503.
        source = {"Accept": "text/event-stream", "Cache-Control": "no-cache"}
        with server.get(path, headers=source) as refused:
            body = refused.rest()
        assert refused.status == 200
        assert refused.headers["content-type"] == "text/event-stream"
        assert re.fullmatch(rb"retry: [2-6]\d{3}\n\n", body)
        with server.get(f"/hand/ticking?key={key}") as refused:
            refused.read_head()
        assert refused.status == 503
        assert state(server)["ended"]["refused"]["streams"] == 19
        # A place that becomes free is given to the next.
        next(client for client in clients if client.status == 200).close()
        server.control.next(f"{key}-ended")

        def is_taken():
            with server.get(path) as again:
                again.read_head()
                return again.status == 200

        await_true(is_taken)


@pytest.mark.parametrize("kind", GUNICORN)
def test_gunicorns_hooks(kind, key, tmp_path):
    """`syncstream.gunicorn` in a configuration file: streams end on SIGQUIT."""
    settings = tmp_path / "gunicorn.conf.py"
    settings.write_text("from syncstream.gunicorn import post_worker_init")
    options = [*SLOWLY, "-c", str(settings)]
    with LiveServer(kind, "tests.apps.life:app", *options) as server:
        assert_stops(server, lambda: server.signal_one(signal.SIGQUIT), key)


QUIT_ONCE_TOLD = """
def worker_int(worker):
    from tests.apps.control import gate
    gate("quit")
"""


def test_a_generator_that_never_waits_hears_of_the_end(key, tmp_path):
    """Under gevent it lets the hub run now and then: SIGQUIT comes in through it.

    Its writes never block, which would let the hub run, too. gunicorn leaves it 0.1 s
    to end, on a busy machine too little to tell us: its hook waits for that.
    """
    settings = tmp_path / "gunicorn.conf.py"
    settings.write_text(QUIT_ONCE_TOLD)
    options = [*SLOWLY, "-c", str(settings)]
    with (
        LiveServer("gunicorn-gevent", "tests.apps.life:app", *options) as server,
        server.get(f"/sse/spinning?key={key}", headers=EVENT_SOURCE) as client,
    ):
        assert client.block() + client.block() == b": ok\ndata: spun\n\n"
        server.signal_one(signal.SIGQUIT)
        _, error, same = server.control.next(f"{key}-ended")
        body = client.rest()
        server.control.open("quit")
        assert client.is_whole
    assert re.fullmatch(rb"(data: spun\n\n)*retry: \d+\n\n", body)
    assert (error, same) == ("GeneratorExit", True)


def test_a_reset_before_all_was_sent_is_seen_by_waitress(key):
    """Its main thread closes the socket then, which takes it out of any epoll."""
    with LiveServer("waitress", "tests.apps.life:app") as server:
        for n in range(6):
            path = f"/sse/large?key={key}-{n}"
            with server.get(path) as client:
                assert client.block() == b": ok\n\n"
                server.control.next(f"{key}-{n}-started")
                server.control.next(f"{key}-{n}-waiting")
                left = leave(client, "RST")
                at, error, same = server.control.next(f"{key}-{n}-ended")
            assert (error, same) == ("ClientDisconnected", True)
            assert at - left < 5
