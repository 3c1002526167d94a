"""Hand-over: a connection leaves its server byte by byte right, or stays with it."""

import gc
import json
import os
import socket
import ssl
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncstream.runtime.sockets import is_hung_up
from syncstream.runtime.watch import watch
from syncstream.servers import server_of
from syncstream.servers.framing import read_back
from syncstream.servers.swap import Refused, Swap
from tests.apps.swap_app import JUNK, OPENING
from tests.servers.environs import environ_of
from tests.support.descriptors import open_files
from tests.support.live import SERVERS, LiveServer, unique_key
from tests.support.pairs import check_script, leave, tcp_pair
from tests.support.programs import certificate
from tests.support.waits import TIMEOUT, await_true

KINDS = (*SERVERS, "gunicorn-gevent_pywsgi")
KEEP_ALIVE = (
    "gunicorn-gthread",
    "gunicorn-gevent",
    "gunicorn-gevent_pywsgi",
    "pywsgi",
    "waitress",
    "cheroot",
)
APP = "tests.apps.swap_app:app"


def serving(kind, *options, **more):
    """Return a server of the streams."""
    if kind == "gunicorn-gevent_pywsgi":
        kind, options = "gunicorn-gevent", ("-k", "gevent_pywsgi", *options)
    if kind.startswith("gunicorn"):
        # For longer than we may pause between two requests; its own are 2 s.
        options = ("--keep-alive", "60", *options)
    return LiveServer(kind, APP, *options, **more)


@pytest.fixture(scope="module", params=KINDS)
def server(request):
    """Each server in turn."""
    with serving(request.param) as server:
        server.name = request.param
        warm_up(server)
        yield server


@pytest.fixture(scope="module", params=KEEP_ALIVE)
def keeping(request):
    """Each server that keeps connections, in turn."""
    with serving(request.param) as server:
        server.name = request.param
        warm_up(server)
        yield server


@pytest.fixture
def tag():
    return unique_key()


@pytest.fixture
def before(request):
    """What the server's process holds, before the test; it holds that after it."""
    name = "server" if "server" in request.fixturenames else "keeping"
    server = request.getfixturevalue(name)
    before = settled(server)
    yield before
    await_true(
        lambda: state(server)["fds"] <= before["fds"],
        lambda: f"{before} {state(server)}\n{server.log()[-2000:]}",
    )
    assert server.tracebacks() == 0, server.log()


def warm_up(server):
    """Let what a process starts once be there: the watch."""
    with server.get("/events") as client:
        client.rest()
    await_count(server, "closed", 1)


def state(server):
    with server.get("/state", version="1.0") as client:
        return json.loads(client.rest())


def settled(server):
    """Return the state, once connections of before are closed."""
    last = state(server)
    while True:
        time.sleep(0.02)
        now = state(server)
        if now["fds"] >= last["fds"]:
            return now
        last = now


def await_count(server, name, n):
    await_true(
        lambda: state(server).get(name, 0) == n,
        lambda: f"{state(server)}\n{server.log()[-2000:]}",
    )


def request(path, version="1.1", method="GET", **headers):
    lines = [f"{method} {path} HTTP/{version}", "Host: localhost"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""])


def everything(client):
    """Return all that comes up to the end of the connection."""
    parts = []
    while data := client.socket.recv(65536):
        parts.append(data)
    return b"".join(parts)


def events(tag, how, n=3):
    return [f"data: {tag} {how} {i}\n\n".encode() for i in range(n)]


def body(chunks, framed):
    if not framed:
        return b"".join(chunks)
    return b"".join(b"%x\r\n%s\r\n" % (len(c), c) for c in [*chunks, b""])


def assert_handed_over(answer, tag, *, framed, n=3):
    """It is one head, and the opening and the events in one framing, and no more."""
    head, _, rest = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    assert first.split(" ", 1)[1] == "200 OK"
    pairs = (line.lower().split(": ") for line in lines)
    headers = [tuple(pair) for pair in pairs]
    assert headers.count(("connection", "close")) == 1
    names = [name for name, _ in headers]
    assert sorted(set(names)) == sorted(names)
    assert ("transfer-encoding" in names) == framed
    opening = body([OPENING], framed)
    opening = opening.removesuffix(b"0\r\n\r\n")
    assert rest.lower() == opening + body(events(tag, "handed", n), framed)


# From end to end.


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_a_stream_leaves_its_server(server, before, version, tag):
    """All that the client gets is exact; the server's part is over at once."""
    with server.connect() as client:
        client.send(request(f"/events?tag={tag}", version))
        answer = everything(client)
    framed = version == "1.1" and server.kind != "uwsgi"
    assert_handed_over(answer, tag, framed=framed)
    await_count(server, "taken", before.get("taken", 0) + 1)


def test_a_middleware_may_peek(server, before, tag):
    """Who asks for the first item before there is a head does not hinder."""
    with server.get(f"/peek/events?tag={tag}") as client:
        assert client.rest() == b"".join([OPENING, *events(tag, "handed")])


