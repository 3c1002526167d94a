"""Each recipe for a client of Python's, with that client, on a real server.

To the end of a stream, through a cancel, and through an error in the middle.
"""

import asyncio
import contextlib
import json
import time

import anthropic
import httpx
import httpx2
import mcp
import openai
import pytest
from datastar_py import ServerSentEventGenerator
from datastar_py.django import DatastarResponse
from mcp.client.streamable_http import streamable_http_client

import examples.recipes.datastar as datastar
from tests.support.live import LiveServer, unique_key
from tests.support.tcp_proxy import Proxy
from tests.support.waits import TIMEOUT


@pytest.fixture(scope="module", params=["gunicorn-gevent", "gunicorn-gthread"])
def server(request):
    with LiveServer(request.param, "tests.apps.recipes_app:app") as server:
        yield server
        raised = server.log().count("RuntimeError: MARK")
        raised += server.log().count("TypeError: can only concatenate")
        assert server.tracebacks() == raised, server.log()


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


def test_completions_cut(server, key):
    """A stream that its server cuts is a broken connection, not a short answer."""
    with completions(server, f"{key} a CUT b") as stream:
        assert [next(stream).choices[0].delta.content for _ in range(2)] == ["", "a"]
        with pytest.raises(openai.APIConnectionError):
            list(stream)
    assert server.control.next(key) == "closed"


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


def test_messages_cut(server, key):
    """A stream that its server cuts is a broken connection, not a short answer."""
    question = {"model": "m", "max_tokens": 9, "messages": asking(f"{key} a CUT b")}
    with (
        messages(server) as client,
        client.stream(**question) as stream,
        pytest.raises(httpx2.RemoteProtocolError),
    ):
        list(stream)
    assert server.control.next(key) == "closed"


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


@contextlib.asynccontextmanager
async def tools(port, answers=None, **options):
    """Connect MCP's client to the tools; note the HTTP status of each answer."""
    url = f"http://127.0.0.1:{port}/mcp_tools/mcp"

    async def note(response):
        if answers is not None:
            answers.append((response.request.method, response.status_code))

    hooks = {"response": [note]}
    async with (
        httpx2.AsyncClient(
            trust_env=False, timeout=TIMEOUT, event_hooks=hooks
        ) as http_client,
        mcp.Client(
            streamable_http_client(url, http_client=http_client), **options
        ) as client,
    ):
        yield client


class Seen:
    """What a call's callbacks have been told."""

    def __init__(self):
        self.progress = []
        self.logs = asyncio.Queue()

    async def on_progress(self, progress, total, message):
        self.progress.append((progress, total))

    async def on_log(self, params):
        await self.logs.put(params.data)

    async def after(self, number):
        while len(self.progress) < number:
            await asyncio.sleep(0.005)


def timed(test):
    """Run a coroutine that may take so long."""
    asyncio.run(asyncio.wait_for(test(), TIMEOUT))


def test_mcp_end(server, key):
    """A call's progress and its result; and what all clients are told."""

    @timed
    async def _():
        seen = Seen()
        async with tools(server.port, logging_callback=seen.on_log) as client:
            assert [tool.name for tool in (await client.list_tools()).tools] == [
                "count"
            ]
            words = {"key": key, "to": 3}
            result = await client.call_tool(
                "count", words, progress_callback=seen.on_progress
            )
            assert [content.text for content in result.content] == ["Counted to 3."]
            assert not result.is_error
            assert seen.progress == [(1, 3), (2, 3), (3, 3)]
            while seen.logs.empty():  # until its GET has come
                await client.call_tool("count", {"key": key, "to": 1})
            assert (await seen.logs.get()).startswith("Somebody has counted to ")
        assert server.control.next(key) == "closed"


def test_mcp_cancel(server, key):
    """By a notification, after which there is no response; and by the session's end."""

    @timed
    async def _():
        seen, words, answers = Seen(), {"key": key, "to": 10**6}, []
        async with tools(server.port, answers) as client:
            for number in (3, 6):
                call = asyncio.create_task(
                    client.call_tool("count", words, progress_callback=seen.on_progress)
                )
                await seen.after(number)
                if number == 3:
                    call.cancel()
                    assert await asyncio.to_thread(server.control.next, key) == "closed"
                    result = await client.call_tool("count", {"key": f"{key}-2"})
                    assert not result.is_error
                    while ("GET", 405) not in answers:  # it is told to stay away
                        await asyncio.sleep(0.01)
        assert server.control.next(key) == "closed"
        with pytest.raises(mcp.MCPError):
            await call


def test_mcp_fail(server, key):
    """A tool's error is a result; an error of the protocol is raised."""

    @timed
    async def _():
        async with tools(server.port) as client:
            result = await client.call_tool("count", {"key": key, "to": "x"})
            assert [content.text for content in result.content] == [
                "The tool has failed."
            ]
            assert result.is_error
            with pytest.raises(mcp.MCPError, match="No such tool") as caught:
                await client.call_tool("none", {})
            assert caught.value.code == -32602


def test_mcp_resumes(server, key):
    """A connection that breaks in the middle costs neither progress nor result."""

    @timed
    async def _():
        seen, to = Seen(), 60
        with Proxy(server.port) as proxy:
            async with tools(proxy.port) as client:
                call = asyncio.create_task(
                    client.call_tool(
                        "count",
                        {"key": key, "to": to},
                        progress_callback=seen.on_progress,
                    )
                )
                await seen.after(5)
                proxy.cut()
                result = await call
        assert [content.text for content in result.content] == [f"Counted to {to}."]
        assert seen.progress == [(n + 1, to) for n in range(to)]


def test_mcp_sessions(server):
    """A session's requests need its id, from its beginning to its end."""
    asked = {"jsonrpc": "2.0", "id": 0, "method": "initialize"}
    asked["params"] = {"protocolVersion": "2025-06-18"}
    ping = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
    url = f"{server.url}/mcp_tools/mcp"
    with httpx.Client(trust_env=False) as client:
        answer = client.post(url, json=asked)
        assert answer.json()["result"]["protocolVersion"] == "2025-06-18"
        session = {"Mcp-Session-Id": answer.headers["Mcp-Session-Id"]}
        told = {"jsonrpc": "2.0", "method": "notifications/initialized"}
        assert client.post(url, json=told, headers=session).status_code == 202
        assert client.post(url, json=ping).status_code == 400
        other = {"Mcp-Session-Id": "other"}
        assert client.post(url, json=ping, headers=other).status_code == 404
        foreign = {**session, "Origin": "https://example.com"}
        assert client.post(url, json=ping, headers=foreign).status_code == 403
        assert client.post(url, json=ping, headers=session).json()["result"] == {}
        assert client.delete(url, headers=session).status_code == 204
        assert client.post(url, json=ping, headers=session).status_code == 404
