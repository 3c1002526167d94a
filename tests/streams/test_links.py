"""Links: a thread's read of anything ends with its stream, or the link is refused."""

import http.client
import io
import multiprocessing.connection
import multiprocessing.pool
import os
import selectors
import signal
import socket
import socketserver
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import anthropic
import httpx
import openai
import peewee
import psycopg
import pytest
import requests
import sqlalchemy
import sqlalchemy.orm
import urllib3
from django.db.utils import ConnectionHandler
from django.utils.connection import ConnectionProxy
from werkzeug.local import LocalProxy

from syncstream import current_stream, sleep
from syncstream.runtime.journal import journal
from syncstream.streams import links
from tests.runtime.waitables import Waiting
from tests.support.pairs import (
    Greenlets,
    Line,
    Threads,
    check_script,
    leave,
    serve,
    stream_of,
    tcp_pair,
)
from tests.support.postgresql_server import PostgreSQL
from tests.support.redis_server import RedisServer
from tests.support.waits import TIMEOUT, await_true

PLACE = Threads()


@pytest.fixture
def upstream():
    """A server that answers, and then says nothing more."""

    class Silent(socketserver.StreamRequestHandler):
        def handle(self):
            while self.rfile.readline().strip():
                pass
            if self.server.answers:
                self.wfile.write(
                    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
                )
                self.wfile.write(b"8\r\nwaiting\n\r\n")
            self.server.asked.set()
            self.rfile.read()  # until the other side has gone

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Silent) as server:
        server.daemon_threads = True
        server.answers, server.asked = True, threading.Event()
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def postgresql():
    with PostgreSQL() as server:
        yield server


@pytest.fixture(scope="module")
def redis_server():
    with RedisServer() as server:
        yield server


def url_of(upstream):
    host, port = upstream.server_address
    return f"http://{host}:{port}/"


def read_httpx(upstream, link):
    with httpx.stream("GET", url_of(upstream), timeout=None) as response:
        yield from link(response).iter_lines()


def read_httpx_client(upstream, link):
    with httpx.Client(timeout=None) as client:
        link(client)
        with client.stream("GET", url_of(upstream)) as response:
            yield from response.iter_lines()


def read_httpx_head(upstream, link):
    """The answer does not even begin."""
    upstream.answers = False
    with link(httpx.Client(timeout=None)) as client:
        yield client.get(url_of(upstream)).text


def read_openai(upstream, link):
    with openai.OpenAI(
        api_key="x", base_url=url_of(upstream), timeout=None, max_retries=0
    ) as client:
        stream = client.chat.completions.create(
            model="x", messages=[{"role": "user", "content": "hi"}], stream=True
        )
        yield from link(stream)


def read_openai_client(upstream, link):
    with openai.OpenAI(
        api_key="x", base_url=url_of(upstream), timeout=None, max_retries=0
    ) as client:
        yield from link(client).chat.completions.create(
            model="x", messages=[{"role": "user", "content": "hi"}], stream=True
        )


def read_anthropic(upstream, link):
    with anthropic.Anthropic(
        api_key="x", base_url=url_of(upstream), timeout=None, max_retries=0
    ) as client:
        message = {"role": "user", "content": "hi"}
        with client.messages.stream(
            model="x", max_tokens=9, messages=[message]
        ) as stream:
            yield from link(stream).text_stream


def read_urllib(upstream, link):
    with urllib.request.urlopen(url_of(upstream)) as response:
        yield from link(response)


def read_urllib3(upstream, link):
    response = urllib3.request("GET", url_of(upstream), preload_content=False)
    yield from link(response).stream(1)


def read_pipe_of_sockets(upstream, link):
    ours, theirs = multiprocessing.Pipe()
    with theirs, ours:
        upstream.asked.set()
        yield link(ours).recv_bytes()


def read_datagrams(upstream, link):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        upstream.asked.set()
        yield link(sock).recv(1000)


def read_listener(upstream, link):
    with socket.create_server(("127.0.0.1", 0)) as sock:
        upstream.asked.set()
        yield link(sock).accept()


HTTP_READERS = (
    read_httpx,
    read_httpx_client,
    read_httpx_head,
    read_openai,
    read_openai_client,
    read_anthropic,
    read_urllib,
    read_urllib3,
    read_pipe_of_sockets,
    read_datagrams,
    read_listener,
)


