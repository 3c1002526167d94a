"""A stream's parts, each by itself: answers, ends, output, places, links."""

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from types import FunctionType, SimpleNamespace

import pytest
import werkzeug
import werkzeug.exceptions
from django import http as django_http
from django.core import exceptions as django_exceptions

from syncstream.protocol import raw, sse
from syncstream.runtime.process import stats
from syncstream.streams.answers import Returned, checked_return, is_answer, status_of
from syncstream.streams.capacity import Capacity
from syncstream.streams.contract import Format, Life, is_feed
from syncstream.streams.ends import End, come_back
from syncstream.streams.iteration import LOOK_EVERY, Failure
from syncstream.streams.links import Link, place_of, unblock
from syncstream.streams.outcome import Once, Outcome
from syncstream.streams.output import PIECE, Output
from syncstream.streams.source import Source, check_source
from tests.support.pairs import Browser, Line, Threads, serve, stream_of, tcp_pair
from tests.support.waits import TIMEOUT, await_true

pytestmark = pytest.mark.usefixtures("own_record")

PLACE = Threads()
EVENTS = Format(sse.encoder(), sse.ends_blank, is_events=True)
RAW = Format(raw.encode, lambda tail: False)


# Answers.


@pytest.mark.parametrize(
    ("value", "is_returned"),
    [
        (("body", 200), True),
        (("body", 100), True),
        (("body", 599), True),
        (("body", 99), False),
        (("body", 600), False),
        (("body", 404, {}), True),
        (("body",), False),
        (("body", 404, {}, None), False),
        (["body", 404], False),
        (("body", "404"), False),
        (404, False),
        (None, False),
        (werkzeug.Response("secret", 402), True),
    ],
    ids=repr,
)
def test_what_a_generator_should_not_return(value, is_returned):
    """A response, or Flask's tuple of one; what it holds is not shown."""
    returned = checked_return(value)
    assert isinstance(returned, Returned) is is_returned
    if is_returned:
        status = value[1] if isinstance(value, tuple) else 402
        assert f"a {type(value).__name__} of status {status}" in str(returned)
        assert "secret" not in str(returned)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError(), 500),
        (werkzeug.exceptions.NotFound(), 404),
        (werkzeug.exceptions.BadGateway(), 502),
        (werkzeug.exceptions.HTTPException(), 500),
        (django_http.Http404(), 404),
        (django_exceptions.PermissionDenied(), 403),
        (django_exceptions.SuspiciousOperation(), 400),
        (django_exceptions.DisallowedHost(), 400),  # one of those
        (django_exceptions.BadRequest(), 400),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_status_that_an_error_asks_for(error, status):
    """A framework's own; 500 for all others."""
    assert status_of(error) == status
    assert is_answer(error) is (type(error) is not ValueError)


@pytest.mark.parametrize(
    ("code", "status"), [(399, 500), (400, 400), (599, 599), (600, 500), ("404", 500)]
)
def test_statuses_of_errors(code, status):
    """Those from 400 to 599."""
    error = werkzeug.exceptions.HTTPException()
    error.code = code
    assert status_of(error) == status


# Ends.


@pytest.mark.parametrize(
    ("reason", "least"),
    [
        ("shutdown", 1000),
        ("max_duration", 1000),
        ("refused", 2000),
        ("denied", 5000),
        ("kicked", 5000),
        ("error", 5000),
        ("finished", None),
        ("closed", None),
        ("disconnected", None),
    ],
)
def test_when_clients_come_back(monkeypatch, reason, least):
    """From the least time to three times that; no sooner than the application says."""
    if least is None:
        assert come_back(reason, 9000) == b""
        return
    for factor in (1, 3):
        seen = []
        monkeypatch.setattr(
            "random.uniform",
            lambda a, b, factor=factor, seen=seen: seen.append((a, b)) or factor,
        )
        assert come_back(reason, 0) == b"retry: %d\n\n" % (factor * least)
        assert come_back(reason, 9000) == b"retry: %d\n\n" % (factor * 9000)
        assert seen == [(1, 3)] * 2


def test_a_word_is_set_once():
    """The first, with its time."""
    once, before = Once(), time.monotonic()
    assert (once.word, once.at, bool(once)) == (None, 0.0, False)
    assert once.set("a") is True
    assert once.set("a") is False
    assert once.set("b") is False
    assert (once.word, bool(once)) == ("a", True)
    assert before <= once.at <= time.monotonic()


