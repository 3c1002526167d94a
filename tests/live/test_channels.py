"""Channels over HTTP, on real servers: what one publishes, the others get."""

import json
import socket
import time

import pytest

from syncstream.protocol import sse
from tests.support.live import LiveServer, unique_key
from tests.support.waits import TIMEOUT, await_true

SERVERS = ["gunicorn-gthread", "gunicorn-gevent", "gunicorn-sync", "waitress"]
LIVE = [kind for kind in SERVERS if kind != "gunicorn-sync"]  # several at once
live = pytest.mark.parametrize("server", LIVE, indirect=True)
EVENT_SOURCE = {"Accept": "text/event-stream", "Cache-Control": "no-cache"}


@pytest.fixture(scope="module", params=SERVERS)
def server(request):
    """Each server in turn; nothing it did may have failed."""
    with LiveServer(request.param, "tests.apps.hub_app:wrapped") as server:
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


def ask(server, path):
    """Return the answer to a request, from JSON."""
    with server.get(path) as client:
        text = client.rest()
        assert client.status == 200, text
        return json.loads(text)


def stats(server):
    return ask(server, "/stats")


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
        if not is_alone(server):  # once those of the test before have left
            await_true(lambda: subscribers(server) == count, server.log)
        for client in clients:
            client.close()
        await_true(lambda: subscribers(server) == 0, server.log)


@pytest.mark.parametrize("kind", LIVE)
def test_close_ends_all_streams(kind):
    """And a generator that yields from one sends no end id: who comes back may."""
    with LiveServer(kind, "tests.apps.hub_app:wrapped") as server:
        publish(server, "a", "x")
        clients = [
            follow(server, f"/{kind}/a?after=start")
            for kind in ("sse", "yield", "ndjson")
        ]
        next_events(clients[0], 1)
        next_events(clients[1], 1)
        assert b'"x"' in clients[2].chunk()
        assert ask(server, "/close") is None
        for client in clients:
            assert b"syncstream-end" not in client.rest()
            assert client.is_whole
            client.close()
        assert server.tracebacks() == 0, server.log()


@pytest.mark.parametrize("names", ["{0}", "{0},other-{0}"])
@live
def test_head_closes_the_hole(server, channel, names):
    """What is published between the page and its stream is got, and nothing else."""
    names = names.format(channel)
    publish(server, channel, "before")
    with server.get(f"/head/{names}") as client:
        head = client.rest().decode()
    ids = publish(server, channel, "between")
    path = f"/sse/{names}"
    with follow(server, f"{path}?lastEventId={head}") as client:
        (event,) = next_events(client, 1)
        assert event.data == "between"
        assert ids[0] in event.id
        publish(server, channel, "after")
        assert data(next_events(client, 1)) == ["after"]
    with follow(server, f"{path}?after={head}") as client:
        assert data(next_events(client, 2)) == ["between", "after"]


@live
def test_throttle(server, channel):
    """Deliveries have their distance, and nothing is lost by it."""
    publish(server, channel, "0")
    with follow(server, f"/sse/{channel}?after=start&throttle=0.5") as client:
        next_events(client, 1)
        began = time.monotonic()
        publish(server, channel, "1")
        assert data(next_events(client, 1)) == ["1"]
        publish(server, channel, "2")
        publish(server, channel, "3")
        assert data(next_events(client, 2)) == ["2", "3"]
        assert time.monotonic() - began >= 0.5


@live
def test_tags(server, channel):
    """Each gets what is for it, server and when it comes back."""
    publish(server, channel, "all")
    path = f"/sse/{channel}?after=start&tags="
    staff, ann = follow(server, path + "staff"), follow(server, path + "staff,ann")
    for client in (staff, ann):
        (first,) = next_events(client, 1)
        assert first.data == "all"
    publish(server, f"{channel}?only=ann", "ann's")
    publish(server, f"{channel}?only=staff&exclude=ann", "not ann's")
    publish(server, f"{channel}?exclude=guest", "no guest's")
    assert data(next_events(staff, 2)) == ["not ann's", "no guest's"]
    assert data(next_events(ann, 2)) == ["ann's", "no guest's"]
    with follow(server, path + "guest", last=first.id) as guest:
        publish(server, channel, "last")
        assert data(next_events(guest, 1)) == ["last"]
    staff.close()
    ann.close()


@live
def test_presence_and_kick(server, channel):
    """Who is there is told and shown; who is kicked is asked to come back late."""
    watcher = follow(server, f"/sse/{channel}?who=watcher")
    await_true(lambda: ask(server, f"/presence/{channel}") == ["watcher"])
    streams = [
        follow(server, f"/{kind}/{channel}?who={channel}&announce=1")
        for kind in ("sse", "yield")
    ]
    for event in next_events(watcher, 2):
        assert (event.event, event.json()) == ("join", {"who": channel})
    assert sorted(ask(server, f"/presence/{channel}")) == sorted(
        ["watcher", channel, channel]
    )
    assert ask(server, f"/kick/{channel}") == 2
    for client in streams:
        text = client.rest()
        assert client.is_whole
        assert b"syncstream-end" not in text
        assert int(text.rpartition(b"retry: ")[2]) >= 5000
        client.close()
    for event in next_events(watcher, 2):
        assert (event.event, event.json()) == ("leave", {"who": channel})
    await_true(lambda: ask(server, f"/presence/{channel}") == ["watcher"])
    watcher.close()