def ends_at_once(source, is_blocked):
    """Run a source, let its client leave when it is blocked: return the stream."""
    with tcp_pair() as (server, client):
        stream = stream_of(source, Line(server))
        join = PLACE.start(lambda: serve(stream))
        await_true(is_blocked)
        # In the call itself, if it can be seen: nothing else tells that.
        PLACE.pause(0.02)
        left = time.monotonic()
        leave(client)
        join()
        assert time.monotonic() - left < TIMEOUT / 2
    assert stream.reason == "disconnected"
    return stream


@pytest.mark.parametrize("read", HTTP_READERS)
def test_a_read_of_a_response_ends(read, upstream, caplog):
    """At once, on a thread; what the library then raises is not logged as an error."""

    def source():
        yield from read(upstream, current_stream().link)

    ends_at_once(source(), upstream.asked.is_set)
    journal().flush()
    assert caplog.records == []


@pytest.mark.parametrize("what", ["connection", "cursor"])
@pytest.mark.parametrize("waits_for", ["notification", "query"])
def test_a_wait_for_postgresql_ends(what, waits_for, postgresql, caplog):
    """psycopg: for a notification, which nothing cancels, and for a query."""
    backend = []

    def source():
        with psycopg.connect(postgresql.url, autocommit=True) as connection:
            backend.append(connection.info.backend_pid)
            cursor = connection.execute("LISTEN channel")
            current_stream().link(connection if what == "connection" else cursor)
            if waits_for == "query":
                connection.execute("SELECT pg_sleep(600)")
            yield from connection.notifies()

    def state():
        return postgresql.execute(
            "SELECT state || query FROM pg_stat_activity WHERE pid = %s", *backend
        )

    blocked = "activeSELECT pg_sleep(600)" if waits_for == "query" else "idleLISTEN"
    ends_at_once(
        source(), lambda: backend and any(blocked in row[0] for row in state())
    )
    await_true(lambda: not state())  # nor does the server go on
    journal().flush()
    assert caplog.records == []


@pytest.mark.parametrize("waits", ["in sleep", "in a query"])
def test_a_linked_connection_serves_a_finally(waits, postgresql):
    """It is cancelled, not shut down, while its generator waits in `sleep` or for a
    query: ``finally`` can still say so in the database."""
    began, seen = threading.Event(), []

    def source():
        with psycopg.connect(postgresql.url, autocommit=True) as connection:
            current_stream().link(connection)
            try:
                yield "a"
                began.set()
                if waits == "in sleep":
                    sleep(600)
                connection.execute("SELECT pg_sleep(601)")
            finally:
                # Longer than until the next look at a link that had no effect.
                query = f"SELECT pg_sleep({links.AGAIN * 2})::text"
                seen.extend(connection.execute(query))

    def is_blocked():
        running = "SELECT 1 FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(601)'"
        return began.is_set() and (
            waits == "in sleep" or postgresql.execute(running + " AND state = 'active'")
        )

    ends_at_once(source(), is_blocked)
    assert seen == [("",)]


def test_an_idle_connection_serves_a_finally(postgresql):
    """It is not shut down while its generator waits for another link."""
    began, seen = threading.Event(), []
    ours, theirs = socket.socketpair()

    def source():
        with postgresql.connect() as connection, ours:
            current_stream().link(connection)
            current_stream().link(ours)
            try:
                began.set()
                yield ours.recv(1)
            finally:
                # Longer than until the next look at a link that had no effect.
                query = f"SELECT pg_sleep({links.AGAIN * 2})::text"
                seen.extend(connection.execute(query))

    with theirs:
        ends_at_once(source(), began.is_set)
    assert seen == [("",)]


