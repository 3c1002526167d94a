"""What real clients make of our streams: every event, and nothing else.

With ids, keepalives between the events, comments of the application's, and an error in
the middle; from a generator, and from a channel whose subscriber has left its server.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import httpx_sse
import openai
import pytest

from tests.support.live import LiveServer, unique_key
from tests.support.programs import lack, program

NODE = Path(__file__).parent / "node"
DATA = ["0", "1", "2"]


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    options = ["--threads", "40"]  # no client waits for another
    with LiveServer(
        "gunicorn-gthread", "tests.apps.clients_app:app", *options
    ) as server:
        yield server
        assert server.tracebacks() == server.log().count("in the middle") / 2


def read(iterator: Any) -> tuple[list[Any], Exception | None]:
    """Return what an iterator yields, and the error that ends it."""
    found = []
    try:
        for item in iterator:
            found.append(item)
    except Exception as error:
        return found, error
    return found, None


def is_cut(error: Exception | None) -> bool:
    """Tell whether a client has seen that the connection broke, and nothing else."""
    return type(error).__name__ in ("RemoteProtocolError", "APIConnectionError")


@pytest.mark.parametrize("fails", [False, True])
def test_openai(server: LiveServer, fails: bool) -> None:
    """Each chunk; and a truncation is a broken connection, not bad JSON."""
    with openai.OpenAI(
        api_key="x",
        base_url=f"{server.url}/openai/v1",
        max_retries=0,
        http_client=openai.DefaultHttpxClient(trust_env=False),
    ) as client:
        stream = client.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": "hi"}],
            stream=True,
            extra_query={"fail": "1"} if fails else {},
        )
        chunks, error = read(stream)
    assert [chunk.choices[0].delta.content for chunk in chunks] == DATA
    assert is_cut(error) if fails else error is None


@pytest.mark.parametrize("fails", [False, True])
def test_anthropic(server: LiveServer, fails: bool) -> None:
    """Each event by its type."""
    with anthropic.Anthropic(
        api_key="x",
        base_url=f"{server.url}/anthropic",
        max_retries=0,
        http_client=anthropic.DefaultHttpxClient(trust_env=False),
    ) as client:
        stream = client.messages.create(
            model="m",
            max_tokens=5,
            messages=[{"role": "user", "content": "hi"}],
            stream=True,
            extra_query={"fail": "1"} if fails else {},
        )
        events, error = read(stream)
    names = ["message_start", "content_block_start", "content_block_delta"]
    assert [event.type for event in events] == names
    assert is_cut(error) if fails else error is None


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("fails", [False, True])
def test_httpx_sse(server: LiveServer, method: str, fails: bool) -> None:
    """Its parser makes an event of every blank line, once there was an id."""
    url = f"{server.url}/plain/" + "?fail=1" * fails
    with (
        httpx.Client(trust_env=False) as client,
        httpx_sse.connect_sse(client, method, url) as source,
    ):
        events, error = read(source.iter_sse())
    assert [(e.event, e.data, e.id) for e in events] == [
        ("message", data, data) for data in DATA
    ]
    assert is_cut(error) if fails else error is None


def test_httpx_sse_reads_a_channel(server: LiveServer) -> None:
    """What the loop sends is as clean as what a thread does."""
    url = f"{server.url}/channel/{unique_key()}"
    with (
        httpx.Client(trust_env=False) as client,
        httpx_sse.connect_sse(client, "GET", url) as source,
    ):
        found = []
        for event in source.iter_sse():
            found.append((event.event, event.data))
            if event.event == "end":
                break
    assert found == [*(("message", data) for data in DATA), ("end", "end")]


@pytest.fixture(scope="module")
def of_node(server: LiveServer) -> dict[tuple[str, str], Any]:
    """What the clients of Node have seen, by their names and paths."""
    node = program("node", "nodejs npm")
    if not (NODE / "node_modules").is_dir():
        lack(f"no clients of Node: npm ci --prefix {NODE}")
    child = subprocess.run(
        [node, str(NODE / "clients.mjs"), server.url],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    return {(seen["name"], seen["path"]): seen for seen in json.loads(child.stdout)}


@pytest.mark.parametrize(
    "name",
    [
        "eventsource",
        "fetch-event-source",
        "eventsource-parser",
        "eventsource-parser, by name",
        "split",
    ],
)
def test_node(of_node: dict[tuple[str, str], Any], name: str) -> None:
    """The clients of npm, and a page that splits at blank lines."""
    expected = [["message", data, data] for data in DATA]
    finished = of_node[name, "/plain/"]
    assert finished["events"] == expected
    assert not finished["failed"]
    if name == "eventsource":  # it has come back once, and was told to stay away
        assert (finished["retries"], finished["code"]) == (1, 204)
    failed = of_node[name, "/plain/?fail=1"]
    assert failed["events"] == expected
    assert failed["failed"]
    if name != "split":
        events = of_node[name, "/channel"]["events"]
        names = [(event, data) for event, data, _ in events]
        assert names == [*(("message", data) for data in DATA), ("end", "end")]
