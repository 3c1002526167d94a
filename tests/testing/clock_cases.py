"""`advance`: time passes for streams without waiting."""

import queue
import subprocess
import sys
import threading
import time

import flask
import pytest

import syncstream
from examples import error_recovery, keepalive
from syncstream.testing import Client, advance
from tests import ROOT

hub = syncstream.Hub("memory:")
gate = threading.Event()
items = queue.Queue()
app = flask.Flask(__name__)


def polls():
    for n in range(3):
        yield n
        syncstream.sleep(3600)


def waits_for_an_event():
    yield "first"
    yield syncstream.current_stream().wait(gate, 60)


def waits_for_an_item():
    yield "first"
    try:
        syncstream.current_stream().wait(items, 60)
    except queue.Empty:
        yield "empty"


def reads():
    subscription = syncstream.current_stream().link(hub.subscribe("news"))
    yield "first"
    yield len(subscription.read(60))


SOURCES = {
    source.__name__: source
    for source in (polls, waits_for_an_event, waits_for_an_item, reads)
}


@app.get("/<name>")
def stream(name):
    return syncstream.SSEResponse(SOURCES[name](), keepalive=None)


@app.get("/quiet")
def quiet():
    return syncstream.SSEResponse(SOURCES["polls"](), keepalive=15, max_duration=600)


@pytest.fixture
def client():
    return Client(app)


@pytest.fixture(autouse=True)
def _quick():
    began = time.monotonic()
    yield
    assert time.monotonic() - began < 30


def data(found):
    return [event.data for event in found]


def test_a_source_that_sleeps(client):
    """An hour passes at once, and no more than that."""
    with client.stream("GET", "/polls") as stream:
        assert data(stream.events(1)) == ["0"]
        for n in "12":
            advance(3590)
            time.sleep(0.02)
            # Nothing has come yet.
            assert stream._exchange.sent == 6 + 9 * int(n)
            advance(10)
            assert data(stream.events(1)) == [n]


@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("waits_for_an_event", "false"),
        ("waits_for_an_item", "empty"),
        ("reads", "0"),
    ],
)
def test_waits_that_time_out(client, name, outcome):
    """They end as after their time: too early they go on."""
    with client.stream("GET", f"/{name}") as stream:
        stream.events(1)
        advance(50)
        time.sleep(0.02)
        assert stream.reason is None
        advance(10)
        assert data(stream.events()) == [outcome]


def test_keepalives(client):
    """One comes with each interval that passes."""
    with client.stream("GET", "/quiet") as stream:
        assert stream.lines(4) == [": ok", "", "data: 0", ""]
        for _ in range(3):
            advance(15)
            assert stream.lines(2) == [": keepalive", ""]


def test_a_maximum_duration(client):
    """The stream's time ends."""
    with client.stream("GET", "/quiet") as stream:
        stream.events(1)
        advance(600)
        assert stream.events() == []
        assert stream.reason == "max_duration"


def test_under_gevent():
    """It is refused: gevent times the waits of greenlets."""
    script = """
import gevent.monkey; gevent.monkey.patch_all()
from syncstream.testing import advance
advance(1)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, timeout=60, cwd=ROOT
    )
    assert b"advance() works with threads only" in done.stderr


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), None])
def test_wrong_arguments(seconds):
    """They are named."""
    with pytest.raises(ValueError, match=f"got {seconds!r}"):
        advance(seconds)


# The examples' own tests.


def test_silence():
    """A comment comes after 15 s without a message, for which the test does not wait.

    `lines` shows comments, which are no events.
    """
    client = Client(keepalive.app)
    with client.stream("GET", "/events") as stream:
        assert stream.lines(2) == [": ok", ""]
        advance(15)
        assert stream.lines(2) == [": keepalive", ""]
        client.stream("POST", "/say/hello").close()
        (event,) = stream.events(1)
        assert (event.event, event.json()) == ("update", {"text": "hello"})


def test_a_source_that_recovers(monkeypatch):
    """It retries after 2 s and after 4 s more, and then gives up."""
    monkeypatch.setitem(error_recovery.source, "state", "down")
    with Client(error_recovery.app).stream("GET", "/events") as stream:
        advance(2)
        advance(4)
        (event,) = stream.events()
        assert event.event == "error"
        assert stream.reason == "finished"
