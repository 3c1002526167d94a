"""`EventSource` against a server whose every byte is written here."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import pytest
import requests

from syncstream import ConnectError, Event, RemoteProtocolError
from syncstream.client import EventSource
from tests import ROOT
from tests.support.raw_server import HEAD, RawServer, answer

pytestmark = pytest.mark.timeout(30)

END = answer(204, kind="")
FAST = (0.001, 0.002)


def body(*events: Event) -> bytes:
    return answer(body=b"".join(bytes(event) for event in events))


def read(server: RawServer, **options: Any) -> list[tuple[Any, ...]]:
    """Return all events up to the end."""
    options.setdefault("backoff", FAST)
    with EventSource(server.url, **options) as source:
        return [(e.data, e.event, e.id) for e in source]


def test_events_until_204():
    """Each event once, over two connections, the second with the last id."""
    first = body(Event("a", id=1), Event("b", event="x"), Event(id="é 2"))
    with RawServer([first, body(Event("c")), END]) as server:
        seen = read(server)
    assert seen == [("a", None, "1"), ("b", "x", "1"), ("c", None, "é 2")]
    ids = [r.headers.get("last-event-id") for r in server.requests]
    assert ids == [None, *["é 2".encode().decode("latin-1")] * 2]


def test_asks_as_an_event_source():
    """By the headers that the standard gives to the request; the caller's win."""
    with RawServer([END]) as server:
        assert read(server) == []
        assert read(server, headers={"accept": "a/b", "X-A": "1"}) == []
    first, second = server.requests
    assert (first.method, first.path) == ("GET", "/")
    assert first.headers["accept"] == "text/event-stream"
    assert first.headers["cache-control"] == "no-cache"
    assert second.headers["accept"] == "a/b"
    assert second.headers["x-a"] == "1"


@pytest.mark.parametrize(
    ("options", "sent", "kind"),
    [
        ({"data": b"abc"}, b"abc", None),
        ({"data": {"a": "1"}}, b"a=1", "application/x-www-form-urlencoded"),
        ({"json": {"a": 1}}, b'{"a": 1}', "application/json"),
    ],
    ids=["bytes", "form", "json"],
)
def test_a_body_is_sent_each_time(options, sent, kind):
    """The body of a POST comes with each attempt."""
    with RawServer([body(Event("a")), answer(500), END]) as server:
        assert len(read(server, method="POST", **options)) == 1
    assert [(r.method, r.body) for r in server.requests] == [("POST", sent)] * 3
    assert {r.headers.get("content-type") for r in server.requests} == {kind}


def test_a_given_id_is_sent_and_kept():
    """`last_event_id` resumes; only an id replaces it, and an empty one forgets it."""
    with RawServer([body(Event("a")), body(Event("b", id="")), END]) as server:
        assert read(server, last_event_id="7") == [("a", None, "7"), ("b", None, "")]
    ids = [r.headers.get("last-event-id") for r in server.requests]
    assert ids == ["7", "7", None]


def test_the_reconnection_time_is_told():
    """As `retry`, also one that comes without an event, and over connections."""
    seen = []
    wires = [body(Event(retry=1), Event("a")), body(Event("b"), Event(retry=2)), END]
    with RawServer(wires) as server, EventSource(server.url, backoff=FAST) as source:
        assert source.retry is None
        seen = [(event.data, source.retry) for event in source]
        assert source.retry == 2
    assert seen[0] == ("a", 1)
    assert seen[1][0] == "b"


@pytest.mark.parametrize("id", [" x", "x ", "\x0b", "\u3000", "\x01\x7f"], ids=ascii)
def test_any_id_can_be_sent(id):
    """Whatever an event stream can hold is sent as HTTP can carry it."""
    with RawServer([answer(body=f"id: {id}\ndata: a\n\n".encode()), END]) as server:
        assert read(server) == [("a", None, id)]
    sent = server.requests[1].headers["last-event-id"].encode("latin-1")
    assert sent.strip() == id.encode().strip()


def test_the_id_is_that_of_the_last_iterated_event():
    """Who stops between two events of one read resumes at the right one."""
    with (
        RawServer([body(Event(1, id=1), Event(2, id=2), Event(3, id=3))]) as server,
        EventSource(server.url) as source,
    ):
        assert next(source).data == "1"
        assert source.last_event_id == "1"
        for event in source:
            assert event.data == "2"
            break
        assert source.last_event_id == "2"
        assert [event.data for event, _ in zip(source, "3", strict=False)] == ["3"]