def test_a_server_is_free_of_a_stream(server, before, tag):
    """It answers others while twenty streams are open, and waits for none of these."""
    words = request(f"/events?tag={tag}&n=1&hold=1")
    clients = []
    try:
        for _ in range(20):
            client = server.connect()
            clients.append(client)
            client.send(words[:20])
            if server.kind != "gunicorn-sync":  # which serves nobody else meanwhile
                state(server)  # the server waits for the rest
            client.send(words[20:])
            assert client.block() + client.block() == b"".join(
                [OPENING, *events(tag, "handed", 1)]
            )
        # gevent's loop, left alone, finds connections where it had waited for them.
        watched = before["watched"]
        await_true(lambda: state(server)["watched"] <= watched + 2)
        for i in range(20):
            with server.get(f"/plain?tag={tag}-{i}") as other:
                assert other.rest() == f"{tag}-{i}".encode()
        assert state(server).get("left", 0) == before.get("left", 0)
    finally:
        for client in clients:
            leave(client.socket)
    await_count(server, "left", before.get("left", 0) + 20)


@pytest.mark.parametrize("how", ["FIN", "RST", "bytes, FIN"])
def test_a_client_that_leaves_is_the_new_owner_s(server, before, how, tag):
    """Who has the connection learns that the client has left; the server does not."""
    with server.get(f"/events?tag={tag}&n=1&hold=1") as client:
        client.block()
        client.block()
        leave(client.socket, how)
        await_count(server, "left", before.get("left", 0) + 1)


def test_requests_come_before_it(keeping, before, tag):
    """A connection that has served others is taken as well, also in pieces."""
    with keeping.connect() as client:
        for i in range(3):
            client.request("GET", f"/plain?tag={tag}-{i}")
            client.read_head()
            assert client.rest() == f"{tag}-{i}".encode()
        words = request(f"/events?tag={tag}")
        client.send(words[:20])
        state(keeping)  # the server waits for the rest
        client.send(words[20:])
        assert_handed_over(everything(client), tag, framed=True)


@pytest.mark.parametrize("kind", KEEP_ALIVE)
def test_the_last_of_pipelined_requests_is_taken(kind, tag):
    """It leaves with the answers before it sent, or it stays."""
    with serving(kind) as server, server.connect() as client:
        plain = request(f"/plain?tag={tag}")
        client.send(3 * plain + request(f"/events?tag={tag}", Connection="close"))
        for _ in range(3):
            answer = client.read_until(b"\r\n\r\n") + client.read_until(tag.encode())
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
            assert answer.endswith(b"\r\n\r\n" + tag.encode())
        client.read_head()
        chunks = client.rest()
        how = "handed" if b"handed" in chunks else "attached"
        assert chunks == b"".join([OPENING, *events(tag, how)])
        assert client.is_whole
        assert server.tracebacks() == 0


def test_what_is_pipelined_behind_is_not_answered(server, before, tag):
    """Nor executed: the head has said that the connection closes (RFC 9112 §9.6)."""
    with server.connect() as client:
        plain = request(f"/plain?tag={tag}")
        client.send(request(f"/events?tag={tag}") + 2 * plain)
        assert_handed_over(everything(client), tag, framed=server.kind != "uwsgi")
    await_true(lambda: state(server)["fds"] <= before["fds"])
    assert f"plain {tag}" not in state(server)


BODIES = {
    "sent": ({"Content_Length": 3}, "abc"),
    "announced": ({"Content_Length": 1}, ""),
    "half": ({"Content_Length": 300_000}, "x" * 100_000),
    "chunked, empty": ({"Transfer_Encoding": "chunked"}, "0\r\n\r\n"),
    "chunked": ({"Transfer_Encoding": "chunked"}, "3\r\nabc\r\n3\r\ndef\r\n0\r\n\r\n"),
    "chunked, announced": ({"Transfer_Encoding": "chunked"}, ""),
    "expected": ({"Content_Length": 3, "Expect": "100-continue"}, ""),
}
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@pytest.mark.parametrize("view", ["", "read/", "part/"])
@pytest.mark.parametrize("which", BODIES)
def test_a_body_keeps_no_stream(server, before, which, view, tag):
    """Sent, announced, or read by the view: the stream leaves, and nothing else runs.

    What is pipelined behind the body is neither answered nor executed.
    """
    headers, data = BODIES[which]
    is_whole = which in ("sent", "chunked, empty", "chunked")
    # waitress gives nothing to an application before the body is whole.
    if not is_whole and (view or server.kind == "waitress"):
        return
    if "chunked" in which and server.kind == "uwsgi" and view:
        return  # its wsgi.input knows no chunks
    with server.connect() as client:
        behind = request(f"/plain?tag={tag}") if is_whole else ""
        client.send(request(f"/{view}events?tag={tag}", **headers) + data + behind)
        answer = everything(client).replace(CONTINUE, b"")  # Werkzeug says it twice
        assert_handed_over(answer, tag, framed=server.kind != "uwsgi")
    await_true(lambda: state(server)["fds"] <= before["fds"])
    assert f"plain {tag}" not in state(server)