@pytest.mark.parametrize(
    ("of", "place"),
    [
        ("psycopg", "generator"),
        ("SQLAlchemy", "generator"),
        ("psycopg", "function"),
    ],
)
def test_a_second_cancel_hits_no_finally(of, place, postgresql, monkeypatch):
    """However late it is: the query that it is for has ended, the next one waits."""
    cancel, cancels, cleans, seen = psycopg.Connection.cancel_safe, [], [], []
    running = "SELECT query FROM pg_stat_activity WHERE pid = %s AND state = 'active'"

    def source():
        connection = postgresql.connect()  # closed by its link
        link_as(of, connection)
        if place == "function":
            yield "a"
            query(connection)
            return
        try:
            yield "a"
            connection.execute("SELECT pg_sleep(602)")
        finally:
            clean_up(connection)

    def query(connection):
        try:
            connection.execute("SELECT pg_sleep(602)")
        finally:
            clean_up(connection)

    def clean_up(connection):
        cleans.append(connection)
        seen.extend(connection.execute("SELECT pg_sleep(0.5)::text"))

    def link_as(of, connection):
        if of == "SQLAlchemy":
            engine = sqlalchemy.create_engine(
                "postgresql+psycopg://",
                creator=lambda: connection,
                poolclass=sqlalchemy.NullPool,
            )
            connection = engine.connect()
        current_stream().link(connection)

    def cancel_late(connection, timeout):
        cancels.append(connection)
        if len(cancels) != 2:  # the first one comes before the query, and is lost
            return
        pid = connection.info.backend_pid
        postgresql.execute("SELECT pg_cancel_backend(%s)", pid)
        await_true(lambda: cleans)
        # Long enough for the next query to begin, if nothing holds it up.
        until = time.monotonic() + 0.3
        while time.monotonic() < until and not postgresql.execute(running, pid):
            time.sleep(0.01)
        cancel(connection, timeout=timeout)

    def is_blocked():
        query = "SELECT 1 FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(602)'"
        return postgresql.execute(query + " AND state = 'active'")

    monkeypatch.setattr(psycopg.Connection, "cancel_safe", cancel_late)
    ends_at_once(source(), is_blocked)
    assert seen == [("",)]
    assert len(cancels) == 2


def test_two_links_of_a_connection_are_one_cancel(postgresql, monkeypatch):
    """Its next query is held up once, however they overlap, and let go for good."""
    before, cancels = set(threading.enumerate()), []

    def cancel_later(connection, timeout):
        cancels.append(threading.Event())
        assert cancels[-1].wait(TIMEOUT)

    def under_way():
        return len(set(threading.enumerate()) - before)

    monkeypatch.setattr(psycopg.Connection, "cancel_safe", cancel_later)
    with postgresql.connect() as connection:
        lock = connection.lock
        links.Link(connection).unblock(is_waiting=True)
        await_true(lambda: cancels)
        links.Link(connection.cursor()).unblock(is_waiting=True)
        await_true(lambda: under_way() == 1 or len(cancels) == 2)
        for go in cancels:
            left = under_way() - 1
            go.set()
            await_true(lambda left=left: under_way() <= left)
        assert connection.lock is lock
        assert connection.execute("SELECT 1").fetchone() == (1,)
    assert len(cancels) == 1


def test_a_cancel_without_an_answer_holds_no_query_up_for_long(postgresql, monkeypatch):
    """A server that is lost is not to keep a ``finally`` waiting, too."""
    asked, go, answered = threading.Event(), threading.Event(), threading.Event()

    def cancel_in_vain(connection, timeout):
        asked.set()
        go.wait(TIMEOUT)
        answered.set()

    monkeypatch.setattr(links, "UNANSWERED", 0.1)
    monkeypatch.setattr(psycopg.Connection, "cancel_safe", cancel_in_vain)
    with postgresql.connect() as connection:
        lock = connection.lock
        links.Link(connection).unblock(is_waiting=True)
        assert asked.wait(TIMEOUT)
        assert connection.execute("SELECT 1").fetchone() == (1,)
        assert not answered.is_set()
        go.set()
        await_true(lambda: connection.lock is lock)


def test_a_cancel_stops_no_other_thread(postgresql):
    """Not even while the server does not answer it: here the other thread lets it."""
    assert check_script(CANCEL_SLOWLY, str(postgresql.port)) == "accepted\n"


CANCEL_SLOWLY = """
import psycopg, sys
from syncstream.streams.links import Link
from tests.support.postgresql_server import Line
from tests.support.waits import await_true

url = "postgresql://postgres@127.0.0.1:%d/postgres"
with Line(int(sys.argv[1])) as line, psycopg.connect(url % line.port) as connection:
    lock = connection.lock
    line.silence()
    Link(connection).unblock(is_waiting=True)
    await_true(lambda: line.waiting)  # a thread of this process has accepted it
    print("accepted")
    line.mend()
    await_true(lambda: connection.lock is lock)
"""