@pytest.mark.parametrize(
    ("wire", "status"),
    [
        (answer(404, b"data: a\n\n"), 404),
        (answer(400), 400),
        (answer(403), 403),
        (answer(429), 429),
        (answer(201, b"data: a\n\n"), 201),
        (answer(206, b"data: a\n\n"), 206),
        (answer(304, kind=""), 304),
        (answer(200, b"data: a\n\n", "text/html"), 200),
        (answer(200, b"data: a\n\n", "text/event-streams"), 200),
        (answer(200, b"data: a\n\n", ""), 200),
        (answer(302), 302),
        (answer(302, Location="/"), 302),
    ],
    ids=lambda value: value.decode()[9:70] if isinstance(value, bytes) else str(value),
)
def test_some_answers_are_final(wire, status):
    """They are not tried again, and the error has the status."""
    errors: list[ConnectError] = []
    with RawServer([wire]) as server:
        source = EventSource(server.url, on_error=errors.append)
        with pytest.raises(ConnectError) as caught:
            next(source)
        assert source.state == "closed"
        assert list(source) == []
    assert caught.value.status == status
    assert errors == []
    assert len(server.requests) == (1 if b"Location" not in wire else 31)


@pytest.mark.parametrize("kind", ["text/event-stream;charset=x", "Text/Event-Stream ;"])
def test_a_content_type_has_parameters(kind):
    """Only the type itself is compared, without regard to case."""
    with RawServer([answer(200, b"data: a\n\n", kind), END]) as server:
        assert read(server) == [("a", None, None)]


def test_errors_that_pass_are_told():
    """`on_error` hears of each; `on_open` of each stream."""
    said: list[Any] = []
    cut = answer(body=b"data: cut\n\n").replace(b"Length: 11", b"Length: 99")
    wires = [answer(503), b"", b"nonsense\r\n\r\n", cut, body(Event("a")), END]
    with RawServer(wires) as server:
        seen = read(
            server,
            on_error=lambda error: said.append(error.status or str(error)),
            on_open=lambda response: said.append(response.headers["Content-Type"]),
        )
    assert [data for data, *_ in seen] == ["cut", "a"]
    kind = "text/event-stream"
    assert [word for word in said if word == kind] == [kind] * 2
    said = [word for word in said if word != kind]
    assert said[0] == 503
    assert said[1].startswith("no response: ")
    assert said[2].startswith("no response: ")
    assert said[3].startswith("the response broke off: ")
    assert said[4] == "the server has ended the response"


def test_what_a_callback_raises_ends_the_source():
    """Whoever has tried often enough raises."""

    def give_up(error: ConnectError) -> None:
        raise error

    with RawServer([answer(500)]) as server:
        source = EventSource(server.url, on_error=give_up)
        with pytest.raises(ConnectError, match="the server answered 500"):
            next(source)
        assert source.state == "closed"
    assert len(server.requests) == 1


def test_close_in_a_callback():
    """Nothing is asked, and nothing waited for, after it."""
    with RawServer([body(Event("a"))]) as server:
        source = EventSource(server.url, on_error=lambda _: source.close())
        assert [event.data for event in source] == ["a"]
    assert len(server.requests) == 1


def test_states():
    """As the standard names them."""
    states: list[str] = []
    with RawServer([answer(500), body(Event("a")), END]) as server:
        source = EventSource(
            server.url,
            backoff=FAST,
            on_error=lambda _: states.append(source.state),
            on_open=lambda _: states.append(source.state),
        )
        states.append(source.state)
        for _ in source:
            states.append(source.state)
    states.append(source.state)
    assert states == [*["connecting"] * 2, *["open"] * 2, "connecting", "closed"]


def test_one_response():
    """``reconnect=False`` ends with the response, and raises what breaks it."""
    with RawServer([body(Event("a"))]) as server:
        assert read(server, reconnect=False) == [("a", None, None)]
        assert len(server.requests) == 1
    for wire in (answer(500), b"", answer(404)):
        with RawServer([wire]) as server, pytest.raises(ConnectError):
            read(server, reconnect=False)
        assert len(server.requests) == 1
    source = EventSource(server.url, reconnect=False)
    with pytest.raises(RuntimeError, match="reconnect=False"):
        source.reconnect()


def test_too_large_an_event_is_final():
    """The events before it are delivered; another attempt would bring it again."""
    wire = HEAD + b"data: a\n\ndata: " + b"x" * (4 << 20) + b"xxx\n\n"
    with RawServer([wire]) as server, EventSource(server.url) as source:
        assert next(source).data == "a"
        with pytest.raises(RemoteProtocolError):
            next(source)
        assert source.state == "closed"
    assert len(server.requests) == 1


def test_retry_is_honoured(monkeypatch):
    """It is the least that is waited; failures double it up to the longest wait."""
    waits: list[float] = []
    monkeypatch.setattr(EventSource, "_pause", lambda _, wait: waits.append(wait))
    retry = answer(body=b"retry: 4000\ndata: a\n\n")
    wires = [answer(500)] * 4 + [retry] + [answer(500)] * 4 + [END]
    with RawServer(wires) as server:
        read(server, backoff=(1.0, 5.0))
    ranges = [(1, 1.25), (1, 2), (2, 4), (2.5, 5), (4, 5), (4, 5), (4, 5), (4, 5)]
    assert len(waits) == 9
    for wait, (low, high) in zip(waits, ranges, strict=False):
        assert low <= wait <= high


