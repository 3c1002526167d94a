"""Django REST framework: our responses in its views, and its answers before them."""

import json
import re

import pytest
from django.test import RequestFactory
from werkzeug.middleware.lint import LintMiddleware
from werkzeug.test import Client

from syncstream import sse as in_flask
from tests import ROOT
from tests.apps import rest_app
from tests.support.live import EVENT_SOURCE, LiveServer, unique_key

EVENTS = {"Accept": "text/event-stream"}  # and nothing else: as a browser's
LINES = {"Accept": "application/x-ndjson"}
VIEWS = ("class", "function", "action", "decorated-action")


@pytest.fixture(autouse=True)
def _fresh():
    rest_app.started.clear()
    rest_app.Twice.seen.clear()


def get(path, headers=EVENTS, **options):
    return Client(LintMiddleware(rest_app.app)).open(path, headers=headers, **options)


@pytest.mark.parametrize("name", VIEWS)
def test_an_event_source_gets_its_stream(name):
    """Of all kinds of view."""
    with get(f"/{name}?word=a") as answer:
        assert answer.status_code == 200
        assert answer.content_type == "text/event-stream; charset=utf-8"
        assert answer.headers["Vary"] == "Accept"
        assert answer.data == b': ok\ndata: {"word":"a"}\n\n'


@pytest.mark.parametrize("headers", [EVENTS, LINES, {"Accept": "*/*"}, {}])
@pytest.mark.parametrize(
    ("path", "status"),
    [
        *((f"/{name}", 403) for name in VIEWS),
        *((f"/{name}?word=throttled", 429) for name in VIEWS),
        ("/class?word=forbidden", 403),  # raised by the view itself
    ],
)
def test_checks_come_before_the_stream(path, status, headers):
    """Their answer is JSON, and says so; the source has not run."""
    rest_app.Twice.seen["throttled"] = 2
    with get(path, headers) as answer:
        assert answer.status_code == status
        assert answer.content_type == "application/json"
        assert set(json.loads(answer.data)) == {"detail"}
        assert answer.headers.get("Retry-After", "7") == "7"
        assert ("Retry-After" in answer.headers) is (status == 429)
    assert rest_app.started == []


def test_an_ordinary_answer():
    """It is JSON, whatever the client accepts; its media type is its own if it has."""
    for headers in (EVENTS, LINES, {}):
        with get("/set?word=a", headers) as answer:
            assert answer.content_type == "application/json"
            assert answer.json == [{"word": "a"}]
            rest_app.Twice.seen.clear()
    with get("/typed", EVENTS) as answer:
        assert answer.content_type == "application/problem+json"


@pytest.mark.parametrize(
    ("path", "headers"),
    [("/class?word=a", LINES), ("/class?word=a&format=ndjson", {})],
)
def test_lines(path, headers):
    """NDJSON is asked for by its media type, or by its format."""
    with get(path, headers) as answer:
        assert answer.content_type == "application/x-ndjson"
        assert answer.data == b'{"word":"a"}\n'


def test_a_post():
    """The request's data are read in the view."""
    with get("/class?word=a", LINES, method="POST", json={"said": "b"}) as answer:
        assert answer.data == b'{"word":"b"}\n'


def test_without_a_renderer():
    """That is the 406 that the renderers are for."""
    with get("/without") as answer:
        assert answer.status_code == 406


@pytest.mark.parametrize("name", ["events-first", "page-first"])
def test_the_browsable_api(name):
    """A page that shows what a renderer of ours has rendered is HTML all the same."""
    page, events = "text/html; charset=utf-8", "application/json"
    with rest_app.templates():
        for path in (name, f"{name}?format=api"):
            with get(f"/{path}", {"Accept": "text/html"}) as answer:
                assert (answer.status_code, answer.content_type) == (200, page)
                assert "hello" in answer.text
        with get(f"/{name}?forbidden", {"Accept": "text/html"}) as answer:
            assert (answer.status_code, answer.content_type) == (403, page)
            assert "You do not have permission" in answer.text
        with get(f"/{name}", {"Accept": "image/png"}) as answer:
            is_page = not name.startswith("events")  # the first renderer answers
            assert answer.status_code == 406
            assert answer.content_type == (page if is_page else events)
        with get(f"/{name}", EVENTS) as answer:
            assert (answer.content_type, answer.json) == (events, {"word": "hello"})


def test_what_no_renderer_has():
    """It is refused still."""
    with get("/class?word=a", {"Accept": "image/png"}) as answer:
        assert answer.status_code == 406


def test_what_the_page_says():
    """Its code is a view that an EventSource gets events of."""
    page = (ROOT / "docs" / "frameworks.md").read_text()
    code = re.search(r"```python\n(from rest_framework.*?)```", page, re.DOTALL)[1]
    names = {"__name__": __name__, "rows": lambda: iter(["hello"])}
    exec(code, names)
    response = names["Events"].as_view()(RequestFactory().get("/", headers=EVENTS))
    assert response.status_code == 200
    assert b"data: hello\n\n" in response.getvalue()
    text = re.search(r'"(syncstream\.rest_framework\.\w+)"', page)[1]
    module, _, name = text.rpartition(".")
    assert getattr(__import__(module, fromlist=[name]), name).format == "sse"


def test_a_decorator_that_is_not_djangos():
    """REST framework's request is none of Django's by its type."""
    view = rest_app.api_view(["GET"])(in_flask(lambda request: iter("a")))
    with pytest.raises(TypeError, match=r"from syncstream\.django import sse"):
        view(RequestFactory().get("/"))


def test_on_a_server():
    """The stream and its end, and the answers before it, on the wire."""
    key = unique_key()
    with LiveServer("gunicorn-gthread", "tests.apps.rest_app:app") as server:
        with server.get(f"/waiting?key={key}", headers=EVENT_SOURCE) as client:
            assert (
                client.block() + client.block() == b': ok\ndata: {"word":"first"}\n\n'
            )
        assert server.control.next(f"{key}-left") == key
        for path, status in {"/class": 403, "/class?word=forbidden": 403}.items():
            with server.get(path, headers=EVENT_SOURCE) as client:
                assert set(json.loads(client.rest())) == {"detail"}
                assert client.status == status
                assert client.headers["content-type"] == "application/json"
        assert server.tracebacks() == 0, server.log()