def test_an_outcome_is_decided_once():
    """And says whether its client has gone."""
    for reason, is_gone in (
        ("finished", False),
        ("disconnected", True),
        ("send_timeout", True),
        ("kicked", False),
    ):
        outcome = Outcome()
        assert (outcome.reason, outcome.is_closing) == (None, False)
        assert not outcome.is_gone
        assert outcome.decide(reason) is True
        assert outcome.decide("closed") is False
        assert outcome.reason == reason
        assert outcome.is_gone is is_gone
        assert isinstance(outcome.error(), GeneratorExit)


def test_a_failure_is_taken_once():
    """Whoever takes it has it."""
    error = ValueError()
    failure = Failure(error)
    assert failure.is_there
    assert failure.take() is error
    assert not failure.is_there


# Options.


def test_the_durations_that_nobody_has_set():
    """15 s of silence, 30 s for a client that takes nothing, no end."""
    assert Life() == Life(15.0, 30.0, None, None)
    assert [Life(drain=n).drain for n in (0, 0.0, 0.001)] == [0, 0.0, 0.001]
    with pytest.raises(ValueError, match="drain must be 0 seconds or more, or None"):
        Life(drain=-0.001)
    with pytest.raises(ValueError, match="keepalive must be above 0 seconds, or None"):
        Life(keepalive=0)


def test_what_a_source_is():
    """Text, and what has not been called, is told from what can be iterated."""
    for fine in ([], (), iter(()), (x for x in "a"), range(3), {1}):
        check_source(fine)
    for wrong, problem in (
        ("a", "a single item"),
        (b"a", "a single item"),
        ({"a": 1}, "a single item"),
        (sse.Event("a"), "a single item"),
        (list, "has not been called"),
        (print, "has not been called"),
        (5, "cannot be iterated"),
        (None, "cannot be iterated"),
    ):
        with pytest.raises(TypeError, match=problem):
            check_source(wrong)
    source = Source([1])
    assert source.to_close == [[1]]
    iterator = source.iterate(source.given)
    assert source.to_close == [[1], iterator]
    generator = (x for x in "a")
    source = Source(generator)
    assert source.iterate(generator) is generator
    assert source.to_close == [generator]
    assert not is_feed(generator)
    source.forget()
    assert source.given is source.feed is None


# Output.


def output_of(line=None, *, format=EVENTS, retry=None, end="stop", **options):
    output = Output(format, retry, End(stops=end == "stop"))
    if line is not None:
        options = {"is_encoded": False, "written": b"", **options}
        output.connect(line, **options)
    return output


def test_the_bytes_of_large_chunks():
    """In pieces of the size that is asked for, each counted as it goes."""
    output, data = output_of(), bytes(range(256)) * 1000
    sizes = []
    pieces = []
    for piece in output.pieces(data, 100_000):
        pieces.append(piece)
        sizes.append(output.bytes)
    assert b"".join(pieces) == data
    assert sizes == [100_000, 200_000, 256_000]
    assert [*map(len, output_of().pieces(b"ab", 1))] == [1, 1]
    assert PIECE == 65536


@pytest.mark.parametrize(("size", "count"), [(65536, 1), (65537, 2)])
def test_a_chunk_is_cut_beyond_a_piece(size, count):
    """Not at its very size."""
    one, other = socket.socketpair()
    with one, other:
        stream = stream_of([b"x" * size], Line(one))
        assert len(serve(stream)) == 1 + count  # the opening comes first


@pytest.mark.parametrize(
    ("reason", "is_browser", "end", "expected"),
    [
        ("finished", True, "stop", b"id: syncstream-end\n\n"),
        ("finished", True, "reconnect", b""),
        ("finished", False, "stop", b""),
        ("closed", True, "stop", b""),
        ("kicked", True, "stop", b"retry: 5000\n\n"),
        ("kicked", False, "stop", b""),
    ],
)
def test_the_last_bytes(monkeypatch, reason, is_browser, end, expected):
    """Only between two events, and never of a response that was encoded."""
    monkeypatch.setattr("random.uniform", lambda least, most: least)
    line = Browser()
    line.is_event_source = is_browser
    output = output_of(line, end=end)
    assert output.last_block(reason) == expected
    output.tail = b"data: a\n"
    assert output.last_block(reason) == b""
    assert output_of(line, end=end, is_encoded=True).last_block(reason) == b""
    assert output_of(None, end=end).last_block("finished") == b""


