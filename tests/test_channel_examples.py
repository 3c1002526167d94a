"""Each example of a channel does, on a real server, what its docstring says."""

import collections
import json

import pytest

from syncstream.protocol import sse
from tests.support.live import LiveServer
from tests.support.waits import await_true

KINDS = ["gunicorn-gevent", "gunicorn-gthread"]
EVENT_SOURCE = {"Accept": "text/event-stream", "Cache-Control": "no-cache"}


@pytest.fixture(params=KINDS)
def serve(request):
    """Run an example under a server, until the test is over.

    One worker, and channels that end with it: see test_docs.py for several.
    """
    servers = []

    def serve(name, ready="GET /", **env):
        env = {"HUB_URL": "memory:", **env}
        server = LiveServer(request.param, f"examples.{name}:app", env=env, ready=ready)
        servers.append(server)
        return server

    yield serve
    try:
        assert [server.tracebacks() for server in servers] == [0] * len(servers)
    finally:
        for server in servers:
            server.close()


def post(server, path, text=""):
    """Post a text; return the answer's status and body."""
    with server.connect() as client:
        body = text.encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        client.socket.sendall(head.encode() + body)
        answer = client.rest()
        return client.status, answer


def follow(server, path, last=None):
    """Open a stream as a browser does, after an id if one is given."""
    headers = dict(EVENT_SOURCE)
    if last is not None:
        headers["Last-Event-ID"] = last
    return server.get(path, headers=headers)


def next_event(client):
    """Return the next event, whatever comments come before it."""
    while not (events := sse.Decoder().feed(client.block())):
        pass
    (event,) = events
    return event


def texts(client, count):
    return [next_event(client).data for _ in range(count)]


def up_to_end(client):
    """Return the events before the one that is named "end"."""
    events = []
    while (event := next_event(client)).event != "end":
        events.append(event)
    return events


def test_chat_everybody_sees_every_line(serve):
    """Each line comes to all, once and in order; also to who comes later."""
    server = serve("chat")
    lines = [f"line {n}" for n in range(20)] + ["two\nlines", "<b>é</b> ✓", ""]
    with follow(server, "/events") as ann, follow(server, "/events") as bob:
        for client in (ann, bob):
            assert client.block() + client.block() == b": ok\nretry: 1000\n\n"
        for line in lines:
            post(server, "/say", line)
            assert texts(ann, 1) == texts(bob, 1) == [line]
    with follow(server, "/events") as eve:
        assert texts(eve, len(lines)) == lines


def test_chat_resumes(serve):
    """Who comes back gets what followed the id that it has, and then what is new."""
    server = serve("chat")
    ids = [json.loads(post(server, "/say", f"{n}")[1])["id"] for n in range(5)]
    for n in range(5):
        with follow(server, "/events", ids[n]) as client:
            client.block()  # there is one, whatever was missed
            for missed in range(n + 1, len(ids)):
                event = next_event(client)
                assert (event.id, event.data) == (ids[missed], f"{missed}")
            new = json.loads(post(server, "/say", f"{len(ids)}")[1])["id"]
            event = next_event(client)
            assert (event.id, event.data) == (new, f"{len(ids)}")
            ids.append(new)


def test_chat_announces_what_it_has_forgotten(serve):
    """After a restart there is a reset first, and one only; then each line once."""
    server = serve("chat")
    with follow(server, "/events") as client:
        post(server, "/say", "before")
        last = next_event(client).id
    server.stop()
    server.start(server.port)
    with follow(server, "/events", last) as client:
        gap = next_event(client)
        assert gap.event == "reset"
        assert gap.json() == {"channel": "room", "reason": "unknown"}
        post(server, "/say", "one")
        event = next_event(client)
        assert (event.event, event.data) == (None, "one")
    for id, expected in ((gap.id, ["one", "two"]), (event.id, ["two"])):
        post(server, "/say", "two")
        with follow(server, "/events", id) as client:
            assert texts(client, len(expected)) == expected


def head_of_page(server, name):
    """Return the id that a user's page begins after."""
    with server.get(f"/{name}") as client:
        page = client.rest().decode()
    return page.partition("?lastEventId=")[2].partition("`")[0]