def test_a_redis_pubsub_ends(redis_server, caplog):
    """At once, though redis-py would connect again; its pool's next user may retry."""
    client = redis_server.client()
    subscribed = threading.Event()

    def source():
        with client.pubsub() as pubsub:
            pubsub.subscribe("channel")
            before.append(pubsub.connection.retry.get_retries())
            for message in current_stream().link(pubsub).listen():
                subscribed.set()
                yield str(message)

    before = []
    with client:
        ends_at_once(source(), subscribed.is_set)
        connection = client.connection_pool.get_connection()
        assert [connection.retry.get_retries()] == before
        client.connection_pool.release(connection)
    journal().flush()
    assert caplog.records == []


SILENT = "import sys, time; print('ready', flush=True); time.sleep(600)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SILENT}"


@pytest.mark.parametrize("code", [SILENT, STUBBORN], ids=["silent", "stubborn"])
@pytest.mark.parametrize("end", ["leave", "by itself"])
def test_a_process_ends(code, end, caplog):
    """SIGTERM, then SIGKILL; no zombie and no pipe is left."""
    processes, ready = [], threading.Event()

    def source():
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        processes.append(current_stream().link(process))
        for line in process.stdout:
            yield line
            ready.set()
            if end == "by itself":
                return

    if end == "leave":
        ends_at_once(source(), ready.is_set)
    else:
        serve(stream_of(source(), Line()))
    [process] = processes
    expected = signal.SIGTERM if code is SILENT else signal.SIGKILL
    assert process.returncode == -expected
    assert process.stdin.closed
    assert process.stdout.closed
    journal().flush()
    assert caplog.records == []


# An os.close() that waits for the hub keeps what Popen reads from ending (3.10).
@pytest.mark.parametrize(
    "patch", ["patch_all()", "patch_all(subprocess=False, os=False, signal=False)"]
)
def test_a_process_ends_under_gevent(patch):
    """The read is interrupted, and the process ended, while the hub goes on."""
    pytest.importorskip("gevent")
    script = f"import gevent.monkey; gevent.monkey.{patch}\n{IN_A_HUB}"
    assert check_script(script) == ""


IN_A_HUB = """
import gevent, subprocess, sys
from tests.support.pairs import Line, serve, stream_of
from syncstream import current_stream, sleep

processes, ready = [], []
code = "import time; time.sleep(600)"

def source():
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    processes.append(current_stream().link(process))
    ready.append(1)
    sleep(600)
    yield "a"

stream = stream_of(source(), Line())
greenlet = gevent.spawn(serve, stream)
with gevent.Timeout(10):
    while not ready:
        gevent.sleep(0.001)
    stream.stop("kicked")
    greenlet.get()
assert processes[0].returncode == -15, processes[0].returncode
assert processes[0].stdout.closed
assert stream.reason == "kicked"
"""


def test_a_close_may_wait():
    """A link's own close() sleeps, after its generator was told of the end."""
    closed = []

    class Slow:
        def close(self):
            sleep(0.001)
            closed.append(current_stream())

    def function():
        current_stream().link(Slow())
        sleep(600)

    waiting = Waiting(function)
    waiting.await_wait()
    waiting.stream.stop()
    waiting.join()
    await_true(lambda: closed)
    assert waiting.stream in closed