def test_who_is_told_to_stay_away():
    """A browser whose answer of 204 is certain."""
    line = Browser()
    assert output_of(line).refusal() == b"id: syncstream-end\n\n"
    output = output_of(line, end="reconnect")
    assert output.refusal() == b""  # nobody would answer 204
    for id, is_over in (
        (None, False),
        ("5", False),
        ("syncstream-end", False),
        ("syncstream-refused", True),
    ):
        line.last_event_id = id
        assert output.ask_if_over(line) is is_over
        assert output_of(line).ask_if_over(line) is (is_over or id == sse.END_ID)
    assert output.refusal() == b"id: syncstream-refused\n\n"
    line.is_event_source = False
    assert output.refusal() == b""


def test_whether_a_byte_is_out():
    """An event stream's opening leaves first; of others nothing has, at the start."""
    assert output_of().is_out
    output = output_of(format=RAW)
    assert not output.is_out
    for name, value in (("tail", b"a"), ("bytes", 1), ("events", 1)):
        output = output_of(format=RAW)
        setattr(output, name, value)
        assert output.is_out


def test_what_was_written_before():
    """By the application itself: then no opening comes."""
    output = output_of(Line(), written=b"data: a\n\n")
    assert (output.opening, output.tail) == (None, b"data: a\n\n")
    assert output.is_whole
    output = output_of(Line(), written=b"data: a\n")
    assert not output.is_whole
    output = output_of(Line(), is_encoded=True)
    assert output.opening is None
    assert not output.format.is_events
    assert output.is_event_stream
    assert output_of(Line(), format=RAW).opening is None


def test_the_reconnection_time_goes_with_the_opening():
    """To browsers; 0 is a time, too."""
    line = Browser()
    assert output_of(line, retry=0).opening == b": ok\nretry: 0\n\n"
    assert output_of(line, retry=None).opening == b": ok\n"
    line.is_event_source = False
    assert output_of(line, retry=5).opening == b": ok\n"
    assert output_of(line, retry=5).retry == 5
    assert output_of(Line(), retry=None).retry == 0


@pytest.mark.parametrize("reason", ["denied", "kicked", "shutdown", "max_duration"])
def test_an_answer_before_the_first_byte(reason):
    """A status of its own, if no byte has left."""
    line, answers = Line(), []
    line.answer = lambda error, status, body: answers.append((status, body)) or b"x"
    output = output_of(line, format=RAW)
    assert output.answer_unsent(reason) == b"x"
    assert answers == [(403 if reason in ("denied", "kicked") else 503, b"")]
    line.answer = lambda *words: None
    assert output.answer_unsent(reason) == b""
    output.bytes = 1
    line.answer = lambda *words: b"x"
    assert output.answer_unsent(reason) == b""
    assert output_of(format=RAW).answer_unsent(reason) == b""


def test_lines_that_nobody_reads_are_not_made(caplog, monkeypatch):
    """At a level that is off; the label of a stream without a connection is plain."""
    output = output_of()
    assert output.label == "a stream"
    assert output_of(Line()).label == "GET '/test'"
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(Output, "label", property(lambda self: pytest.fail("made")))
    output.report(logging.DEBUG, "%s")
    output.say(logging.DEBUG, "%s")
    assert caplog.messages == []


# The body.


def test_how_often_a_busy_source_looks(monkeypatch):
    """Ten times a second, whatever it yields."""
    now, looks = [100.0], []

    def monotonic():
        now[0] += 0.03
        return now[0]

    clock = SimpleNamespace(monotonic=monotonic)
    monkeypatch.setattr("syncstream.streams.items.time", clock)
    line = Line()
    line.is_hung_up = lambda: looks.append(round(now[0] - 100, 2))
    stream = stream_of(iter(["a"] * 12), line)
    serve(stream)
    assert looks[:3] == [0.03, 0.15, 0.27]
    assert LOOK_EVERY == 0.1
    assert stats()["ended"]["finished"]["events"] == 12


def test_a_stream_is_iterated_once():
    """Whoever asks again goes on with the same body, and gets nothing after it."""
    stream = stream_of(["a", "b"], Line())
    chunks = iter(stream)
    assert next(chunks) == b": ok\n\n"
    assert iter(stream) is chunks
    assert next(stream) == b"data: a\n\n"
    assert list(stream) == [b"data: b\n\n"]
    del chunks
    assert list(stream) == []
    stream.close()
    assert list(stream) == []
    dropped = stream_of(["a"], Line())
    next(iter(dropped))  # and the iterator is gone
    assert list(dropped) == []