def test_a_session_is_used():
    """Its headers, cookies and authentication; it may be changed in between."""
    with requests.Session() as session:
        session.headers["X-A"] = "1"
        session.cookies.set("b", "2")
        session.auth = ("me", "secret")
        first = answer(body=b"data: a\n\n", Set_Cookie="c=3")
        with RawServer([first, END]) as server:
            read(server, session=session, on_open=lambda _: session.headers.clear())
        assert session.cookies["c"] == "3"
        with RawServer([END]) as other:
            assert session.get(other.url).status_code == 204  # it is not closed
    one, two = server.requests
    assert one.headers["x-a"] == "1"
    assert one.headers["authorization"].startswith("Basic ")
    assert "x-a" not in two.headers
    assert {*two.headers["cookie"].split("; ")} == {"b=2", "c=3"}


class OwnSession(requests.Session):
    """A session of a class of its own."""


class OwnAdapter(requests.adapters.HTTPAdapter):
    """An adapter of a class of its own."""


def test_other_sessions_are_used_as_they_are():
    """Also adapters of other classes."""
    for session in (OwnSession(), requests.Session()):
        with session, RawServer([body(Event("a", id=1)), END]) as server:
            session.mount("http://", OwnAdapter())
            assert read(server, session=session) == [("a", None, "1")]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"data": "x"}, ValueError, 'data needs method="POST"'),
        ({"json": {}, "method": "get"}, ValueError, 'json needs method="POST"'),
        ({"json": 1, "data": "x", "method": "POST"}, ValueError, "both"),
        ({"data": iter([b"x"]), "method": "POST"}, TypeError, "sent again"),
        ({"method": 1}, TypeError, "method must be a str"),
        ({"headers": {"last-event-ID": "1"}}, ValueError, "pass last_event_id="),
        ({"last_event_id": 1}, TypeError, "last_event_id must be a str"),
        ({"last_event_id": "a\nb"}, ValueError, "last_event_id must not contain"),
        ({"read_timeout": 0}, ValueError, "read_timeout must be positive"),
        ({"read_timeout": "1"}, TypeError, "read_timeout must be a number"),
        ({"backoff": 1}, TypeError, "backoff must be"),
        ({"backoff": (2, 1)}, ValueError, "backoff must be"),
        ({"backoff": (0, 1)}, ValueError, "a wait of backoff must be positive"),
        ({"url": "example.com"}, ValueError, "url must begin with http"),
        ({"url": b"http://a"}, TypeError, "url must be a str"),
    ],
)
def test_wrong_arguments(options, error, words):
    """They are refused at once, with the argument's name."""
    with pytest.raises(error, match=words):
        EventSource(**{"url": "http://127.0.0.1", **options})


def test_a_url_is_not_in_an_error():
    """It may hold a token."""
    with pytest.raises(ValueError, match="url must begin") as caught:
        EventSource("htps://a/?token=secret")
    assert "secret" not in str(caught.value)
    with RawServer([answer(404)]) as server:
        source = EventSource(server.url + "?token=secret")
        with pytest.raises(ConnectError) as refused:
            next(source)
    assert "secret" not in str(refused.value)
    with pytest.raises(ConnectError) as refused:
        next(EventSource(server.url + "?token=secret", reconnect=False))
    assert "secret" not in str(refused.value)


def test_without_requests():
    """The module can be imported, its functions work, and the error says the cure."""
    code = """
import sys
import syncstream.client
assert "requests" not in sys.modules
sys.modules["requests"] = None
assert [e.data for e in syncstream.client.events([b"data: a", b"\\n\\n"])] == ["a"]
try:
    syncstream.client.EventSource("http://127.0.0.1")
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout == (
        "EventSource needs the package requests,"
        " run pip install 'syncstream-wsgi[client]'\n"
    ), done.stderr


def test_an_event_comes_when_it_is_sent():
    """No buffer must fill first, chunked or not, compressed or not."""
    going = threading.Semaphore(0)

    def serve(request, sock):
        chunked = request.path == "/chunked"
        head = HEAD[:-2] + b"Transfer-Encoding: chunked\r\n" * chunked + b"\r\n"
        sock.sendall(head)
        for number in range(3):
            wire = b"data: %d\n\n" % number
            sock.sendall(b"%x\r\n%b\r\n" % (len(wire), wire) if chunked else wire)
            assert going.acquire(timeout=15)

    with RawServer(serve) as server:
        for path in ("plain", "chunked"):
            with EventSource(server.url + path) as source:
                for number in range(3):
                    assert next(source).data == str(number)
                    going.release()


def test_a_head_that_breaks_off_is_no_answer():
    """It is tried again, wherever it ends: also after the status of a refusal."""
    whole = answer(404, b"x")
    for head in (whole, body(Event("a"))):
        size = head.index(b"\r\n\r\n") + 4
        for end in range(0, size, 5):
            with RawServer([head[:end], END]) as server:
                assert read(server) == []
                assert len(server.requests) == 2
