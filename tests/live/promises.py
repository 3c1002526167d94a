"""What a stream promises, asked of a server that runs."""

import time

from tests.support.waits import TIMEOUT

LEFT = (["GeneratorExit", True], ["ClientDisconnected", True])


def assert_gated(server, path, key, version="1.1", opened=0, left=LEFT):
    """Step a gated generator: each event arrives before the next is made."""
    server.control.open(key, opened)
    with server.get(f"{path}?key={key}", version=version) as client:
        client.read_head()
        assert client.status == 200
        assert client.block() == b": ok\n\n"
        server.control.next(f"{key}-started")
        for n in range(3):
            assert server.control.pending(f"{key}-ended") == []
            if n >= opened:
                server.control.open(key)
            assert client.block() == f"data: {n}\n\n".encode()
    assert end_of(server, key) in left
    return client


def end_of(server, key):
    """Return how a gated source has ended, whose client has left.

    Its gate is opened until it has: servers take their time to notice.
    """
    deadline = time.monotonic() + TIMEOUT
    while not (ended := server.control.pending(f"{key}-ended")):
        assert time.monotonic() < deadline, "the source has not ended"
        server.control.open(key)
        time.sleep(0.005)
    return ended[0]


def assert_cut(server, path, key, version, record=lambda name, value: None):
    """Read a stream that breaks; return its body."""
    with server.get(f"{path}?key={key}", version=version) as client:
        client.read_head()
        try:
            body = b""
            while chunk := client.chunk():
                body += chunk
            reset = False
        except ConnectionResetError:
            reset = True
        assert not client.is_whole
        chunked = "transfer-encoding" in client.headers
        # Without chunks only a reset tells a cut from an end.
        assert chunked or reset
        record("cell", "by a reset" if reset else "yes")
        return body