# Places.


class Slow(list):
    """Those who wait, to which it takes a while to be added."""

    def __init__(self, left):
        super().__init__()
        self.adding, self.left = threading.Event(), left

    def append(self, waiter):
        self.adding.set()
        self.left.wait(0.1)
        super().append(waiter)


def test_a_thread_that_is_freed_while_one_begins_to_wait(monkeypatch):
    """Is not missed: it would wait in vain."""
    monkeypatch.setattr("syncstream.streams.capacity.MOMENT", TIMEOUT)
    places = Capacity(None, 1, None, None)
    held, left = places.admit({}, lambda: 2, leaves=True), threading.Event()
    places.waiters = waiters = Slow(left)
    begin = time.monotonic()
    join = PLACE.start(lambda: places.admit({}, lambda: 2, leaves=True))
    assert waiters.adding.wait(TIMEOUT)
    held.leave_thread()
    left.set()
    assert join() is not None
    assert time.monotonic() - begin < TIMEOUT / 2


class Counts(dict):
    """Counts whose reading takes a while."""

    def get(self, key, default=None):
        count = super().get(key, default)
        time.sleep(0.05)
        return count

    def __getitem__(self, key):
        count = super().__getitem__(key)
        time.sleep(0.05)
        return count


def test_two_that_come_and_go_at_once():
    """One place for a key is one; and it is free again afterwards."""
    places = Capacity(None, None, lambda environ: "key", 1)
    places.counts = Counts()
    joins = [PLACE.start(lambda: places.admit({}, lambda: None)) for _ in range(4)]
    taken = [join() for join in joins]
    assert sum(place is not None for place in taken) == 1
    assert places.count == places.threads == 1
    places = Capacity(None, None, lambda environ: "key", 4)
    places.counts = Counts()
    taken = [places.admit({}, lambda: None) for _ in range(4)]
    for join in [PLACE.start(place.release) for place in taken]:
        join()
    assert (places.count, places.threads, places.counts) == (0, 0, {})


class Number(int):
    """A number that takes a while to change."""

    def _changed(self, by):
        time.sleep(0.02)
        return Number(int(self) + by)

    def __add__(self, other):
        return self._changed(other)

    def __sub__(self, other):
        return self._changed(-other)


def test_threads_are_counted_one_at_a_time():
    """Also those that are about to be left."""
    places = Capacity(None, 1, None, None)
    taken = [places.admit({}, lambda: 9, leaves=True) for _ in range(4)]
    places.count, places.threads, places.leaving = Number(4), Number(4), Number(4)
    for join in [PLACE.start(place.leave_thread) for place in taken]:
        join()
    assert (places.count, places.threads, places.leaving) == (4, 0, 0)
    for join in [PLACE.start(place.release) for place in taken]:
        join()
    assert (places.count, places.threads, places.leaving) == (0, 0, 0)


@pytest.mark.parametrize(
    ("key", "environ", "is_limited"),
    [
        ("a", {}, True),
        (0, {}, True),
        (("a",), {}, True),
        ("", {}, False),
        (b"", {}, False),
        ((), {}, False),
        (None, {}, None),
        ("localhost", {"REMOTE_ADDR": "localhost"}, False),
        ("<local>", {"REMOTE_ADDR": "<local>"}, False),
        ("localhost", {"REMOTE_ADDR": "::1"}, True),
        ("<local>", {}, True),
    ],
)
def test_keys_that_limit(key, environ, is_limited):
    """An address that all clients share limits none of them, and is said."""
    said = []
    places = Capacity(None, None, lambda environ: key, 1, said.append)
    assert places.admit(environ, lambda: None) is not None
    assert (places.admit(environ, lambda: None) is None) is (is_limited is True)
    assert len(said) == 2 * (is_limited is False)


@pytest.mark.parametrize(
    ("environ", "is_said"),
    [
        ({"REMOTE_ADDR": "10.0.0.1"}, False),
        ({"REMOTE_ADDR": "10.0.0.1", "HTTP_X_REAL_IP": "1.2.3.4"}, True),
        ({"REMOTE_ADDR": "10.0.0.2", "HTTP_X_REAL_IP": "1.2.3.4"}, False),
        ({"REMOTE_ADDR": "10.0.0.1", "HTTP_X_REAL_IP": "10.0.0.1"}, False),
        ({"REMOTE_ADDR": "10.0.0.1", "HTTP_FORWARDED": 'for="[10.0.0.1]"'}, False),
        (
            {"REMOTE_ADDR": "10.0.0.1", "HTTP_X_FORWARDED_FOR": "1.2.3.4, 10.0.0.9"},
            True,
        ),
    ],
)
def test_a_refused_key_that_is_a_proxys(environ, is_said):
    """Is said when it refuses somebody."""
    said = []
    places = Capacity(None, None, lambda environ: "10.0.0.1", 1, said.append)
    assert places.admit(environ, lambda: None) is not None
    assert said == []
    assert places.admit(environ, lambda: None) is None
    assert len(said) == is_said


