"""A stream holds no database connection while it waits; and requests end as ever.

Django's connections are counted by the driver, in the thread or greenlet of the
stream (tests/apps/db_django.py); SQLAlchemy's by its pool.
"""

import contextlib
import itertools
import json
from collections import Counter

import pytest

from syncstream.protocol import sse
from tests.support.live import LiveServer, unique_key
from tests.support.waits import await_true

KINDS = ("gunicorn-gthread", "gunicorn-gevent", "werkzeug")
OPTIONS = {"gunicorn-gthread": ["--threads", "24"]}
VIEWS = ("app/sse", "app/decorated", "wrapped/sse", "wrapped/decorated", "wrapped/hand")
EVENT_SOURCE = {"Accept": "text/event-stream", "Cache-Control": "no-cache"}
ROWS = 250


def serve(kind, app, ready):
    return LiveServer(kind, app, *OPTIONS.get(kind, ()), ready=ready)


@pytest.fixture(scope="module", params=KINDS)
def django(request):
    """Django; it has logged nothing bad in the end."""
    with serve(request.param, "tests.apps.db_django:app", "GET /app/health") as server:
        yield server
        assert "DatabaseWrapper" not in server.log()


@pytest.fixture(scope="module", params=KINDS)
def flask(request):
    with serve(request.param, "tests.apps.db_flask:app", "GET /app/health") as server:
        yield server


@pytest.fixture
def key():
    return unique_key()


def values(body):
    return [json.loads(event.data) for event in sse.Decoder().feed(body)]


def value(client):
    """Return the value of a stream's next event; the opening is left out."""
    while not (found := values(block := client.block())):
        assert block, "the stream has ended"
    return found[0]


def get_json(server, path):
    with server.get(path) as client:
        return json.loads(client.rest())


def held(server, key):
    return get_json(server, f"/app/held?held={key}")["held"]


def poke(server, key):
    with server.get(f"/app/poke?poke={key}") as client:
        assert client.rest() == b"poked"


def read(server, path):
    """Return the values of a stream that ends."""
    before = server.tracebacks()
    with server.get(path) as client:
        body = client.rest()
    assert client.status == 200
    assert client.is_whole
    assert server.tracebacks() == before, server.log()
    return values(body)


@pytest.mark.parametrize("wait", ["sleep", "queue", "event"])
@pytest.mark.parametrize("view", VIEWS)
def test_a_waiting_django_stream_holds_no_connection(django, key, view, wait):
    """Not the one that its view has opened, nor those that its queries open."""
    with django.get(f"/{view}/{wait}?key={key}") as client:
        assert client.block() == b": ok\n\n"
        assert django.control.next(f"{key}-view") == 1
        await_true(lambda: held(django, key) == 0)
        for _ in range(3):
            poke(django, key)
            assert value(client) == 10
            await_true(lambda: held(django, key) == 0)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("atomic", [1, 0, 1, 0]),
        ("autocommit", [1, 0, 1, 0]),
        ("iterator", [[ROWS, 1], 0]),
        ("left-iterator", [1, 0]),
        ("cursor", [[1, [1], [2]], 0, ROWS, 0]),
        ("from-view", [1, 2, 3]),
        ("execute-wrapper", [[1, 1]]),
    ],
)
def test_what_is_in_use_is_left_alone(django, key, view, source, expected):
    """A transaction and an open cursor go on after a wait; then it is given back."""
    assert read(django, f"/{view}/{source}?key={key}") == expected


@pytest.mark.parametrize("view", VIEWS)
def test_each_greenlet_has_its_own_connection(django, key, view):
    """Ten streams at once, each on a connection that its own greenlet opened."""
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(django.get(f"/{view}/own?key={key}{n}"))
            for n in range(10)
        ]
        for _ in range(5):
            assert [value(client) for client in clients] == [[True, 1]] * 10
        assert [values(client.rest()) for client in clients] == [[]] * 10
        assert all(client.is_whole for client in clients)


# How requests end: with a server, the view's path and the request's key.


def finished(server, view, key):
    with server.get(f"{view}/three?key={key}") as client:
        client.rest()


def left(server, view, key):
    # Without a reset: Werkzeug reads from the socket before it closes a response, and
    # a reset that it meets there keeps it from that (3.1, serving.py, execute()).
    with server.get(f"{view}/gated?key={key}") as client:
        server.control.open(key)
        assert value(client) == 0
    server.control.open(key, 5)