def test_what_is_sent_during_a_stream_is_ignored(server, before, tag):
    """A second request, a third: the events go on, and nothing is executed."""
    with server.get(f"/events?tag={tag}&n=30") as client:
        assert client.block() == OPENING
        assert client.block() == events(tag, "handed")[0]
        client.send(request(f"/plain?tag={tag}") + request(f"/events?tag={tag}"))
        assert client.rest() == b"".join(events(tag, "handed", 30)[1:])
    await_true(lambda: state(server)["fds"] <= before["fds"])
    now = state(server)
    assert f"plain {tag}" not in now
    assert now["taken"] == before.get("taken", 0) + 1


# Put back.

UNDONE = {
    "one": lambda text: text,
    "two": lambda text: text,
    "length": lambda text: text,
    "large": lambda text: text.replace(JUNK, b""),
    "gzip": lambda text: zlib.decompress(text, wbits=31),
}


@pytest.mark.parametrize("wrapper", UNDONE)
def test_what_cannot_be_read_back_is_put_back(server, before, wrapper, tag):
    """Prefetched, with a length, joined, compressed: the stream stays, whole."""
    tag = "" if wrapper == "length" else tag
    with server.get(f"/{wrapper}/events?tag={tag}") as client:
        text = client.rest()
        assert client.is_whole or server.kind == "uwsgi"
    assert UNDONE[wrapper](text) == b"".join([OPENING, *events(tag, "attached")])
    if wrapper == "large":
        assert text.count(JUNK) == 4
    assert state(server)["undone"] == before.get("undone", 0) + 1
    assert state(server).get("taken", 0) == before.get("taken", 0)


def test_a_stream_closed_after_its_first_item_is_put_back(server, before, tag):
    """The client gets the head, the opening, and the end."""
    with server.get(f"/first/events?tag={tag}") as client:
        assert client.rest() == OPENING
        assert client.is_whole or server.kind == "uwsgi"


def test_a_connection_that_was_put_back_serves_on(keeping, before, tag):
    """A next request on it is answered, though gevent had registered the socket."""
    if keeping.kind == "waitress":
        return  # it closes whatever has no length
    with keeping.connect() as client:
        for i in range(5):
            for wrapper in ("one", "first"):
                words = request(f"/{wrapper}/events?tag={tag}")
                client.send(words[:20])
                state(keeping)  # the server waits for the rest
                client.send(words[20:])
                client.read_head()
                assert client.rest().startswith(OPENING)
            client.request("GET", f"/plain?tag={tag}-{i}")
            client.read_head()
            assert client.rest() == f"{tag}-{i}".encode()


# Refused.


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return certificate(tmp_path_factory.mktemp("tls"))


@pytest.mark.parametrize(
    "kind", ["gunicorn-gthread", "gunicorn-gevent", "gunicorn-gevent_pywsgi"]
)
def test_tls_stays(kind, certificates, tag):
    """Who holds the keys is the server."""
    cert, key = map(str, certificates)
    with serving(kind, "--certfile", cert, "--keyfile", key, tls=True) as server:
        with server.get(f"/events?tag={tag}") as client:
            assert client.rest() == b"".join([OPENING, *events(tag, "attached")])
        now = state(server)
        assert now["the server speaks TLS"] == 1
        assert "taken" not in now
        assert server.tracebacks() == 0


def test_other_methods_stay(server, before, tag):
    """HEAD has no body to go on with, and what a POST has sent is still to be read."""
    with server.connect() as client:
        client.send(request("/events", method="HEAD", Connection="close"))
        everything(client)
    with server.connect() as client:
        client.send(request(f"/events?tag={tag}", method="POST", Content_Length=3))
        client.send("abc")
        assert client.rest() == b"".join([OPENING, *events(tag, "attached")])
    now = state(server)
    refusals = {
        "the method is HEAD, not GET",
        "the method is POST, not GET",
    }
    for refusal in refusals:
        assert now[refusal] == before.get(refusal, 0) + 1


WAITRESS = """
import logging, os, socket, threading, waitress
# It warns of a request that comes before its threads have begun to wait.
logging.getLogger("waitress.queue").setLevel(logging.ERROR)

def answer_of(app, **options):
    server = waitress.create_server(app, host="127.0.0.1", port=0, **options)
    loop = threading.Thread(target=server.run, daemon=True)
    loop.start()
    with socket.create_connection(("127.0.0.1", server.effective_port), 10) as client:
        client.sendall(b"GET /events?tag=T HTTP/1.0\\r\\n\\r\\n")
        with client.makefile("rb") as file:
            data = file.read()
    server.task_dispatcher.shutdown()
    # In its own thread, which may be about to wait for what would be closed.
    server.trigger.pull_trigger(server.close)
    loop.join(15)
    assert not loop.is_alive()
    return data
"""