def test_a_process_of_multiprocessing_ends():
    """Its end of the pipe closes, so the read of ours ends."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    processes, reads = [], threading.Event()

    def source():
        # It waits for its own end of the pipe, to which nobody writes.
        wait = multiprocessing.connection.wait
        process = context.Process(target=wait, args=([theirs],))
        process.start()
        theirs.close()
        processes.append(current_stream().link(process))
        with ours:
            reads.set()
            yield ours.recv_bytes()

    ends_at_once(source(), reads.is_set)
    with pytest.raises(ValueError, match="closed"):
        processes[0].is_alive()


def pipe():
    read, write = os.pipe()
    os.close(write)
    return open(read, "rb")


def one_way():
    ours, theirs = multiprocessing.Pipe(duplex=False)
    theirs.close()
    return ours


class FakePool(multiprocessing.pool.Pool):
    """One without processes."""

    _state, _pool = "RUN", ()

    def __init__(self):
        pass

    def __del__(self):
        pass

    def close(self):
        pass


class Asynchronous:
    async def close(self):
        raise AssertionError


REFUSED = {
    "pipe": (pipe, "link the process"),
    "text of a pipe": (lambda: io.TextIOWrapper(pipe()), "link the process"),
    "one way": (one_way, "link the process"),
    "device": (Path("/dev/zero").open, "a read or wait of this one would go on"),
    "selector": (selectors.DefaultSelector, "a read or wait of this one would go on"),
    "generator": (lambda: (n for n in [1]), "link the object that it reads from"),
    "session": (requests.Session, "link the response"),
    "urllib3": (lambda: urllib3.HTTPConnectionPool("127.0.0.1"), "link the response"),
    "context": (
        lambda: httpx.stream("GET", "http://127.0.0.1"),
        "enter it with `with`",
    ),
    "asynchronous": (Asynchronous, "be synchronous"),
    "pool of processes": (FakePool, "link the object that its work reads from"),
    "queue of processes": (multiprocessing.Queue, r"get\(\) does not end"),
    "SQLAlchemy's session": (
        lambda: sqlalchemy.orm.Session(sqlalchemy.create_engine("sqlite://")),
        r"link the connection itself \(session.connection\(\)\)",
    ),
    "peewee": (
        lambda: peewee.SqliteDatabase(":memory:"),
        "link the connection itself",
    ),
    "HTTP/2": (
        lambda: httpx.Response(200, extensions={"http_version": b"HTTP/2"}),
        "without http2=True",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_effect_is_refused(name):
    """At once, with what to link instead."""
    make, text = REFUSED[name]
    closable = make()
    try:
        with pytest.raises(TypeError, match=text) as raised:
            stream_of([]).link(closable)
        assert str(raised.value).startswith("closable must ")
    finally:
        if name not in ("context", "asynchronous"):
            closable.close()


def test_a_redis_client_of_many_connections_is_refused(redis_server):
    """Closing it ends nobody's wait for good: redis-py connects again."""
    with (
        redis_server.client() as client,
        pytest.raises(TypeError, match=r"link its pubsub\(\)"),
    ):
        stream_of([]).link(client)


