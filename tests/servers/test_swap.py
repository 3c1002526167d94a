"""Hand-over: a connection leaves its server byte by byte right, or stays with it."""

import json
import socket
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from tests.apps.swap_app import JUNK, OPENING
from tests.support.live import SERVERS, LiveServer, unique_key
from tests.support.pairs import check_script, leave
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


@pytest.mark.parametrize("view", ["", "read/"])
@pytest.mark.parametrize("expects", [False, True], ids=["sent", "expected"])
def test_a_posted_body_and_what_is_behind_it(server, before, expects, view, tag):
    """The stream leaves; a body that comes late, and requests, are not answered."""
    headers = {"Content_Length": 3, **({"Expect": "100-continue"} if expects else {})}
    is_late = expects and not view and server.kind != "waitress"
    with server.connect() as client:
        rest = "abc" + 2 * request(f"/plain?tag={tag}")
        head = request(f"/{view}events?tag={tag}", method="POST", **headers)
        client.send(head + (rest if not is_late else ""))
        answer = b""
        if is_late:
            while OPENING not in answer:  # it has not left
                data = client.socket.recv(65536)
                assert data
                answer += data
            client.send(rest)
        answer = (answer + everything(client)).replace(CONTINUE, b"")
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
    """HEAD has no body to go on with, and nobody knows what else is meant."""
    with server.connect() as client:
        client.send(request("/events", method="HEAD", Connection="close"))
        everything(client)
    with server.connect() as client:
        client.send(request(f"/events?tag={tag}", method="PUT"))
        assert client.rest() == b"".join([OPENING, *events(tag, "attached")])
    now = state(server)
    for method in ("HEAD", "PUT"):
        refusal = f"the method is {method}, not GET, POST or QUERY"
        assert now[refusal] == before.get(refusal, 0) + 1


@pytest.mark.parametrize("method", ["POST", "QUERY"])
@pytest.mark.parametrize("sent", ["abc", "", "a" * 65536])
def test_a_body_that_is_not_read(server, tag, method, sent):
    """It leaves, and its end is none of a reset; also if the rest never comes."""
    length = 1000 if not sent else len(sent)
    path = f"/events?tag={tag}"
    with server.connect() as client:
        client.send(request(path, method=method, Content_Length=length))
        client.send(sent)
        if server.kind == "waitress" and not sent:  # it waits for all of it
            return
        assert client.rest() == b"".join([OPENING, *events(tag, "handed")])


def test_a_body_that_is_too_long_stays(server, before, tag):
    """More than that might stop the client that is sending it."""
    length = 65537
    with server.connect() as client:
        path = f"/events?tag={tag}"
        client.send(request(path, method="POST", Content_Length=length))
        client.send("a" * length)
        how = "handed" if server.kind == "waitress" else "attached"
        if server.kind == "uwsgi":  # its close, with bytes unread, is a reset
            with suppress(ConnectionResetError):
                client.rest()
        else:
            assert client.rest() == b"".join([OPENING, *events(tag, how)])
    if how == "attached":
        refusal = f"{length} bytes of the request's body are unread"
        assert state(server)[refusal] == before.get(refusal, 0) + 1


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