def test_waitress_that_reads_ahead_keeps_its_connections():
    """Its main thread reads, and may close, while a stream is open."""
    check_script(
        f"""{WAITRESS}
from tests.apps.swap_app import app, counts
data = answer_of(app, channel_request_lookahead=1)
assert data.endswith(b"data: T attached 2\\n\\n"), data
assert dict(counts) == {{"waitress reads ahead (channel_request_lookahead)": 1}}
"""
    )


def test_waitress_that_closes_gets_nothing_back():
    """Its main thread may be about to close the number, which is another's then."""
    check_script(
        f"""{WAITRESS}
from syncstream.servers import server_of
from syncstream.servers.swap import Refused, Swap

def app(environ, start_response):
    start_response("200 OK", [])
    channel = environ["waitress.client_disconnected"].__self__
    swap = Swap(environ, server_of(environ))
    fd = channel.socket.fileno()
    before = os.fstat(fd)
    channel.connected = False  # as handle_close begins, in the main thread
    swap.undo()
    seen.append(os.fstat(fd) == before)
    try:
        Swap(environ, server_of(environ))
    except Refused as refusal:
        seen.append((str(refusal), refusal.is_gone))
    return [b"unheard"]

seen = []
assert answer_of(app) == b""
assert seen == [True, ("the server is closing it", True)], seen
"""
    )


# Elsewhere, and under load.


@pytest.mark.parametrize("kind", ["gunicorn-gthread", "gunicorn-gevent"])
def test_unix_sockets_leave_too(kind, tmp_path, tag):
    """As they do behind nginx."""
    path = str(tmp_path / "socket")
    with serving(kind, "-b", f"unix:{path}") as server:
        for version in ("1.1", "1.0"):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(TIMEOUT)
                sock.connect(path)
                sock.sendall(request(f"/events?tag={tag}", version).encode())
                parts = []
                while data := sock.recv(65536):
                    parts.append(data)
            assert_handed_over(b"".join(parts), tag, framed=version == "1.1")
        assert server.tracebacks() == 0


@pytest.mark.parametrize("kind", ["gunicorn-gthread", "gunicorn-gevent"])
def test_the_proxy_protocol_changes_nothing(kind, tag):
    """What the proxy said of its client came before."""
    with (
        serving(kind, "--proxy-protocol", "auto") as server,
        server.connect() as client,
    ):
        client.send("PROXY TCP4 192.0.2.1 192.0.2.2 1234 80\r\n")
        client.send(request(f"/events?tag={tag}"))
        assert_handed_over(everything(client), tag, framed=True)


@pytest.mark.parametrize("kind", ["gunicorn-gthread", "gunicorn-gevent", "cheroot"])
def test_the_server_keeps_descriptors_for_itself(kind, tag):
    """Where they run out streams stay with the server, and those that left go on."""
    with serving(kind, env={"DESCRIPTORS": "120"}) as server:
        clients = []
        try:
            for _ in range(120):
                client = server.get(f"/events?tag={tag}&n=1&hold=1")
                assert client.block() == OPENING
                if b"handed" not in client.block():
                    client.close()
                    break
                clients.append(client)
            now = state(server)
            assert 20 < len(clients) == now["taken"]
            assert now["no descriptor is left of 120"] == 1
            for i in range(20):
                with server.get(f"/plain?tag={i}") as other:
                    assert other.rest() == str(i).encode()
            assert state(server).get("left", 0) == 0
        finally:
            for client in clients:
                leave(client.socket)
        await_count(server, "left", len(clients))
        assert server.tracebacks() == 0


def test_clients_that_leave_at_once_leave_nothing(server, before):
    """A hundred resets right behind the request; each that was taken is closed."""
    for i in range(100):
        client = server.get("/events?tag=gone&hold=1")
        leave(client.socket, "RST")
        if i % 4 == 0:
            state(server)  # cheroot lets no more than five connections wait
    await_true(lambda: not open_streams(server), lambda: str(state(server)))


def open_streams(server):
    now = state(server)
    return now.get("taken", 0) - now.get("closed", 0)


def test_no_byte_gets_into_another_connection(server, before, tag):
    """Hand-overs among keep-alive requests, on numbers that come again and again."""
    n = 100

    def subscribe(k):
        for i in range(n):
            mine = f"{tag}-{k}-{i}"
            with server.connect() as client:
                client.send(request(f"/events?tag={mine}"))
                framed = server.kind != "uwsgi"
                assert_handed_over(everything(client), mine, framed=framed)

    def ask(k):
        client = server.connect()
        for i in range(n):
            mine = f"{tag}-{k}-{i}"
            client.request("GET", f"/plain?tag={mine}")
            client.read_head()
            assert client.rest() == mine.encode()
            keeps = server.name in KEEP_ALIVE
            if not keeps or client.headers.get("connection") == "close":
                client.close()
                client = server.connect()
        client.close()

    with ThreadPoolExecutor(6) as pool:
        jobs = [pool.submit(subscribe, f"s{k}") for k in range(3)]
        jobs += [pool.submit(ask, f"a{k}") for k in range(3)]
        for job in jobs:
            job.result()
    assert state(server)["taken"] == before.get("taken", 0) + 3 * n