@live
def test_authorize(server, channel):
    """Who may not read gets nothing, and who may not any more nothing more."""
    ids = publish(server, channel, "secret")
    path = f"/sse/{channel}?after=start&authorize=0.1&who={channel}"
    with follow(server, path) as client:
        assert data(next_events(client, 1)) == ["secret"]
        ask(server, f"/deny/{channel}")
        assert int(client.rest().rpartition(b"retry: ")[2]) >= 5000
        assert client.is_whole
    publish(server, channel, "more")
    for last in (None, *ids):
        for kind in ("sse", "yield", "ndjson"):
            with follow(server, path.replace("sse", kind), last=last) as client:
                text = client.rest()
                # Events have a head before it is known, and come back in vain.
                assert client.status == (403 if kind == "ndjson" else 200)
                assert b"data" not in text
                assert client.is_whole
    await_true(lambda: subscribers(server) == 0)


@live
def test_an_authorize_that_hangs(server, channel):
    """Its client is let go in time, whoever holds it; others go on."""
    path = f"/{{}}/{channel}?authorize=0.1&who={{}}"
    with (
        follow(server, path.format("sse", channel)) as given,
        follow(server, path.format("yield", channel)) as held,
        follow(server, path.format("sse", "well")) as well,
    ):
        await_true(lambda: len(ask(server, f"/presence/{channel}")) == 3)
        ask(server, f"/hang/{channel}")
        for client in (given, held):
            assert b"data" not in client.rest()
        await_true(lambda: ask(server, f"/presence/{channel}") == ["well"])
        publish(server, channel, "1")
        assert data(next_events(well, 1)) == ["1"]
        ask(server, f"/deny/{channel}")  # whose thread may go on


@pytest.mark.parametrize("kind", ["gunicorn-gthread", "gunicorn-gevent"])
def test_several_workers_are_warned_of(kind):
    """Once in each: what one publishes the others do not see, and what to do."""
    with LiveServer(kind, "tests.apps.hub_app:wrapped", "-w", "2") as server:
        publish(server, "a", "x")
        processes = set()
        deadline = time.monotonic() + TIMEOUT
        while len(processes) < 2:
            assert time.monotonic() < deadline, processes
            with follow(server, "/sse/a") as client:
                client.block()
                processes.add(client.headers["x-process"])
        for _ in range(10):
            with follow(server, "/sse/a") as client:
                client.block()
        words = "this hub belongs to one process, but the server runs several"
        await_true(lambda: server.log().count(words) == 2, server.log)
        assert 'Hub("local:")' in server.log()
        assert "run one worker" in server.log()


# Slow readers.

SLOW = ["gunicorn-gthread", "gunicorn-gevent"]


def stop_reading(server, path):
    """Return a client with little room, and the one event that it has read."""
    client = server.connect()
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 15)
    client.request("GET", path, headers=EVENT_SOURCE)
    (event,) = next_events(client, 1)
    return client, event


@pytest.mark.parametrize("source", ["sse", "yield"])
@pytest.mark.parametrize("kind", SLOW)
def test_a_reader_that_stops_and_reads_on(kind, source):
    """It is told that it has missed some, and goes on with what is kept."""
    with LiveServer(kind, "tests.apps.hub_app:wrapped") as server:
        publish(server, "a", "first")
        client, _ = stop_reading(server, f"/{source}/a?after=start")
        with server.get("/flood/a?count=4000&size=4000") as flood:
            assert flood.rest() == b"ok"
        numbers, resets, is_after_reset = [], 0, False
        while not numbers or numbers[-1] != 3999:
            (event,) = next_events(client, 1)
            if event.event == "reset":
                assert event.json() == {"channel": "a", "reason": "lagged"}
                resets += 1
                is_after_reset = True
            else:
                number = event.json()["n"]
                follows = numbers[-1] + 1 if numbers else 0
                assert number == follows or (is_after_reset and number > follows)
                numbers.append(number)
                is_after_reset = False
        # One before any event, if the flood let nobody read; one after each stop.
        assert resets >= 1
        assert numbers[-1000:] == [*range(3000, 4000)]
        client.close()
        assert server.tracebacks() == 0, server.log()


@pytest.mark.parametrize("kind", SLOW)
def test_a_reader_that_stops_costs_the_others_nothing(kind):
    """They get all there is, and the server's memory stays what it was."""
    # One arena: with one for each thread malloc grows by 7 MB without a slow one, too.
    env = {"MALLOC_ARENA_MAX": "1"}
    with LiveServer(kind, "tests.apps.hub_app:wrapped", env=env) as server:
        publish(server, "a", "first")
        healthy = [follow(server, "/sse/a?after=start") for _ in range(5)]
        frozen, _ = stop_reading(server, "/sse/a?after=start")
        for client in healthy:
            next_events(client, 1)

        def flow(megabytes):
            for _ in range(2 * megabytes):
                with server.get("/flood/a?count=50&size=10000") as flood:
                    flood.rest()
                for client in healthy:
                    found = next_events(client, 50)
                    assert [event.json()["n"] for event in found] == [*range(50)]

        flow(15)  # what is kept is filled: 1,000 events, twice
        before = ask(server, "/rss")
        flow(20)
        assert ask(server, "/rss") - before < 5_000_000
        assert subscribers(server) == 6
        for client in (*healthy, frozen):
            client.close()
        await_true(lambda: subscribers(server) == 0, server.log)
        assert server.tracebacks() == 0, server.log()
