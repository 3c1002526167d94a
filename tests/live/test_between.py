"""Keepalives beside middlewares that have a write of their own, or hold bytes back."""

import re

import pytest

from tests.support.live import TABLE, LiveServer, unique_key

WARNING = "streams send no keepalive while their generators wait"
KINDS = [kind for kind in TABLE if kind != "uwsgi"]  # its write is not known


@pytest.fixture
def key():
    return unique_key()


@pytest.mark.parametrize("kind", KINDS)
def test_a_write_of_a_middlewares_own(kind, key):
    """The server's is found; where it cannot be trusted the log says so."""
    with (
        LiveServer(kind, "tests.apps.between_app:own_write") as server,
        server.get(f"/gated?key={key}") as client,
    ):
        assert client.block() == b": ok\n\n"
        assert client.block() == b"data: 0\n\n"
        if kind == "werkzeug":  # it shows nothing of what it has been given
            server.await_log(WARNING)
        else:
            assert [client.block() for _ in range(3)] == [b": keepalive\n\n"] * 3
            assert WARNING not in server.log()
        server.control.open(key, 3)
        body = re.sub(rb": keepalive\n\n", b"", client.rest())
        assert body == b"data: 1\n\ndata: 2\n\n"
        assert server.tracebacks() == 0, server.log()


@pytest.mark.parametrize("kind", KINDS)
def test_no_keepalive_in_the_middle_of_an_event(kind, key):
    """What the middleware holds back is the rest of an event."""
    with (
        LiveServer(kind, "tests.apps.between_app:in_blocks") as server,
        server.get(f"/busy?key={key}") as client,
    ):
        body = client.rest()
    whole = b": ok\n\ndata: 0\n\ndata: 1\n\ndata: 2\n\n"
    assert body.replace(b": keepalive\n\n", b"") == whole
    assert not re.search(rb"(?<!\n\n): keepalive", body)
