"""A connection is found though the framework has replaced what it is found by."""

import pytest

from tests.live.promises import LEFT
from tests.support.live import LiveServer, unique_key
from tests.support.waits import await_true

KINDS = ("gunicorn-gthread", "gunicorn-gevent", "pywsgi", "cheroot", "runserver")
BOTH = [(kind, app) for kind in KINDS for app in ("app", "wrapped")]


@pytest.fixture(scope="module", params=BOTH, ids="-".join)
def server(request):
    """Bottle, whose ``request.params`` replaces ``wsgi.input``."""
    kind, app = request.param
    with LiveServer(kind, f"tests.apps.bottle_app:{app}") as server:
        server.is_wrapped = app == "wrapped"
        yield server


@pytest.fixture
def key():
    return unique_key()


def parked(server):
    with server.get("/parked", headers={"Connection": "close"}) as client:
        return int(client.rest())


def test_a_client_that_leaves_is_missed(server, key):
    """The wait of its generator ends at once; under the middleware any generator's."""
    for view in ("params", "byhand") if server.is_wrapped else ("params",):
        with server.get(f"/{view}/waiting?key={key}") as client:
            assert client.block() == b": ok\n\n"
            assert client.block() == b"data: 0\n\n"
        assert server.control.next(f"{key}-ended") in LEFT


def test_a_request_behind_a_subscriber_is_not_run(server, key):
    """It came with the first one, whose connection has left its server since."""
    with server.connect() as client:
        lines = "HTTP/1.1\r\nHost: h\r\n\r\n"
        client.send(f"GET /subscribe?key=k {lines}GET /note?key={key} {lines}")
        assert client.block() == b": ok\n\n"
        await_true(lambda: parked(server) == 1)
        # A round trip of the server's: what it had read it has dropped by now.
        with server.get(f"/note?key={key}-2") as second:
            second.rest()
        assert server.control.next(f"{key}-2") == "run"
        assert server.control.pending(key) == []
    await_true(lambda: parked(server) == 0)
