"""Channels over HTTP, on real servers: what one publishes, the others get."""

import json

import pytest

from live import LiveServer, await_true, unique_key
from syncstream.protocol import sse

SERVERS = ["gunicorn-gthread", "gunicorn-gevent", "gunicorn-sync", "waitress"]
EVENT_SOURCE = {"Accept": "text/event-stream", "Cache-Control": "no-cache"}


@pytest.fixture(scope="module", params=SERVERS)
def server(request):
    """Each server in turn; nothing it did may have failed."""
    with LiveServer(request.param, "apps.hub_app:wrapped") as server:
        yield server
        assert server.tracebacks() == 0, server.log()


@pytest.fixture
def channel():
    return unique_key()


def is_alone(server):
    """Tell whether the server has one connection at a time."""
    return server.kind == "gunicorn-sync"


def publish(server, channel, *items):
    """Publish by a request of its own; return the ids."""
    body = json.dumps(items).encode()
    with server.connect() as client:
        client.socket.sendall(
            f"POST /publish/{channel} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        text = client.rest()
        assert client.status == 200, text
        return json.loads(text)


def stats(server):
    with server.get("/stats") as client:
        return json.loads(client.rest())


def subscribers(server):
    return stats(server)["subscribers"]


def follow(server, path, last=None):
    """Open a stream as a browser does."""
    headers = dict(EVENT_SOURCE)
    if last is not None:
        headers["Last-Event-ID"] = last
    return server.get(path, headers=headers)


def next_events(client, count):
    """Return the next so many events, whatever comments come between."""
    events = []
    while len(events) < count:
        block = client.block()
        assert block, f"the stream ended after {events}"
        events += sse.Decoder().feed(block)
    return events


def data(events):
    return [event.data for event in events]


@pytest.mark.parametrize("kind", ["sse", "yield"])
def test_subscribe_and_publish(server, channel, kind):
    """What is published arrives, with its ids; to all who listen, in one order."""
    before = publish(server, channel, "1", {"n": 2})
    paths = [f"/{kind}/{channel}?after=start"] * (1 if is_alone(server) else 3)
    clients = [follow(server, path) for path in paths]
    for client in clients:
        found = next_events(client, 2)
        assert data(found) == ["1", '{"n":2}']
        assert [event.id for event in found] == before
        assert client.status == 200
        assert client.headers["content-type"] == "text/event-stream; charset=utf-8"
    if not is_alone(server):
        ids = publish(server, channel, "3", "4\n5")
        for client in clients:
            found = next_events(client, 2)
            assert data(found) == ["3", "4\n5"]
            assert [event.id for event in found] == ids
    for client in clients:
        client.close()
    await_true(lambda: subscribers(server) == 0, server.log)


@pytest.mark.parametrize("kind", ["sse", "yield"])
def test_resume(server, channel, kind):
    """Who comes back with an id gets what came after it, however often."""
    ids = publish(server, channel, *"abcde")
    for place in (0, 2, 3):
        with follow(server, f"/{kind}/{channel}", last=ids[place]) as client:
            expected = [*"abcde"][place + 1 :]
            assert data(next_events(client, len(expected))) == expected
            if not is_alone(server) and place == 3:
                publish(server, channel, "f")
                assert data(next_events(client, 1)) == ["f"]
    await_true(lambda: subscribers(server) == 0, server.log)


@pytest.mark.parametrize("kind", ["sse", "yield"])
@pytest.mark.parametrize("id", ["never-given", "x" * 5000, "ffff-0", "1-deadbeef"])
def test_reset(server, channel, kind, id):
    """An id that is not known: a reset first, and nothing lost if cut just there."""
    ids = publish(server, channel, *"ab")
    with follow(server, f"/{kind}/{channel}", last=id) as client:
        (reset,) = next_events(client, 1)
    assert reset.event == "reset"
    assert reset.json() == {"channel": channel, "reason": "unknown"}
    with follow(server, f"/{kind}/{channel}", last=reset.id) as client:
        found = next_events(client, 2)
    assert [event.id for event in found] == ids
    assert data(found) == ["a", "b"]


def test_several_channels(server, channel):
    """One id for all of them, in the midst too."""
    other = unique_key()
    publish(server, channel, *"123")
    publish(server, other, *"45")
    path = f"/sse/{channel},{other}"
    with follow(server, f"{path}?after=start") as client:
        found = next_events(client, 5)
    assert sorted(data(found)) == [*"12345"]
    for place in range(4):
        with follow(server, path, last=found[place].id) as client:
            rest = next_events(client, 4 - place)
        assert sorted(data(found[: place + 1] + rest)) == [*"12345"]


def test_ndjson(server, channel):
    """The same as lines, each with its id."""
    ids = publish(server, channel, "1", {"n": 2})
    with server.get(f"/ndjson/{channel}?after=start") as client:
        text = b""
        while text.count(b"\n") < 2:
            text += client.chunk()
        assert client.headers["content-type"].startswith("application/x-ndjson")
    assert [json.loads(line) for line in text.splitlines()] == [
        {"id": ids[0], "data": "1"},
        {"id": ids[1], "data": '{"n":2}'},
    ]
    # Of several, each line says whose it is; so does a reset.
    path = f"/ndjson/{channel},other-{channel}"
    with server.get(path, headers={"Last-Event-ID": "never-given"}) as client:
        text = b""
        while text.count(b"\n") < 4:
            text += client.chunk()
    lines = [json.loads(line) for line in text.splitlines()]
    assert {(line["channel"], line.get("event"), line["data"]) for line in lines} == {
        *((name, "reset", reset(name)) for name in (channel, f"other-{channel}")),
        (channel, None, "1"),
        (channel, None, '{"n":2}'),
    }
    await_true(lambda: subscribers(server) == 0, server.log)


def reset(channel, reason="unknown"):
    """Return the data of a reset."""
    return json.dumps({"channel": channel, "reason": reason}, separators=(",", ":"))


def test_who_leaves_frees_its_subscription(server, channel):
    """While nothing is published, too."""
    count = 1 if is_alone(server) else 4
    for kind in ("sse", "yield", "ndjson"):
        publish(server, channel, "x")
        clients = [server.get(f"/{kind}/{channel}?after=start") for _ in range(count)]
        for client in clients:
            while b"x" not in client.chunk():
                pass
        if not is_alone(server):
            assert subscribers(server) == count
        for client in clients:
            client.close()
        await_true(lambda: subscribers(server) == 0, server.log)


def test_the_end_is_no_end(channel):
    """Closed with its hub, a generator that yields from it sends no end id."""
    with LiveServer("gunicorn-gthread", "apps.hub_app:wrapped") as server:
        publish(server, channel, "x")
        clients = [
            follow(server, f"/{kind}/{channel}?after=start")
            for kind in ("sse", "yield")
        ]
        for client in clients:
            next_events(client, 1)
        with server.get("/close") as client:
            client.rest()
        for client in clients:
            assert b"syncstream-end" not in client.rest()
            client.close()
        assert server.tracebacks() == 0, server.log()
