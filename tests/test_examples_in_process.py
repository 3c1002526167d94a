"""How to test streams: the examples' own tests, by `syncstream.testing`.

`test_examples` serves each example on real servers; these need none. Those in which
time passes are in ``testing/clock_cases.py``.
"""

import time

import pytest

from examples import (
    chat,
    disconnect,
    ndjson_rows,
    notifications,
    number_stream,
    reconnection,
)
from syncstream import Hub
from syncstream.testing import EVENT_SOURCE, Client, events, lines
from tests.support.pairs import check_script


@pytest.fixture
def hub(monkeypatch):
    """A hub of the test's own."""
    hub = Hub("memory:")
    monkeypatch.setattr(chat, "hub", hub)
    monkeypatch.setattr(notifications, "hub", hub)
    yield hub
    hub.close()


def test_some_events_of_an_endless_stream():
    """`events` reads as many as it is told, and closes the response."""
    response = disconnect.app.test_client().get("/events")
    (event,) = events(response, 1)
    assert event.json()["timestamp"] == pytest.approx(time.time(), abs=60)
    assert not disconnect.clients


def test_a_stream_of_text(monkeypatch):
    """`lines` reads text; without a number, all of it."""
    monkeypatch.setattr(number_stream, "INTERVAL", 0)
    response = number_stream.app.test_client().get("/numbers")
    assert response.mimetype == "text/plain"
    assert lines(response) == [f"Number: {n}" for n in range(5)]


def test_a_line_that_cannot_be_read(monkeypatch):
    """The last line says why."""
    monkeypatch.setattr(ndjson_rows, "INTERVAL", 0)
    *rows, last = lines(ndjson_rows.app.test_client().get("/rows"))
    assert rows[0] == '{"time":"9:00","celsius":21.5}'
    assert last.startswith('{"error":')


DJANGO = """
from examples import django_app
import django.test
from syncstream.testing import events

response = django.test.Client().get("/countdown/3")
assert response["X-Start"] == "3"
assert events(response, 1)[0].data == "3"
"""


def test_a_django_view():
    """Django's own client works, too; a process has one Django's settings."""
    check_script(DJANGO)


def test_a_client_that_leaves():
    """The generator's ``finally`` has run when `disconnect` returns."""
    with Client(disconnect.app).stream("GET", "/events") as stream:
        stream.events(1)
        assert len(disconnect.clients) == 1
        stream.disconnect()
        assert not disconnect.clients
        assert stream.reason == "disconnected"


def test_reconnecting():
    """The next connection goes on after the last event that was read."""
    client = Client(reconnection.app)
    with client.stream("GET", "/events", headers=EVENT_SOURCE) as stream:
        assert stream.events(1)[0].data == "Number 1"
        assert stream.retry == 1000
    last = stream.last_event_id
    with client.stream("GET", "/events", last_event_id=last) as stream:
        assert stream.events(1)[0].data == "Number 2"


def test_a_chat_room(hub):
    """What one client says, all others read; who comes later gets it, too."""
    client = Client(chat.app)
    with (
        client.stream("GET", "/events") as ann,
        client.stream("GET", "/events") as bob,
    ):
        client.stream("POST", "/say", data="Hello").close()
        assert ann.events(1) == bob.events(1)
        assert ann.last_event_id == hub.head("room")
    with client.stream("GET", "/events") as late:
        assert late.events(1)[0].data == "Hello"


def test_who_is_there(hub):
    """A user is present for as long as a page is open."""
    client = Client(notifications.app)
    with client.stream("GET", "/events/ann") as stream:
        with client.stream("POST", "/notify/ann", data="Tea") as answer:
            assert b'"pages":1' in answer.bytes()
        assert stream.events(1)[0].json() == {"text": "Tea"}
    with client.stream("POST", "/notify/ann", data="Tea") as answer:
        assert b'"pages":0' in answer.bytes()