# One connection, without a server.


def swap_of(sock, **more):
    environ = environ_of(sock, **more)
    return Swap(environ, server_of(environ))


HEAD = b"HTTP/1.1 200 OK\r\nServer: test\r\nConnection: keep-alive\r\n\r\n"
CLOSING = HEAD.replace(b"keep-alive", b"close")


@pytest.fixture
def pair():
    """A server's and a client's end; no descriptor is left."""
    gc.collect()
    before = open_files()
    with tcp_pair() as (server, client):
        client.settimeout(TIMEOUT)
        yield server, client
    gc.collect()
    # The watch may have been looking at the swap: then it drops it, a little later.
    await_true(lambda: not open_files() - before, lambda: open_files() - before)


@pytest.fixture(autouse=True, scope="module")
def _watch():
    """The watch's own descriptors are not a swap's."""
    with tcp_pair() as (server, _):
        swap_of(server).close()


def test_what_is_taken_is_the_caller_s(pair):
    """Not blocking, not inherited, out of the way of select(2), and the only one."""
    server, client = pair
    swap = swap_of(server)
    server.sendall(HEAD + OPENING)
    taken = swap.take(OPENING)
    assert taken.head == CLOSING + OPENING
    assert not taken.is_chunked
    assert taken.fd >= 4096
    assert not os.get_blocking(taken.fd)
    assert not os.get_inheritable(taken.fd)
    assert not os.get_inheritable(server.fileno())
    assert server.recv(100) == b""  # at once
    server.sendall(b"0\r\n\r\n")  # into nothing
    swap.close()
    swap.close()
    with pytest.raises(BrokenPipeError):
        server.sendall(b"more")
    server.close()
    os.write(taken.fd, b"ours")
    os.close(taken.fd)
    assert client.recv(100) == b"ours"
    assert client.recv(100) == b""


def test_undo_loses_nothing(pair):
    """What was written meanwhile comes first; the socket blocks as it did."""
    server, client = pair
    fd = server.fileno()
    swap = swap_of(server)
    server.sendall(b"not a head")
    assert swap.take(OPENING) is None
    server.sendall(b", more")
    swap.undo()
    swap.undo()
    assert server.fileno() == fd
    assert os.get_blocking(fd)
    server.sendall(b", and more")
    swap.close()
    with client.makefile("rb") as file:
        assert file.read(26) == b"not a head, more, and more"
    client.sendall(b"a request")
    assert server.recv(100) == b"a request"


def test_undo_waits_for_a_slow_client(pair):
    """More than the kernel takes is put back, as the client reads it."""
    server, client = pair
    server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 100_000)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 100_000)
    client.settimeout(None)  # with one MSG_WAITALL would not wait
    swap = swap_of(server)
    data = os.urandom(3_000_000)
    server.sendall(data)
    with ThreadPoolExecutor(1) as pool:
        received = pool.submit(client.recv, len(data), socket.MSG_WAITALL)
        swap.undo()
    assert received.result() == data


def test_a_client_that_takes_nothing_is_hung_up(pair, monkeypatch):
    """Put back, but not for ever."""
    monkeypatch.setattr("syncstream.servers.swap.SEND_TIMEOUT", 0.05)
    server, client = pair
    server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    swap = swap_of(server)
    server.sendall(b"x" * 10_000_000)
    swap.undo()
    with pytest.raises(BrokenPipeError):
        server.sendall(b"more")


def test_a_server_cannot_fill_the_memory(pair, monkeypatch):
    """What it writes into a swap has an end: its next write fails."""
    monkeypatch.setattr("syncstream.servers.swap.MOST_WRITTEN", 1_000_000)
    server, _ = pair
    swap = swap_of(server)
    with pytest.raises(BrokenPipeError):
        server.sendall(b"x" * 10_000_000)
    swap.close()


def test_a_server_that_has_closed_gets_nothing_back(pair):
    """Its number may be another's by then: that one is not touched."""
    server, client = pair
    swap = swap_of(server)
    fd = server.fileno()
    server.sendall(b"lost")
    with tcp_pair() as (other, peer):
        server.close()
        os.dup2(other.fileno(), fd)
        swap.close()
        os.write(fd, b"other")
        os.close(fd)
        assert peer.recv(100) == b"other"
    assert client.recv(100) == b""