@pytest.mark.parametrize("limit", [1, 2])
def test_limits_are_exact(limit):
    """So many and no more; a thread more than are reserved is one place."""
    places = Capacity(limit, None, None, None)
    taken = [places.admit({}, lambda: None) for _ in range(limit)]
    assert None not in taken
    assert places.admit({}, lambda: None) is None
    reserved = Capacity(None, limit, None, None)
    assert reserved.admit({}, lambda: limit) is None
    assert reserved.admit({}, lambda: limit + 1) is not None
    assert reserved.admit({}, lambda: limit + 1) is None
    assert reserved.admit({}, lambda: 0) is None


# Links.


def test_what_is_no_process_is_closed():
    """From another thread, once, and by its own at the end."""
    closes, go_on = [], threading.Event()

    class Slow:
        def close(self):
            closes.append(threading.get_ident())
            go_on.wait(TIMEOUT)

    link = Link(Slow())
    assert link.thread_id == threading.get_ident()
    for _ in range(3):
        link.unblock()
    await_true(lambda: closes)
    go_on.set()
    link.close()
    assert closes[-1] == threading.get_ident() != closes[0]
    assert len(closes) == 2


def test_what_is_cancelled_is_cancelled_again():
    """As long as it goes on; not while a cancel is under way."""
    cancels, go_on = [], threading.Event()

    class Connection:
        def cancel(self):
            cancels.append(1)
            go_on.wait(TIMEOUT)

        def close(self):
            """Nothing is held."""

    link = Link(Connection())
    link.unblock()
    await_true(lambda: cancels)
    link.unblock()
    link.unblock()
    assert len(cancels) == 1
    go_on.set()
    await_true(
        lambda: not any(t.name == "syncstream-link" for t in threading.enumerate())
    )
    link.unblock()
    await_true(lambda: len(cancels) == 2)


@pytest.mark.parametrize("depth", [1, 3, 4])
def test_a_connection_behind_others_is_cancelled(depth):
    """SQLAlchemy's result, its connection and the driver's: no further."""
    cancels = []
    target = SimpleNamespace(cancel=lambda: cancels.append(1), close=print)
    for _ in range(depth - 1):
        target = SimpleNamespace(connection=target, close=lambda: None)
    link = Link(target)
    link.unblock()
    if depth < 4:
        await_true(lambda: cancels)
    else:
        time.sleep(0.05)
        assert cancels == []


@pytest.mark.parametrize("is_waiting", [True, False])
@pytest.mark.parametrize("status", [0, 1, None])
def test_a_connection_that_runs_a_query_is_not_shut(status, is_waiting):
    """It is cancelled; nor is that of a thread that waits elsewhere."""
    with tcp_pair() as (server, client):
        info = SimpleNamespace(transaction_status=status)
        target = SimpleNamespace(
            cancel=lambda: None, close=lambda: None, fileno=server.fileno, info=info
        )
        link = Link(target)
        client.settimeout(0.05)
        link.unblock(is_waiting=is_waiting)
        if status != 1 and not is_waiting:
            assert client.recv(1) == b""
            return
        with pytest.raises(TimeoutError):
            client.recv(1)


@pytest.mark.parametrize("depth", [0, 1, 7, 8])
def test_how_far_a_socket_is_looked_for(depth):
    """Seven attributes away, as in the openai SDK; not further."""
    with tcp_pair() as (server, client):
        target = SimpleNamespace(fileno=server.fileno, close=lambda: None)
        for n in range(depth):
            name = ("raw", "fp", "_sock")[n % 3]
            target = SimpleNamespace(**{name: target}, close=lambda: None)
        Link(target).unblock()
        client.settimeout(TIMEOUT if depth <= 7 else 0.05)
        if depth <= 7:
            assert client.recv(1) == b""
        else:
            with pytest.raises(TimeoutError):
                client.recv(1)