def errored(server, view, key):
    with server.get(f"{view}/raise-RuntimeError?key={key}") as client, cut():
        client.rest()


def head(server, view, key):
    with server.connect() as client:
        client.request("HEAD", f"{view}/three?key={key}", version="1.0")
        client.rest()  # Werkzeug sends the body of Django's own response
        assert client.status == 200


def come_back(server, view, key):
    headers = {**EVENT_SOURCE, "Last-Event-ID": "syncstream-end"}
    path = f"{view}/three?key={key}"
    with server.get(path, headers=headers, version="1.0") as client:
        client.rest()
    # By hand nothing is known of ids.
    assert client.status == (200 if "hand" in view else 204)


def refused(server, view, key):
    view = view.replace("/wrapped/", "/limited/")
    first = unique_key()
    with server.get(f"{view}/gated?key={first}") as client:
        server.control.open(first)
        assert value(client) == 0
        with server.get(f"{view}/three?key={key}") as second:
            second.rest()
            assert second.status == 503
    server.control.open(first, 5)
    server.control.next(f"{first}-closed")


def cut():
    return contextlib.suppress(ConnectionError)


ENDS = (finished, left, errored, head, come_back, refused)


def ends(*views):
    """Make the table: every end of every view, with and without the middleware."""
    return [
        pytest.param(end, f"/{app}/{view}", id=f"{app}-{view}-{end.__name__}")
        for app, view, end in itertools.product(("app", "wrapped"), views, ENDS)
        if end is not refused or app == "wrapped"
    ]


def calls(server, end, view, key):
    """Count what a request calls, by its kind, until its response is closed."""
    end(server, view, key)
    server.control.next(f"{key}-closed")
    return Counter(server.control.pending(f"{key}-calls"))


@pytest.mark.parametrize(("end", "view"), ends("sse", "decorated", "hand"))
def test_django_requests_end_once(django, key, end, view):
    """Each request starts and finishes once, in one thread or greenlet.

    So it is at /app/hand, which is Django without us.
    """
    found = calls(django, end, view, key)
    assert found == {"started": 1, "finished": 1}


@pytest.mark.parametrize(("end", "view"), ends("sse", "hand"))
def test_flask_teardowns_run_once(flask, key, end, view):
    """So they do at /app/hand, which is Flask without us."""
    assert calls(flask, end, view, key) == {"request": 1, "context": 1}


@pytest.mark.parametrize(("end", "view"), ends("context", "decorated", "hand-context"))
def test_flask_teardowns_run_as_without_us(flask, key, end, view):
    """Streams with a context, too: once or twice, as this version of Flask has it.

    Flask 3.1 tears down when the view has returned, and again after the generator.
    A source that never starts is torn down as that of a HEAD.
    """
    found = calls(flask, end, view, key)
    starts_not = end in (head, refused) or (end is come_back and "hand" not in view)
    plain = head if starts_not else end
    assert found == calls(flask, plain, "/app/hand-context", unique_key())


@pytest.mark.parametrize("app", ["app", "wrapped"])
@pytest.mark.parametrize("view", ["own", "removed", "before"])
def test_streams_share_sqlalchemys_pool(flask, app, view):
    """Ten streams that query all the time do with two connections.

    Each by a session that ends before the wait; or in the view, without a context.
    """
    path = f"/{app}/{view}"
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(flask.get(path)) for _ in range(10)]
        for _ in range(5):
            assert [value(client) for client in clients] == [1] * 10
        await_true(lambda: get_json(flask, f"/{app}/pool") == {"checked_out": 0})


def test_a_scoped_session_holds_a_connection(flask):
    """Flask-SQLAlchemy's, which its context keeps: the third stream of two fails."""
    with flask.get("/hasty/scoped") as first, flask.get("/hasty/scoped") as second:
        assert [value(first), value(second)] == [1, 1]
        assert get_json(flask, "/hasty/pool") == {"checked_out": 2}
        with flask.get("/hasty/scoped") as third, cut():
            assert b"data" not in third.rest()
        flask.await_log("QueuePool limit of size 2")
    # When they have left, their teardowns give both back.
    await_true(lambda: get_json(flask, "/hasty/pool") == {"checked_out": 0})
