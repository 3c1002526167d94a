"""Hand-over of one connection, without a server."""

import gc
import os
import socket
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace

import pytest

from syncstream.runtime.sockets import is_hung_up
from syncstream.runtime.watch import watch
from syncstream.servers import server_of
from syncstream.servers.swap import Refused, Swap
from tests.apps.swap_app import OPENING
from tests.servers.environs import environ_of
from tests.support.descriptors import open_files
from tests.support.pairs import check_script, leave, tcp_pair
from tests.support.waits import TIMEOUT, await_true


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
    (
        {"REQUEST_METHOD": "POST", "CONTENT_LENGTH": "65537"},
        "65537 bytes of the request's body are unread",
    ),
    (
        {"REQUEST_METHOD": "QUERY", "HTTP_TRANSFER_ENCODING": "chunked"},
        "an unknown number of bytes of the request's body",
    ),
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