def test_notifications_reach_their_user_alone(serve):
    """All open pages of the user get it, no other's; the sender learns how many."""
    server = serve("notifications", "GET /ann")
    assert json.loads(post(server, "/notify/ann", "nobody")[1]) == {"pages": 0}
    last = {name: head_of_page(server, name) for name in ("ann", "bob")}
    with (
        follow(server, "/events/ann", last["ann"]) as one,
        follow(server, "/events/ann", last["ann"]) as two,
        follow(server, "/events/bob", last["bob"]) as bob,
    ):
        post(server, "/notify/bob", "bob's")
        post(server, "/notify/ann", "tea")
        for client, text in ((one, "tea"), (two, "tea"), (bob, "bob's")):
            event = next_event(client)
            assert (event.event, event.json()) == ("note", {"text": text})
        assert json.loads(post(server, "/notify/ann", "x")[1]) == {"pages": 2}
        two.close()
        await_true(lambda: json.loads(post(server, "/notify/ann")[1]) == {"pages": 1})


def test_notifications_begin_where_the_page_does(serve):
    """What is sent between the page and its stream comes, what was before does not."""
    server = serve("notifications", "GET /ann")
    post(server, "/notify/ann", "before")
    query = head_of_page(server, "ann")
    post(server, "/notify/ann", "between")
    with follow(server, f"/events/ann?lastEventId={query}") as client:
        assert next_event(client).json() == {"text": "between"}
        post(server, "/notify/ann", "after")
        assert next_event(client).json() == {"text": "after"}


@pytest.mark.parametrize("name", ["*", "%23", "ann:*", "a%20b"])
def test_notifications_are_not_had_by_a_pattern(serve, name):
    """A name that would be a pattern is nobody's."""
    server = serve("notifications", "GET /ann")
    with follow(server, f"/events/{name}") as client:
        client.read_head()
        assert client.status == 404


def start_job(server):
    """Start a job; return the path of its stream."""
    with server.connect() as client:
        client.request("POST", "/jobs", headers={"Content-Length": "0"})
        client.read_head()
        assert client.status == 303
        return client.headers["location"] + "/events"


def test_progress(serve):
    """From 0 to 100 and the end: for who watches, who comes late, who comes back."""
    server = serve("progress", INTERVAL="0.01")
    path = start_job(server)
    with follow(server, path) as watching:
        half = [next_event(watching) for _ in range(50)]
        with follow(server, path) as late:
            assert [e.json()["percent"] for e in up_to_end(late)] == [*range(101)]
        with follow(server, path, half[-1].id) as back:
            rest = up_to_end(back)
        assert [e.json()["percent"] for e in half + rest] == [*range(101)]
        assert [e.id for e in rest] == [e.id for e in up_to_end(watching)]


def test_progress_of_another_job(serve):
    """Each job has a channel of its own."""
    server = serve("progress", INTERVAL="0.001")
    for _ in range(2):
        with follow(server, start_job(server)) as client:
            assert [e.json()["percent"] for e in up_to_end(client)] == [*range(101)]


def test_prices_are_the_newest(serve):
    """A throttled reader gets each symbol once a time, never an old one, no reset."""
    server = serve("prices", INTERVAL="0.001", THROTTLE="0.1")
    with follow(server, "/prices") as client:
        client.block()
        newest, skipped = collections.Counter(), 0
        for _ in range(60):
            event = next_event(client)
            price = event.json()
            assert event.event is None
            assert price["n"] > newest[price["symbol"]] or not newest[price["symbol"]]
            skipped += price["n"] - max(newest.values(), default=0) > 3
            newest[price["symbol"]] = price["n"]
        assert set(newest) == {"ACME", "INIT", "UMBR"}
        assert skipped


def test_prices_are_conflated(serve):
    """Between two deliveries there are changes by the dozen; three are sent."""
    server = serve("prices", INTERVAL="0.001", THROTTLE="0.2")
    with follow(server, "/prices") as client:
        client.block()
        ns = [next_event(client).json()["n"] for _ in range(30)]
    assert ns == sorted(ns)
    # Ten deliveries, two tenths apart: most changes are not among them.
    assert ns[-1] - ns[0] > 3 * len(ns)


ANSWER = "You ask: Why? That is a matter of opinion. "


def test_tokens_survive_their_viewer(serve):
    """The answer is written on; who resumes, or begins again, has it all, once."""
    server = serve("tokens", INTERVAL="0.05")
    with follow(server, "/answers/1") as client:
        client.block()
        post(server, "/answers/1", "Why?")
        seen = [next_event(client) for _ in range(3)]
    with follow(server, "/answers/1", seen[-1].id) as client:
        seen += up_to_end(client)
    assert "".join(event.data for event in seen) == ANSWER
    with follow(server, "/answers/1") as client:
        assert [e.id for e in up_to_end(client)] == [e.id for e in seen]


def test_tokens_need_no_viewer(serve):
    """An answer that nobody looked at is there from its first token on."""
    server = serve("tokens", INTERVAL="0")
    post(server, "/answers/2", "Why?")
    with follow(server, "/answers/2") as client:
        assert "".join(event.data for event in up_to_end(client)) == ANSWER