@pytest.mark.parametrize(("count", "is_found"), [(998, True), (999, False)])
def test_how_many_objects_are_looked_at(count, is_found):
    """A thousand, of which one leads to the socket: a mock has every attribute."""
    with tcp_pair() as (server, client):
        holder = SimpleNamespace(sock=SimpleNamespace(fileno=server.fileno))
        others = [SimpleNamespace() for _ in range(count - 1)]
        target = SimpleNamespace(connections=[*others, holder], close=lambda: None)
        Link(target).unblock()
        client.settimeout(TIMEOUT if is_found else 0.05)
        if is_found:
            assert client.recv(1) == b""
        else:
            with pytest.raises(TimeoutError):
                client.recv(1)


def test_a_retry_of_redis_is_off_for_the_read():
    """And as it was when the connection goes back to its pool."""
    numbers = [3]
    retry = SimpleNamespace(
        get_retries=lambda: numbers[-1], update_retries=numbers.append
    )
    with tcp_pair() as (server, _):
        holder = SimpleNamespace(
            _sock=server, retry=retry, close=lambda: numbers.append("closed")
        )
        link = Link(holder)
        link.unblock()
        link.unblock()
        link.close()
    assert numbers == [3, 0, 0, 3, "closed"]


def test_a_process_that_ignores_sigterm_is_killed(monkeypatch):
    """Two seconds after it was asked; its pipes are closed, and no zombie stays."""
    monkeypatch.setattr("syncstream.streams.links.KILL_AFTER", 0.1)
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        " print(1, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    )
    assert process.stdout.readline() == b"1\n"
    link = Link(process)
    link.unblock()
    assert process.poll() is None
    time.sleep(0.1)
    link.unblock()
    assert process.wait(TIMEOUT) == -9
    link.close()
    link.close()
    assert process.stdout.closed
    assert process.stdin.closed


def test_a_link_that_fails_keeps_no_other():
    """From being unblocked."""
    seen = []
    links = [
        SimpleNamespace(unblock=lambda is_there, is_waiting: 1 / 0),
        SimpleNamespace(unblock=lambda *words, **names: seen.append((words, names))),
    ]
    unblock(links, is_there := lambda: True, is_waiting=True)
    assert seen == [((is_there,), {"is_waiting": True})]


def test_the_place_of_a_generator():
    """It differs from statement to statement, not while one runs."""
    places, closable = [], SimpleNamespace(close=lambda: None)

    def source():
        link = Link(closable)
        for _ in range(2):
            places.append(place_of([link, link]))
        places.append(place_of([link]))
        yield

    list(source())
    assert places[0] == places[1] != places[2]
    assert len(places[0]) == 1
    assert place_of([]) == ()


class Client:
    """A linked object that waits in a handler of its own, too."""

    def __init__(self, look):
        self.look = look

    def read(self):
        self.look("reads")
        try:
            raise OSError
        except OSError:
            self.look("connects again")
        raise ValueError("MARK")

    def close(self):
        pass


# As if it were of a package of its own.
Client.__module__ = "package.client"
Client.read = FunctionType(Client.read.__code__, {"__name__": "package.connection"})


def test_the_place_of_a_function_that_cleans_up():
    """Its ``finally`` is another one; a handler of the linked object's is not."""
    places = []
    client = Client(lambda name: places.append((name, place_of([link]))))
    link = Link(client)

    def function():
        try:
            client.read()
        finally:
            client.read()

    def source():
        with pytest.raises(ValueError, match="MARK"):
            function()
        yield

    list(source())
    (_, reads), (_, connects_again), (_, cleans_up), (name, last) = places
    assert name == "connects again"
    assert reads == connects_again != cleans_up == last


@pytest.mark.parametrize(
    ("fd", "is_refused"), [("file", False), ("folder", False), ("pipe", True)]
)
def test_what_a_read_waits_for(tmp_path, fd, is_refused):
    """A file's does not; a pipe's does, and its close ends none."""
    (tmp_path / "file").touch()
    reader, writer = os.pipe()
    fds = {
        "file": os.open(tmp_path / "file", os.O_RDONLY),
        "folder": os.open(tmp_path, os.O_RDONLY),
        "pipe": reader,
    }
    closable = SimpleNamespace(read=None, close=lambda: None, fileno=lambda: fds[fd])
    try:
        if is_refused:
            with pytest.raises(TypeError, match="not be a pipe"):
                Link(closable)
        else:
            assert Link(closable).closable is closable
    finally:
        for each in (*fds.values(), writer):
            os.close(each)
