"""Django: under ASGI a clear error, without a request a plain response."""

import asyncio

import pytest
from django.core.handlers.asgi import ASGIHandler
from django.core.signals import request_finished, request_started
from django.test import Client, RequestFactory

from apps import django_app
from syncstream.django import SSEResponse, sse
from syncstream.process import process


@pytest.fixture(scope="module", autouse=True)
def _django():
    """The application under test has configured Django."""
    assert callable(django_app.app)


@pytest.fixture
def client():
    return Client()


@pytest.fixture(autouse=True)
def _control(monkeypatch):
    """There is no test on the control line here."""
    monkeypatch.setattr("apps.sources.note", lambda key, value: None)


def test_the_test_client_reads_a_stream(client):
    """Django's own test client gets the body, cookies and headers."""
    response = client.get("/decorated/three?key=k")
    assert b"".join(response.streaming_content) == (
        b": ok\n\ndata: 0\n\ndata: 1\n\ndata: 2\n\n"
    )
    assert response["Content-Type"] == "text/event-stream; charset=utf-8"
    assert response["X-After"] == "after"
    response.close()


def test_without_a_request(caplog):
    """A response for a RequestFactory's request streams, too, and says what it lacks.

    No request is invented for it.
    """
    process()._warned.clear()
    view = sse(lambda request: (n for n in range(2)))
    response = view(RequestFactory().get("/"))
    assert isinstance(response, SSEResponse)
    assert response.streaming
    assert b"".join(response).endswith(b"data: 1\n\n")
    assert not response._response._stream.has_connection
    assert b"".join(SSEResponse(["a"])) == b": ok\n\ndata: a\n\n"
    assert caplog.text.count("its request was not found") == 1


def test_asgi_is_a_clear_error(caplog):
    """Under ASGI the view fails, in words that say what to do."""
    sent = []

    async def request():
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/decorated/three",
            "query_string": b"key=k",
            "headers": [(b"host", b"localhost")],
        }
        asked = False

        async def receive():
            nonlocal asked
            if asked:
                await asyncio.sleep(10)
            asked = True
            return {"type": "http.request", "body": b""}

        async def send(message):
            sent.append(message)

        await ASGIHandler()(scope, receive, send)

    asyncio.run(request())
    assert sent[0]["status"] == 500
    assert "syncstream streams synchronous generators under WSGI" in caplog.text


def test_asynchronous_iteration_is_a_clear_error():
    """The last resort: whoever iterates it asynchronously is told why not."""
    response = SSEResponse([])
    with pytest.raises(RuntimeError, match="under WSGI"):
        aiter(response)
    response.close()


def test_what_a_middleware_changes_is_heeded():
    """A status without a body stops the source; hop-by-hop headers stay inside."""
    source = iter(["a"])
    response = SSEResponse(source, headers=[("Link", "<a>"), ("Link", "<b>")])
    response["Connection"] = "keep-alive"
    response.status_code = 204
    assert b"".join(response) == b""
    assert list(source) == ["a"]
    headers = dict(response.items())
    assert headers["Link"] == "<a>, <b>"
    assert "Connection" not in headers


def test_a_view_may_use_the_test_client(client):
    """The request within does not take the outer one's place."""
    environ = {"REQUEST_METHOD": "HEAD"}
    request_started.send(sender=None, environ=environ)
    assert client.get("/health").content == b"ok"
    response = SSEResponse(["a"])
    assert b"".join(response) == b""
    request_finished.send(sender=None)
