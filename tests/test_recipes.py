"""The recipes' own answers, in process: what their clients would forgive."""

import contextlib
import importlib
import json
import re

import pytest

from syncstream.errors import Closed

APIS = {
    "completions": "/v1/chat/completions",
    "messages": "/v1/messages",
    "ag_ui": "/agent",
    "ai_sdk": "/api/chat",
}
PARTS = [{"type": "text", "text": "Why"}, {"type": "image"}]


def recipe(name, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "-")
    module = importlib.import_module(f"examples.recipes.{name}")
    if hasattr(module, "INTERVAL"):
        monkeypatch.setattr(module, "INTERVAL", 0)
    return module


def ask(module, name, content=None, **fields):
    message = {"content": content, "parts": content}
    asked = {"messages": [message], **fields}
    return module.app.test_client().post(APIS[name], json=asked)


@pytest.mark.parametrize("name", APIS)
def test_an_answer_to_a_list_of_parts(name, monkeypatch):
    """Its texts are the question, and no Python is shown."""
    body = ask(recipe(name, monkeypatch), name, PARTS, stream=True).text
    assert "Why " in body
    assert "{'" not in body


@pytest.mark.parametrize("name", APIS)
@pytest.mark.parametrize("asked", [{"messages": []}, {}, [], "x", {"messages": [1]}])
def test_a_wrong_question_is_refused(name, asked, monkeypatch):
    client = recipe(name, monkeypatch).app.test_client()
    assert client.post(APIS[name], json=asked).status_code == 400


@pytest.mark.parametrize("name", ["completions", "ai_sdk"])
def test_done_is_the_end_of_a_whole_answer_only(name, monkeypatch):
    module = recipe(name, monkeypatch)
    answer = ask(module, name, PARTS, stream=True)
    assert answer.text.count("[DONE]") == 1
    assert "data: [DONE]\n\n" in answer.text
    if name == "ai_sdk":
        assert answer.headers["x-vercel-ai-ui-message-stream"] == "v1"


def test_answers_that_are_no_streams(monkeypatch):
    text = "You ask: Why That depends. "
    answer = ask(recipe("completions", monkeypatch), "completions", "Why").json
    message = {"role": "assistant", "content": text}
    assert answer["choices"] == [
        {"index": 0, "message": message, "finish_reason": "stop"}
    ]
    answer = ask(recipe("messages", monkeypatch), "messages", "Why").json
    assert answer["content"] == [{"type": "text", "text": text}]


@pytest.mark.parametrize("name", ["datastar", "llm", "mcp_tools"])
def test_other_sites_are_refused(name, monkeypatch):
    client = recipe(name, monkeypatch).app.test_client()
    path = {"datastar": "/run", "llm": "/answers", "mcp_tools": "/mcp"}[name]
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Host": "evil.example"},
    ):
        assert client.post(path, json=[], headers=headers).status_code == 403


def test_the_page_of_datastar_posts_to_its_view(monkeypatch):
    client = recipe("datastar", monkeypatch).app.test_client()
    (path,) = re.findall(r"@post\('(.*?)'\)", client.get("/").text)
    assert "datastar-patch-elements" in client.post(path, json={"task": "a"}).text


@pytest.fixture
def mcp(monkeypatch):
    """Return the recipe, and a function that posts to a new session."""
    module = recipe("mcp_tools", monkeypatch)
    client = module.app.test_client()
    params = {"protocolVersion": "2025-06-18"}
    asked = {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": params}
    begun = client.post("/mcp", json=asked)
    headers = {"Mcp-Session-Id": begun.headers["Mcp-Session-Id"]}

    def post(method, params=None, id=1):
        asked = {"jsonrpc": "2.0", "id": id, "method": method, "params": params}
        return client.post("/mcp", json=asked, headers=headers)

    yield module, post, module.sessions[headers["Mcp-Session-Id"]]
    with contextlib.suppress(KeyError):
        module.sessions.pop(headers["Mcp-Session-Id"]).end()


def called(answer):
    *progress, last = re.findall(r"^data: (\{.*)$", answer.text, re.M)
    return progress, json.loads(last)


def test_mcp_takes_the_level_that_it_declares(mcp):
    module, post, session = mcp
    assert post("logging/setLevel", {"level": "error"}).json["result"] == {}
    module.tell_all("x")
    assert not module.hub.subscribe(f"{session.id}:0", after="start").read(0)
    assert post("logging/setLevel", {"level": []}).json["error"]["code"] == -32602


def test_mcp_answers_calls_that_fail(mcp, monkeypatch):
    """In the middle, by a value without JSON, and with its `_meta` null."""
    module, post, _ = mcp

    def fails():
        yield 1, 2
        raise RuntimeError("MARK")

    def wrong():
        yield {1}, 2

    monkeypatch.setitem(module.TOOLS, "fails", fails)
    monkeypatch.setitem(module.TOOLS, "wrong", wrong)
    params = {"name": "fails", "_meta": {"progressToken": 0}}
    progress, last = called(post("tools/call", params))
    assert len(progress) == 1
    assert last["result"]["isError"]
    _, last = called(post("tools/call", {**params, "name": "wrong"}))
    assert last["error"]["code"] == -32603
    params = {"name": "count", "arguments": {"to": 1}, "_meta": None}
    assert not called(post("tools/call", params))[1]["result"]["isError"]


def test_mcp_refuses_what_is_no_message(mcp):
    module, post, _ = mcp
    assert post("initialize").json["error"]["code"] == -32602
    assert post("notifications/cancelled", id=None).status_code == 400
    assert post("ping", id=[]).status_code == 400
    assert module.app.test_client().post("/mcp", json=[{}]).status_code == 400


def test_mcp_has_one_stream_of_a_channel(mcp):
    """A second one ends the first; and the session's end the last one."""
    _, _, session = mcp
    channel = f"{session.id}:0"
    first = session.subscribe(channel)
    assert first.read(0) == []
    second = session.subscribe(channel)
    assert second.read(0) == []
    with pytest.raises(Closed):
        first.read(0)
    session.end()
    with pytest.raises(Closed):
        second.read(0)
