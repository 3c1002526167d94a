"""What a user may write, checked by mypy --strict and never run."""

import queue
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from typing import Any

import flask
import requests

from syncstream import (
    ClientDisconnected,
    ConnectError,
    Event,
    Hub,
    NDJSONResponse,
    SSEResponse,
    Stream,
    StreamMiddleware,
    StreamResponse,
    Subscription,
    client,
    current_stream,
    last_event_id,
    sleep,
    sse,
    streaming,
    with_sse,
)
from syncstream.sources import batched, retrying
from syncstream.testing import (
    EVENT_SOURCE,
    Client,
    LiveServer,
    advance,
    assert_no_open_streams,
    chunks,
    events,
    lines,
    reading,
)

app = flask.Flask(__name__)
hub = Hub()


def numbers() -> Iterator[int | str | Event | dict[str, int] | None]:
    stream: Stream | None = current_stream()
    if stream is not None and stream.connected:
        length: int = stream.run(len, "word") + stream.run(int, "5", base=8)
        print(length)
        stream.on_close(
            lambda: print(stream.label, stream.reason, stream.last_event_id)
        )
    yield Event({"n": 1}, event="number", id=1, retry=3000)
    yield Event(comment="keepalive")
    sleep(0.5)
    yield from (1, "two", {"three": 3}, None)


@app.get("/a")
def a() -> SSEResponse:
    id: str | None = last_event_id(flask.request.environ)
    return SSEResponse(
        numbers(), 200, {"X-Id": id}, retry=1000, end="reconnect", on_error=error
    )


def error(exception: Exception) -> Event:
    return Event(str(exception), event="error")


@app.get("/b")
def b() -> flask.Response | NDJSONResponse | StreamResponse:
    if flask.request.args:
        return NDJSONResponse([1, 2], headers=[("X-A", "1")])
    return StreamResponse(iter(["text", b"bytes", None]), content_type="text/csv")


@app.get("/c")
@sse
def c() -> Iterator[Any]:
    try:
        yield {"data": 1, "event": "number"}
    except ClientDisconnected:
        raise


@app.get("/e")
@streaming
async def e() -> tuple[int, AsyncIterator[str], dict[str, str]]:
    return 200, letters(), {"X-A": "1"}


async def letters() -> AsyncIterator[str]:
    yield "a"


@app.get("/f")
@streaming(content_type="text/csv", drain=5)
def f() -> Iterator[str]:
    yield "a,b"


@app.get("/pushed")
@with_sse
def pushed(sse: Any) -> None:
    sse.send("a", event="b", id=1, retry=1000)


@app.get("/awaited")
@with_sse(retry=1000, end="reconnect")
async def awaited(sse: Any) -> None:
    await sse.send(Event("a"))


def may_read(subscription: Subscription) -> bool:
    return subscription.who is not None


@app.get("/d")
def d() -> SSEResponse:
    once = hub.subscribe("a", who="ann", authorize=may_read)
    if flask.request.args:
        return SSEResponse(once, handover=False)
    newest = hub.subscribe(
        "a",
        authorize=(may_read, 60),
        conflate=lambda event: event.json()["symbol"],
        throttle=0.5,
    )
    return SSEResponse(newest, handover=True)


app.wsgi_app = StreamMiddleware(  # type: ignore[method-assign]
    app.wsgi_app, handover=False
)
encoded: bytes = Event("a").encode()


def test_with_a_client() -> None:
    client = app.test_client()
    found: list[Event] = events(client.get("/e"), 3, timeout=1.5)
    text: list[str] = lines(client.get("/e"), 3)
    pieces: list[bytes] = chunks(client.get("/e"))
    with reading(client.get("/e")) as stream:
        found += stream.events(1, timeout=1)
        found += stream
        text += stream.lines(2)
        pieces += [stream.bytes(), *stream.iter_bytes()]
        last: str | None = stream.last_event_id
        assert last is None


def test_with_ours() -> None:
    client = Client(app)
    with client.stream("GET", "/e", headers=EVENT_SOURCE) as stream:
        assert stream.status_code == 200
        kind: str | None = stream.headers.get("Content-Type")
        found: list[Event] = stream.events(3)
        advance(15)
        stream.disconnect()
        assert_no_open_streams(timeout=1)
        why: str | None = stream.reason
        print(kind, found, why)
    client.stream("POST", "/e", json={}, last_event_id=stream.last_event_id).close()


def give_up(error: ConnectError) -> None:
    status: int | None = error.status
    print(status)
    raise error


def read_stream(session: requests.Session) -> str | None:
    with client.EventSource(
        "https://example.com/",
        session=session,
        method="POST",
        headers={"X-A": "1"},
        json={"a": 1},
        last_event_id="7",
        read_timeout=None,
        backoff=(1, 30),
        on_open=lambda response: print(response.headers),
        on_error=give_up,
    ) as source:
        for event in source:
            print(event.data, event.json())
            if source.state == "open":
                source.reconnect()
        milliseconds: int | None = source.retry
        print(milliseconds)
        return source.last_event_id


def read_response(response: requests.Response) -> None:
    for event in client.events(response, last_event_id="7"):
        print(event.id)
    text: list[str] = list(client.lines(response))
    print(text)
    with LiveServer("a:app", worker="gevent", env={"A": "b"}, timeout=5) as server:
        print(server.url, server.log())


def rows(last_event_id: str | None) -> Iterator[Event]:
    yield Event(last_event_id or "0")


async def arows(last_event_id: str | None) -> AsyncIterator[int]:
    yield 1


async def opened(last_event_id: str | None) -> AsyncIterator[int]:
    return arows(last_event_id)


def made_of_others() -> SSEResponse:
    items: Iterator[Event] = retrying(rows, on=ConnectionError, last_event_id="7")
    lists: Iterator[list[Event]] = batched(items, max=10)
    print(list(lists))
    waiting: queue.Queue[str] = queue.Queue()
    with closing(batched(waiting, max=10, within=0.5)) as texts:
        words: list[str] = next(texts)
        print(words)
    numbers: AsyncIterator[int] = retrying(
        opened,
        on=(ConnectionError, TimeoutError),
        attempts=None,
        backoff=(0.5, 5),
        on_error=lambda error: print(error.args),
    )
    found: AsyncIterator[list[int]] = batched(numbers, max=10, within=1)
    if flask.request.args:
        return SSEResponse(retrying(arows, on=OSError))
    if flask.request.data:
        return SSEResponse(batched(hub.subscribe("a"), max=10, within=1))
    return SSEResponse(found)
