"""Each recipe for a client of Python's, with that client, on a real server.

To the end of a stream, through a cancel, and through an error in the middle.
"""

import contextlib
import json
import time

import anthropic
import openai
import pytest
from datastar_py import ServerSentEventGenerator
from datastar_py.django import DatastarResponse

import examples.recipes.datastar as datastar
from tests.support.live import LiveServer, unique_key


@pytest.fixture(scope="module", params=["gunicorn-gevent", "gunicorn-gthread"])
def server(request):
    with LiveServer(request.param, "tests.apps.recipes_app:app") as server:
        yield server


@pytest.fixture
def key():
    return unique_key()


def asking(text):
    return [{"role": "user", "content": text}]


def assert_closed(server, key, since):
    """The source has been closed, once, as soon as its client had left."""
    assert server.control.next(key) == "closed"
    assert time.monotonic() - since < 5  # mostly 1 ms
    assert server.control.pending(key) == []


@contextlib.contextmanager
def completions(server, text):
    """Ask for a completion by OpenAI's client; yield its stream."""
    with (
        openai.OpenAI(
            api_key="-",
            base_url=f"{server.url}/completions/v1",
            max_retries=0,
            http_client=openai.DefaultHttpxClient(trust_env=False),
        ) as client,
        client.chat.completions.create(
            model="m", messages=asking(text), stream=True
        ) as stream,
    ):
        yield stream


def test_completions_end(server, key):
    """Each piece is a chunk; the last one says why it ended."""
    with completions(server, f"{key} a b c") as stream:
        choices = [chunk.choices[0] for chunk in stream]
    texts = [choice.delta.content for choice in choices]
    assert texts == ["", "a", "b", "c", None]
    assert [choice.finish_reason for choice in choices] == [None] * 4 + ["stop"]
    assert server.control.next(key) == "closed"


def test_completions_cancel(server, key):
    """The client closes its stream, and the model stops."""
    with completions(server, f"{key} a WAIT b") as stream:
        assert [next(stream).choices[0].delta.content for _ in range(2)] == ["", "a"]
        assert server.control.next(key) == "waits"
    assert_closed(server, key, time.monotonic())


def test_completions_fail(server, key):
    """The client raises the error that the stream ends with, after the chunks."""
    texts = []
    with (
        completions(server, f"{key} a FAIL b") as stream,
        pytest.raises(openai.APIError, match="The model has failed") as caught,
    ):
        texts += (chunk.choices[0].delta.content for chunk in stream)
    assert type(caught.value) is openai.APIError
    assert caught.value.type == "server_error"
    assert texts == ["", "a"]
    server.await_log("RuntimeError: MARK")


@contextlib.contextmanager
def messages(server):
    with anthropic.Anthropic(
        api_key="-",
        base_url=f"{server.url}/messages",
        max_retries=0,
        http_client=anthropic.DefaultHttpxClient(trust_env=False),
    ) as client:
        yield client.messages


def test_messages_end(server, key):
    """The client's events, and the message that it puts together."""
    question = {"model": "m", "max_tokens": 9, "messages": asking(f"{key} a b c")}
    with messages(server) as client, client.stream(**question) as stream:
        assert list(stream.text_stream) == ["a", "b", "c"]
        message = stream.get_final_message()
        assert [block.text for block in message.content] == ["abc"]
        assert message.stop_reason == "end_turn"
        assert message.usage.output_tokens == 3
    with messages(server) as client:
        types = [event.type for event in client.create(**question, stream=True)]
    assert types == [
        *("message_start", "content_block_start"),
        *["content_block_delta"] * 3,
        *("content_block_stop", "message_delta", "message_stop"),
    ]


def test_messages_cancel(server, key):
    """The client closes its stream, and the model stops."""
    question = {"model": "m", "max_tokens": 9, "messages": asking(f"{key} a WAIT")}
    with messages(server) as client, client.stream(**question) as stream:
        assert next(iter(stream.text_stream)) == "a"
        assert server.control.next(key) == "waits"
    assert_closed(server, key, time.monotonic())


def test_messages_fail(server, key):
    """The client raises the error that the stream ends with, after the text."""
    question = {"model": "m", "max_tokens": 9, "messages": asking(f"{key} a FAIL")}
    texts = []
    with (
        messages(server) as client,
        client.stream(**question) as stream,
        pytest.raises(anthropic.APIStatusError, match="The model has failed") as caught,
    ):
        texts += stream.text_stream
    assert caught.value.body["error"]["type"] == "api_error"
    assert texts == ["a"]


def run(server, task):
    """Post a page's signals with the headers of Datastar's script."""
    client, body = server.connect(), json.dumps({"task": task, "running": False})
    accept = "text/event-stream, text/html, application/json"
    headers = {"Accept": accept, "Datastar-Request": "true"}
    headers |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    client.request("POST", "/datastar/run", headers=headers)
    client.send(body)
    return client


OPENING = b": ok\n"


def test_datastar_end(server, key, monkeypatch):
    """The bytes are those of datastar-py's own response, after our comment."""
    with run(server, f"{key} a <b> é") as client:
        body = client.rest()
    assert client.is_whole
    assert client.headers["content-type"].startswith("text/event-stream")
    monkeypatch.setattr(datastar, "INTERVAL", 0)
    utf8 = {"Content-Type": "text/event-stream; charset=utf-8"}
    theirs = DatastarResponse(datastar.events("a <b> é"), headers=utf8)
    assert body == OPENING + b"".join(theirs)
    assert body.count(b"&lt;b&gt;") == 1


def test_datastar_cancel(server, key):
    with run(server, f"{key} a WAIT") as client:
        assert client.block() == OPENING
        client.block()
        client.block()
        assert server.control.next(key) == "waits"
    assert_closed(server, key, time.monotonic())


def test_datastar_fail(server, key):
    """It ends as a whole: after a cut Datastar would ask again."""
    with run(server, f"{key} a FAIL") as client:
        body = client.rest()
    signals = {"running": False, "status": "It has failed."}
    last = ServerSentEventGenerator.patch_signals(signals)
    assert body.endswith(b"</li>\n\n" + last.encode())
    assert client.is_whole