ACCEPTED = {
    "file": tempfile.TemporaryFile,
    "bytes": io.BytesIO,
    "sqlite3": lambda: sqlite3.connect(":memory:"),
    "socket": socket.socket,
    "http": lambda: http.client.HTTPConnection("127.0.0.1"),
    "a test's response": lambda: httpx.Response(200, content=b"x"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_cannot_block_is_closed(name):
    """Files and the like have nothing to end: they are closed with the stream."""
    noted = Closed(ACCEPTED[name]())

    def source():
        assert current_stream().link(noted) is noted
        yield "a"

    serve(stream_of(source(), Line()))
    assert noted.closed_by == [threading.get_ident()]


def test_a_close_without_effect_is_said(monkeypatch, caplog):
    """An object whose close() ends nothing: the log names it, once."""
    monkeypatch.setattr("syncstream.streams.monitor.USELESS", 0.0)

    class Useless:
        def close(self):
            pass

    blocked = threading.Event()

    def source():
        current_stream().link(Useless())
        blocked.set()
        await_true(lambda: caplog.records)
        yield "a"

    ends_at_once(source(), blocked.is_set)
    [record] = caplog.records
    assert "what it has linked" in record.message
    assert "Useless) does not end what it waits in" in record.message


class Closed:
    """Passes all through, and knows who has closed it."""

    def __init__(self, inner):
        self.inner = inner
        self.closed_by = []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def close(self):
        self.closed_by.append(threading.get_ident())
        self.inner.close()


def read_requests(upstream, link):
    host, port = upstream.server_address
    response = link(requests.get(f"http://{host}:{port}/", stream=True, timeout=60))
    yield from response.iter_lines(chunk_size=1)


def read_http_response(upstream, link):
    client = http.client.HTTPConnection(*upstream.server_address)
    try:
        client.request("GET", "/")
        response = link(client.getresponse())
        while line := response.readline():
            yield line
    finally:
        client.close()


def read_http_connection(upstream, link):
    upstream.answers = False
    client = link(http.client.HTTPConnection(*upstream.server_address))
    yield b"waiting"
    client.request("GET", "/")
    client.getresponse()


def read_socket(upstream, link):
    sock = link(socket.create_connection(upstream.server_address))
    sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
    while data := sock.recv(1000):
        yield data


def read_file_of_a_socket(upstream, link):
    with socket.create_connection(upstream.server_address) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        yield from link(sock.makefile("rb"))


READERS = (
    read_requests,
    read_http_response,
    read_http_connection,
    read_socket,
    read_file_of_a_socket,
)


@pytest.mark.parametrize("end", ["hang-up", "stop"])
@pytest.mark.parametrize("read", READERS)
def test_a_linked_read_ends(read, end, upstream, caplog):
    """At once; it is closed once by the generator's thread; nothing is logged."""
    seen, links = [], []

    def source():
        def link(closable):
            links.append(Closed(closable))
            return current_stream().link(links[0]) and closable

        seen.append(threading.get_ident())
        yield from read(upstream, link)

    with tcp_pair() as (server, client):
        stream = stream_of(source(), Line(server))
        join = PLACE.start(lambda: serve(stream))
        assert upstream.asked.wait(TIMEOUT)
        PLACE.pause(0.02)
        if end == "hang-up":
            leave(client)
        else:
            stream.stop("kicked")
        join()
    assert stream.reason == ("disconnected" if end == "hang-up" else "kicked")
    assert links[0].closed_by == seen
    journal().flush()
    assert caplog.records == []


QUERY = """
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)
SELECT max(i) FROM n
"""


@pytest.mark.parametrize("what", ["connection", "cursor"])
def test_a_linked_query_is_interrupted(what, caplog):
    """sqlite3: its error is no failure of the stream."""
    seen, running = [], threading.Event()

    def source():
        database = sqlite3.connect(":memory:")
        try:
            cursor = database.cursor()
            current_stream().link(cursor if what == "cursor" else database)
            # Called while it runs: to interrupt it sooner would be to miss it.
            database.set_progress_handler(running.set, 1000)
            yield cursor.execute(QUERY).fetchone()
        except sqlite3.OperationalError as error:
            seen.append(str(error))
            raise
        finally:
            database.close()

    with tcp_pair() as (server, client):
        stream = stream_of(source(), Line(server))
        join = PLACE.start(lambda: serve(stream))
        assert running.wait(TIMEOUT)
        leave(client)
        assert join() == [b": ok\n\n"]
    assert seen == ["interrupted"]
    assert stream.reason == "disconnected"
    journal().flush()
    assert caplog.records == []


def sqlite():
    return sqlite3.connect(":memory:", check_same_thread=False)


def of_django():
    """What `django.db.connection` is: another connection in each thread."""
    database = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
    proxy = ConnectionProxy(ConnectionHandler({"default": database}), "default")
    return proxy, lambda: (proxy.connection, proxy.connection.execute)


def of_werkzeug():
    """A proxy of what this thread has, as Flask's `g` has it."""
    local = threading.local()
    local.database = sqlite()
    proxy = LocalProxy(lambda: local.database)
    return proxy, lambda: (local.database, local.database.execute)


def engine():
    options = {"check_same_thread": False}
    return sqlalchemy.create_engine("sqlite://", connect_args=options)


def of_sqlalchemy():
    """A connection of a session's."""
    session = sqlalchemy.orm.Session(engine())
    connection = session.connection()
    driver = connection.connection.driver_connection
    return connection, lambda: (driver, connection.exec_driver_sql)


def a_result_of_sqlalchemy():
    """It has a connection, which has the driver's."""
    connection = engine().connect()
    driver = connection.connection.driver_connection
    result = connection.exec_driver_sql("SELECT 1")
    return result, lambda: (driver, connection.exec_driver_sql)


@pytest.mark.parametrize(
    "make", [of_django, of_werkzeug, of_sqlalchemy, a_result_of_sqlalchemy]
)
def test_what_stands_for_a_connection_is_interrupted(make, caplog):
    """Also by a thread for which a proxy of threads is another connection."""
    seen, databases, running = [], [], threading.Event()

    def source():
        linked, used = make()
        if make is of_django:
            linked.ensure_connection()
        assert current_stream().link(linked) is linked
        database, execute = used()
        databases.append(database)
        database.set_progress_handler(running.set, 1000)
        try:
            yield execute(QUERY).fetchone()
        except Exception as error:
            seen.append(str(error))
            raise
        finally:
            getattr(execute, "__self__", linked).close()

    ends_at_once(source(), running.is_set)
    databases[0].close()
    [text] = seen
    assert "interrupted" in text
    journal().flush()
    assert caplog.records == []


@pytest.mark.parametrize("blocks", ["close", "cancel"])
def test_a_link_that_blocks_holds_nobody_up(blocks):
    """Neither the watch nor stop(): another stream ends meanwhile."""
    go, blocked, closed_in = threading.Event(), threading.Event(), []

    class Slow:
        def close(self):
            if blocks == "close" and not go.is_set():
                blocked.set()
                go.wait(TIMEOUT)
            closed_in.append(threading.get_ident())

    if blocks == "cancel":
        Slow.cancel = lambda self: (blocked.set(), go.wait(TIMEOUT))

    def slow():
        current_stream().link(Slow())
        try:
            return sleep(60)
        finally:
            assert blocked.wait(TIMEOUT)

    with tcp_pair() as (server, client), tcp_pair() as (server2, client2):
        first = Waiting(slow, Line(server), final=threading.get_ident)
        second = Waiting(lambda: sleep(60), Line(server2))
        first.await_wait()
        leave(client)
        assert blocked.wait(TIMEOUT)
        leave(client2)
        second.join()
        go.set()
        first.join()
        await_true(lambda: len(closed_in) == 1 + (blocks == "close"))
    assert closed_in.count(first.final) == 1


def test_a_link_that_fails_spares_the_others(caplog):
    """What it raises when it is looked at is not raised to who stops the stream."""

    class Odd:
        closed = 0

        def __getattr__(self, name):
            raise RuntimeError(name)

        def close(self):
            self.closed += 1

    odd = Odd()

    def function():
        current_stream().link(odd)
        sleep(60)

    waiting = Waiting(function)
    waiting.await_wait()
    waiting.stream.stop()
    waiting.join()
    assert waiting.seen == [GeneratorExit]
    assert odd.closed == 1
    journal().flush()
    assert caplog.records == []


def test_links_are_closed_in_good_order_too():
    """Each once, the last one first, when the source has ended by itself."""
    order = []

    class Named:
        def __init__(self, name):
            self.name = name

        def close(self):
            order.append(self.name)

    def source():
        assert current_stream().link(Named("first")).name == "first"
        current_stream().link(Named("second"))
        yield "a"
        order.append("source")

    stream = stream_of(source(), Line())
    serve(stream)
    stream.close()
    assert order == ["source", "second", "first"]


def test_a_link_comes_too_late():
    """The stream has ended meanwhile: it is unblocked at once, and closed."""
    seen = []

    class Blocking:
        def cancel(self):
            seen.append("cancelled")

        def close(self):
            seen.append("closed")

    def function():
        current_stream().stop("kicked")
        current_stream().link(Blocking())
        await_true(lambda: seen)
        sleep(60)

    waiting = Waiting(function)
    waiting.join()
    assert seen == ["cancelled", "closed"]


def test_a_helpers_late_link_ends_the_source_not_the_helper():
    """A greenlet that throws into another one does not run on by itself."""
    place, seen = Greenlets(), []

    class Quiet:
        def cancel(self):
            """Nothing waits in it."""

        def close(self):
            seen.append("closed")

    def source():
        yield "a"
        seen.append("waits")
        sleep(60)

    def help():
        stream.stop("kicked")
        stream.link(Quiet())
        seen.append("goes on")

    stream = stream_of(source())
    join = place.start(lambda: serve(stream))
    place.await_true(lambda: seen)
    helper = place.start(help)
    join()
    helper()
    assert seen == ["waits", "goes on", "closed"]


@pytest.mark.parametrize("thing", [None, object(), "text"])
def test_a_link_must_have_a_close(thing):
    """Said at once."""
    with pytest.raises(TypeError, match=r"closable must have a close\(\)"):
        stream_of([]).link(thing)