def test_no_other_thread_puts_a_connection_back(pair):
    """The server may be writing in its own, and may close."""
    server, client = pair
    swap = swap_of(server)
    server.sendall(HEAD + OPENING)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(swap.undo).result()
        pool.submit(swap.close).result()
    assert not has_come_to(client)
    taken = swap.take(OPENING)
    assert taken.head == CLOSING + OPENING
    os.close(taken.fd)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(swap.close).result()


def test_nothing_is_swapped_before_it_is_sent(pair):
    """Bytes that the server keeps would come after those of the new owner."""
    server, client = pair
    environ = environ_of(server)
    waits = replace(server_of(environ), unsent=lambda environ: 1)
    with pytest.raises(Refused, match="has not sent") as raised:
        Swap(environ, waits)
    assert raised.value.is_choice
    server.sendall(b"late")
    assert client.recv(100) == b"late"


def test_undo_waits_for_the_server_s_lock(pair):
    """A server with a thread that writes must not write into the pair just then."""
    server, client = pair
    environ, lock = environ_of(server), threading.Lock()
    locked = replace(server_of(environ), lock=lambda environ: lock)
    with ThreadPoolExecutor(1) as pool:
        swap = pool.submit(Swap, environ, locked).result()
        with lock:
            server.sendall(b"first ")
            undone = pool.submit(swap.undo)
            assert not wait([undone], 0.1).done
            server.sendall(b"second")
        undone.result()
    assert client.recv(12, socket.MSG_WAITALL) == b"first second"


@pytest.fixture
def gevent_with_a_watch():
    """A hub and its watch stay: their descriptors are not a swap's."""
    gevent = pytest.importorskip("gevent")
    gevent.spawn(watch).get()
    return gevent


def test_undo_lets_the_hub_run(gevent_with_a_watch, pair, monkeypatch):
    """Under gevent, where the slow client may wait for another greenlet."""
    gevent = gevent_with_a_watch
    monkeypatch.setattr("syncstream.servers.swap.SEND_TIMEOUT", 5.0)
    server, client = pair
    server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    data, received = os.urandom(100_000), bytearray()

    def put_back():
        swap = swap_of(server)
        server.sendall(data)
        swap.undo()

    def read():
        while len(received) < len(data):
            try:
                received.extend(client.recv(65536) or data)
            except BlockingIOError:
                gevent.sleep(0.001)

    greenlets = [gevent.spawn(read), gevent.spawn(put_back)]
    gevent.joinall(greenlets, timeout=TIMEOUT, raise_error=True)
    assert received == data


def has_come_to(client):
    """Tell whether something has come."""
    client.setblocking(False)
    try:
        return bool(client.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False
    finally:
        client.settimeout(TIMEOUT)


def test_a_swap_that_is_dropped_hangs_up(pair):
    """Whatever thread collects it, it changes no descriptor."""
    server, client = pair
    swap = swap_of(server)
    server.sendall(HEAD + OPENING)
    del swap
    gc.collect()
    assert client.recv(100) == b""
    await_true(lambda: is_hung_up(server.fileno()))
    with pytest.raises(BrokenPipeError):
        server.sendall(b"more")


def test_a_second_request_has_nobody_to_answer(pair):
    """What the server makes of bytes that it had read is over at once."""
    server, _ = pair
    swap = swap_of(server)
    server.sendall(HEAD + OPENING)
    os.close(swap.take(OPENING).fd)
    for _ in range(2):
        with pytest.raises(Refused, match="handed over before") as caught:
            swap_of(server)
        assert caught.value.is_gone
        swap.close()


REFUSED = [
    ({"REQUEST_METHOD": "HEAD"}, "the method is HEAD"),
    ({"REQUEST_METHOD": "POST"}, "the method is POST"),
    ({"SERVER_PROTOCOL": "HTTP/2"}, "the protocol is HTTP/2"),
    ({"SERVER_PROTOCOL": "HTTP/0.9"}, "the protocol is HTTP/0.9"),
    ({"SERVER_PROTOCOL": None}, "the protocol is None"),
    ({"gunicorn.http2.stream_id": 1}, "shared by the streams of HTTP/2"),
]


@pytest.mark.parametrize(("more", "reason"), REFUSED, ids=[r for _, r in REFUSED])
def test_a_request_that_must_stay(pair, more, reason):
    """Nothing has changed, and why is said in plain words."""
    server, client = pair
    with pytest.raises(Refused, match=reason) as caught:
        swap_of(server, **more)
    assert not caught.value.is_gone
    assert not caught.value.is_choice  # HTTP/2 is the operator's, a POST may be meant
    server.sendall(b"attached")
    assert client.recv(100) == b"attached"


def test_a_forged_version_changes_nothing(pair):
    """A request's own header ``Version: 2`` is HTTP_VERSION, too."""
    swap = swap_of(pair[0], HTTP_VERSION="2", CONTENT_LENGTH="0")
    swap.close()


def test_a_later_minor_version_is_answered_as_1_1(pair):
    """A client that says so does not keep its connection in a thread by it."""
    swap = swap_of(pair[0], SERVER_PROTOCOL="HTTP/1.9")
    swap.close()


def test_each_request_of_werkzeug_s_processes_stays(pair):
    """The process ends with it."""
    environ = environ_of(pair[0])
    environ["werkzeug.socket"] = environ.pop("gunicorn.socket")
    environ.update({"wsgi.multiprocess": True, "wsgi.multithread": False})
    with pytest.raises(Refused, match="a process of its own"):
        Swap(environ, server_of(environ))


def test_a_server_without_a_socket_keeps_it():
    """Nothing is known of it."""
    environ = {"REQUEST_METHOD": "GET", "SERVER_PROTOCOL": "HTTP/1.1"}
    with pytest.raises(Refused, match="another server does not show its socket"):
        Swap(environ, server_of(environ))


class Odd(socket.socket):
    """A socket that may keep something to itself."""


def test_only_plain_sockets_leave(pair):
    """By their exact type; and a datagram, and half of a pair, are no connections."""
    server, _ = pair
    with (
        Odd(fileno=os.dup(server.fileno())) as odd,
        socket.socket(type=socket.SOCK_DGRAM) as datagrams,
        open(os.devnull) as file,
    ):
        datagrams.bind(("127.0.0.1", 0))
        datagrams.connect(datagrams.getsockname())
        with pytest.raises(Refused, match=r"the socket is a .*Odd"):
            swap_of(odd)
        with pytest.raises(Refused, match="not a stream"):
            swap_of(datagrams)
        with pytest.raises(Refused, match=r"the socket is a _io\.TextIOWrapper"):
            swap_of(file)
    one, other = socket.socketpair()
    with one, other, pytest.raises(Refused, match="one of a pair"):
        swap_of(one)


def test_a_tls_socket_stays(pair, certificates):
    """By its exact type, too, whatever the server says."""
    server, client = pair
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificates)
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ours.check_hostname, ours.verify_mode = False, ssl.CERT_NONE
    with ThreadPoolExecutor(1) as pool:
        shaken = pool.submit(context.wrap_socket, server, server_side=True)
        with ours.wrap_socket(client), shaken.result() as wrapped:
            with pytest.raises(Refused, match="the server speaks TLS"):
                swap_of(wrapped)
            environ = environ_of(wrapped)
            unaware = replace(server_of(environ), is_tls=lambda environ: False)
            with pytest.raises(Refused, match=r"the socket is a ssl\.SSLSocket"):
                Swap(environ, unaware)


@pytest.mark.parametrize("how", ["FIN", "RST", "bytes, FIN"])
def test_a_client_that_has_left_is_gone(pair, how):
    """There is nobody for the server either."""
    server, client = pair
    leave(client, how)
    await_true(lambda: is_hung_up(server.fileno()))
    with pytest.raises(Refused, match="has left") as caught:
        swap_of(server)
    assert caught.value.is_gone


def test_a_closed_socket_is_gone(pair):
    """The server itself has left."""
    server, _ = pair
    server.close()
    with pytest.raises(Refused, match="has left") as caught:
        swap_of(server)
    assert caught.value.is_gone


def test_the_limit_of_descriptors_is_for_connections_alone():
    """They go beyond the soft one, which is what programs inherit, and children.

    Below 4096 their numbers begin lower.
    """
    check_script(
        """
import os, resource, subprocess, sys, threading
from tests.support.pairs import tcp_pair
from syncstream.servers import server_of
from syncstream.servers.descriptors import descriptor_limit, soft_limit
from syncstream.servers.swap import Swap
from types import SimpleNamespace
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
limits = lambda: resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 1000))
assert descriptor_limit() == 1000
opening = b": ok\\n\\n"
unreader = SimpleNamespace(buf=b"")
body = SimpleNamespace(reader=SimpleNamespace(unreader=unreader))
with tcp_pair() as (server, client):
    environ = {
        "REQUEST_METHOD": "GET",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "gunicorn.socket": server,
        "wsgi.input": body,
    }
    swap = Swap(environ, server_of(environ))
    server.sendall(b"HTTP/1.1 200 OK\\r\\n\\r\\n" + opening)
    taken = swap.take(opening)
    assert taken.fd == 250, taken
    assert limits() == (200, 1000)
    words = "import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    out = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True)
    assert out.stdout == "(200, 1000)\\n", out
    swap.close()
    os.close(taken.fd)
held, go_on = threading.Event(), threading.Event()
def hold():
    with soft_limit.raised(1000):
        held.set()
        go_on.wait()
thread = threading.Thread(target=hold)
thread.start()
held.wait()
assert limits() == (1000, 1000)
import warnings
warnings.simplefilter("ignore")  # of forks among threads
if not (child := os.fork()):
    with soft_limit.raised(900):
        inside = limits()
    os._exit((inside, limits()) != ((900, 1000), (200, 1000)))
assert os.waitpid(child, 0)[1] == 0
go_on.set()
thread.join()
assert limits() == (200, 1000)
"""
    )


# What was written, read back.

TOKENS = st.text("abcdefghijklmnopqrstuvwxyz-", min_size=1, max_size=12)
VALUES = st.text(st.characters(min_codepoint=33, max_codepoint=255), max_size=30)
FOREIGN = {
    *("content-length", "content-encoding", "upgrade", "trailer"),
    *("transfer-encoding", "connection", "keep-alive", "proxy-connection"),
}
HEADERS = st.lists(
    st.tuples(TOKENS.filter(lambda name: name not in FOREIGN), VALUES), max_size=6
)
OPENINGS = st.binary(min_size=1, max_size=300)


def head_of(headers, *more):
    lines = [f"{name}: {value}".encode("latin-1") for name, value in headers]
    return b"\r\n".join([b"HTTP/1.1 200 OK", *lines, *more, b"", b""])


@given(HEADERS, OPENINGS, st.booleans(), st.booleans())
def test_a_head_and_an_opening_are_read_back(headers, opening, framed, old):
    """Raw or in a chunk: the headers stay as they are, but for those of the hop."""
    codings = [b"transfer-encoding: Chunked"] if framed else []
    head = head_of(headers, b"connection: keep-alive", b"Keep-Alive: 5", *codings)
    data = b"%X\r\n%s\r\n" % (len(opening), opening) if framed else opening
    kept, is_chunked = read_back(head + data, opening, is_http_1_0=old)
    assert is_chunked == (framed and not old)
    codings = [b"Transfer-Encoding: chunked"] if is_chunked else []
    expected = head_of(headers, *codings, b"Connection: close")
    assert kept == expected + (data if is_chunked else opening)


@given(HEADERS, OPENINGS, st.booleans(), st.data())
def test_nothing_else_is_read_back(headers, opening, framed, data):
    """A byte less, a byte more, another one: it is put back."""
    codings = [b"Transfer-Encoding: chunked"] if framed else []
    whole = head_of(headers, *codings)
    whole += b"%x\r\n%s\r\n" % (len(opening), opening) if framed else opening
    cut = data.draw(st.integers(0, len(whole) - 1))
    assert read_back(whole[:cut], opening, is_http_1_0=False) is None
    more = data.draw(st.binary(min_size=1, max_size=9))
    assert read_back(whole + more, opening, is_http_1_0=False) is None
    assert read_back(more + whole, opening, is_http_1_0=False) is None
    assert read_back(whole, opening + more, is_http_1_0=False) is None
    assert read_back(2 * whole, opening, is_http_1_0=False) is None


CHUNKED = b"Transfer-Encoding: chunked\r\n"
ODD = {
    "nothing": b"",
    "no head": b"data",
    "http/0.9": b"X",
    "http/2": b"HTTP/2 200 OK\r\n\r\nX",
    "early hints": b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\n\r\nX",
    "no content": b"HTTP/1.1 204 No Content\r\n\r\nX",
    "a length": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nX",
    "an encoding": b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\n\r\nX",
    "an upgrade": b"HTTP/1.1 200 OK\r\nUpgrade: h2c\r\n\r\nX",
    "a folded line": b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\nX",
    "a bare LF": b"HTTP/1.1 200 OK\r\nA: b\nContent-Length: 1\r\n\r\nX",
    "a bare CR": b"HTTP/1.1 200 OK\r\nA: b\rContent-Length: 1\r\n\r\nX",
    "a space before the colon": b"HTTP/1.1 200 OK\r\nContent-Length : 1\r\n\r\nX",
    "no colon": b"HTTP/1.1 200 OK\r\nContent-Length\r\n\r\nX",
    "two codings": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n"
    b"1\r\nX\r\n",
    "the same coding twice": b"HTTP/1.1 200 OK\r\n" + 2 * CHUNKED + b"\r\n1\r\nX\r\n",
    "raw, though chunked": b"HTTP/1.1 200 OK\r\n" + CHUNKED + b"\r\nX",
    "chunked, though raw": b"HTTP/1.1 200 OK\r\n\r\n1\r\nX\r\n",
    "an extension": b"HTTP/1.1 200 OK\r\n" + CHUNKED + b"\r\n1;a=b\r\nX\r\n",
    "a wrong size": b"HTTP/1.1 200 OK\r\n" + CHUNKED + b"\r\n2\r\nX\r\n",
    "the end": b"HTTP/1.1 200 OK\r\n" + CHUNKED + b"\r\n1\r\nX\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("written", ODD.values(), ids=ODD)
def test_odd_heads_are_put_back(written):
    """Each of them is somebody's, and nobody's whom we know."""
    assert read_back(written, b"X", is_http_1_0=False) is None
    assert read_back(written, b"X", is_http_1_0=True) is None
