"""The watch's side of one stream, by a clock of our own: what is due when."""

import gc
import logging
import math
import os
import random
import socket
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from syncstream.protocol import raw, sse
from syncstream.runtime.journal import journal
from syncstream.runtime.process import process
from syncstream.streams import monitor as monitor_module
from syncstream.streams.contract import Format, Life
from syncstream.streams.ends import CUT, REASONS, End
from syncstream.streams.keepalive import Keepalive
from syncstream.streams.monitor import Monitor, jittered
from syncstream.streams.outcome import Outcome
from syncstream.streams.output import PIECE, Output
from syncstream.streams.send_timeout import SendTimeout, progress_of
from syncstream.streams.source import Source
from tests.support.pairs import Line, leave, stream_of, tcp_pair

pytestmark = pytest.mark.usefixtures("own_record")

EVENTS = Format(sse.encoder(), sse.ends_blank, is_events=True)
RAW = Format(raw.encode, lambda tail: False)
NOW = 1000.0
NEVER = Life(None, None, None, None)


class Clock:
    """A watch whose time is ours; what it is to run is run at once."""

    is_foreign = False

    def __init__(self):
        self.lock = threading.RLock()
        self.given = []  # to be called later
        self.later = self.given.append
        self.now = self.ran_at = NOW
        self.timers = {}
        self.watched = {}
        self.ran = []

    def monotonic(self):
        return self.now

    def call_at(self, when, callback):
        timer = object()
        self.timers[timer] = (when, callback)
        return timer

    def cancel(self, timer):
        self.timers.pop(timer, None)

    def add(self, fd, callback):
        self.watched[fd] = callback

    def remove(self, fd, callback):
        assert self.watched.pop(fd) is callback

    def run(self, callback):
        callback()

    def spawn(self, callback):
        self.ran.append(callback)
        callback()

    def next(self):
        """When something is due next, from the beginning; None for never."""
        times = [when for when, _ in self.timers.values()]
        return round(min(times) - NOW, 6) if times else None

    def to(self, seconds):
        """Let it be so many seconds after the beginning, and call what is due."""
        self.now = NOW + seconds
        for timer, (when, callback) in list(self.timers.items()):
            if when <= self.now + 1e-9 and timer in self.timers:
                del self.timers[timer]
                again = callback()
                if again is not None:
                    self.timers[timer] = (again, callback)


@pytest.fixture
def clock(monkeypatch):
    own = Clock()
    for name in ("monitor", "keepalive", "outcome"):
        monkeypatch.setattr(f"syncstream.streams.{name}.time", own)
    monkeypatch.setattr("syncstream.streams.monitor.watch", lambda: own)
    monkeypatch.setattr(random, "uniform", lambda least, most: most)
    return own


class Client(Line):
    """A connection whose answers are ours to choose."""

    def __init__(self, sock=None):
        super().__init__(sock)
        self.written, self.cuts = [], []
        self.full = self.is_gone = False
        self.kept = 0

    def write(self, data):
        self.written.append(data)

    def is_full(self):
        return self.full

    def is_hung_up(self):
        return self.is_gone

    def unsent(self):
        return self.kept

    def drop(self):
        self.cuts.append(1)


class Watched:
    """A stream's parts, watched; `scope` says whether its source runs."""

    def __init__(self, line, life=NEVER, *, format=EVENTS, source=(), begin=True):
        self.scope = SimpleNamespace(
            is_running=True,
            has_waited=False,
            was_told=False,
            thread_wait=None,
            shut_down=None,
        )
        self.line, self.outcome = line, Outcome()
        self.output = Output(format, None, End(stops=True))
        self.output.connect(line, is_encoded=False, written=b"")
        self.source = Source(source)
        self.monitor = Monitor(
            lambda: self.scope, self.outcome, self.output, self.source, life
        )
        self.stream = Stream()
        if begin:
            self.monitor.begin(self.stream)

    @property
    def reason(self):
        return self.outcome.reason


class Stream:
    def shut_down(self, since, until):
        """The process may call it."""


@pytest.fixture
def server():
    with tcp_pair() as (server, _):
        yield server


@pytest.mark.parametrize(
    ("life", "expected"),
    [
        (NEVER, None),
        (Life(None, None, 60.0), 60.0),
        (Life(8.0, None, 60.0), 8.0),
        (Life(90.0, None, 60.0), 60.0),
        (Life(None, 30.0, None), 7.5),
        (Life(None, 30.0, 7.0), 7.0),
        (Life(7.0, 30.0, None), 7.0),
        (Life(15, 30, 60), 7.5),
    ],
    ids=str,
)
def test_what_is_due_first(clock, server, life, expected):
    """The earliest of a stream's times; without any there is no timer."""
    watched = Watched(Client(server), life)
    assert clock.next() == expected
    assert list(clock.watched) == [server.fileno()]
    assert watched.monitor.is_watching
    assert (watched.monitor.began, watched.output.moved) == (NOW, NOW)


@pytest.mark.parametrize(("life", "expected"), [(Life(5.0), 5.0), (NEVER, 0.1)])
def test_a_server_that_closes_early_is_looked_at(clock, server, life, expected):
    """Ten times a second; and its stream ends when it has closed."""
    line = Client(server)
    line.may_vanish = True
    watched = Watched(line, life)
    assert clock.next() == 0.1
    clock.to(0.1)
    assert (watched.reason, clock.next()) == (None, 0.2)
    line.sock = None
    clock.to(0.2)
    assert (watched.reason, watched.scope.is_running) == ("disconnected", True)


def test_who_is_about_to_leave_is_not_watched(clock, server):
    """Its descriptor is another's in a moment; it may be watched later."""
    watched = Watched(Client(server), Life(15, 30, 60), begin=False)
    watched.monitor.begin(watched.stream, "never")
    assert (clock.timers, clock.watched) == ({}, {})
    assert not watched.monitor.is_watching
    assert watched.monitor.deadline == NOW + 60
    assert process().open_streams == 1
    watched.monitor.observe()
    assert list(clock.watched) == [server.fileno()]
    assert clock.next() == 7.5
    watched.monitor.leave_connection()
    assert (clock.timers, clock.watched) == ({}, {})
    assert not watched.monitor.is_watching
    watched.monitor.leave_connection()


def test_a_descriptor_of_somebody_else_is_not_watched(clock, server):
    """Its server has closed it meanwhile: another connection may have the number."""
    line = Client(server)
    watched = Watched(line, Life(15, 30, 60), begin=False)
    watched.monitor.begin(watched.stream, "soon")
    line.sock = None
    watched.monitor.settle()
    assert clock.watched == {}
    assert clock.next() == 15.0


def test_a_hub_is_left_to_its_own_thread(clock, server):
    """Its loop is not to be touched by another: the watch does it, in the hub."""
    watched = Watched(Client(server), Life(15, 30, 60), begin=False)
    watched.monitor.begin(watched.stream, "soon")
    watched.monitor.in_hub = True
    thread = threading.Thread(target=watched.monitor.settle)
    thread.start()
    thread.join()
    assert (clock.timers, clock.watched) == ({}, {})
    watched.monitor.settle()
    assert list(clock.watched) == [server.fileno()]


def test_an_end_before_it_is_watched_has_one_timer(clock, server):
    """That of the end, which looks whether the source has heard."""
    watched = Watched(Client(server), Life(15, 30, 60), begin=False)
    watched.monitor.begin(watched.stream, "soon")
    watched.monitor.in_hub = False
    watched.monitor.end("closed")
    watched.monitor.settle()
    assert len(clock.timers) <= 1


@pytest.mark.parametrize("is_waiting", [True, False])
def test_who_may_end_at_once_is_watched_later(clock, server, is_waiting):
    """From the source's first wait on, or when the watch calls; once."""
    watched = Watched(Client(server), Life(15, 30, 60), begin=False)
    watched.monitor.begin(watched.stream, "soon")
    assert (clock.timers, clock.watched) == ({}, {})
    assert not watched.monitor.is_watching
    (call,) = clock.given
    first, second = watched.monitor.settle, call
    if not is_waiting:
        first, second = second, first
    first()
    assert list(clock.watched) == [server.fileno()]
    assert (clock.next(), watched.monitor.is_watching) == (7.5, True)
    timers, told = dict(clock.timers), dict(clock.watched)
    second()
    assert (clock.timers, clock.watched) == (timers, told)
    watched.monitor.forget(watched.stream)
    assert (clock.timers, clock.watched) == ({}, {})


def test_who_has_ended_is_not_watched_any_more(clock, server):
    """The watch's call comes too late; or nobody is there for it."""
    watched = Watched(Client(server), Life(15, 30, 60), begin=False)
    watched.monitor.begin(watched.stream, "soon")
    watched.monitor.forget(watched.stream)
    (call,) = clock.given
    call()
    watched.monitor.settle()
    assert (clock.timers, clock.watched) == ({}, {})
    watched = None
    gc.collect()
    call()


@pytest.mark.parametrize(
    "life", [Life(0.99, 30, 60), Life(15, 0.99, 60), Life(15, 30, 0.99)]
)
def test_a_short_time_is_kept_from_the_first_step_on(clock, server, life):
    """It would be over, or almost, before the watch begins."""
    watched = Watched(Client(server), life, begin=False)
    watched.monitor.begin(watched.stream, "soon")
    assert list(clock.watched) == [server.fileno()]
    assert len(clock.timers) == 1
    assert clock.given == []


def test_what_has_ended_is_forgotten_once(clock, server):
    """By the clock, the watch and the process."""
    watched = Watched(Client(server), Life(15, 30, 60))
    watched.monitor.forget(watched.stream)
    watched.monitor.forget(watched.stream)
    assert (clock.timers, clock.watched) == ({}, {})
    assert process().open_streams == 0
    assert watched.monitor.watch is None
    assert watched.monitor.served is None
    watched.monitor.wake()  # nobody waits any more


def test_a_stream_that_cannot_begin_leaves_nothing(clock, server):
    """Neither watched, nor open."""
    line = Client(server)
    line.find_write = lambda: 1 / 0
    watched = Watched(line, Life(15, 30, 60), begin=False)
    with pytest.raises(ZeroDivisionError):
        watched.monitor.begin(watched.stream)
    assert (clock.timers, clock.watched) == ({}, {})
    line.find_write = lambda: None
    line.server_key = []  # that cannot be a key
    with pytest.raises(TypeError, match="unhashable"):
        watched.monitor.begin(watched.stream)
    assert (clock.timers, clock.watched) == ({}, {})
    assert watched.monitor.watch is None
    assert process().open_streams == 0


def test_a_keepalive_at_its_time(clock, server):
    """After the silence, not before; what is sent meanwhile puts it off."""
    watched = Watched(Client(server), Life(8.0, None))
    clock.to(7.99)
    assert clock.ran == []
    watched.output.moved = NOW + 3
    clock.to(8.0)
    assert (watched.line.written, clock.next()) == ([], 11.0)
    clock.to(11.0)
    assert watched.line.written == [b": keepalive\n\n"]
    assert watched.output.bytes == 13
    assert (watched.output.moved, clock.next()) == (NOW + 11, 19.0)
    watched.line.full = True
    clock.to(19.0)  # something is in its way: soon again
    assert (len(watched.line.written), clock.next()) == (1, 21.0)
    watched.line.full = False
    clock.to(21.0)
    assert len(watched.line.written) == 2
    watched.outcome.decide("closed")
    clock.to(29.0)
    assert len(clock.ran) == 3


@pytest.mark.parametrize(
    "obstacle",
    [
        None,
        "the source has gone",
        "the source does not run",
        "ended",
        "too early",
        "within an event",
        "no connection",
        "no write",
        "not received",
        "full",
        "hung up",
    ],
)
def test_what_is_in_a_keepalives_way(clock, obstacle):
    """Each by itself."""
    line, outcome, output = Client(), Outcome(), Output(EVENTS, None, End(stops=True))
    output.connect(line, is_encoded=False, written=b"data: a\n\n")
    output.moved = NOW
    scope = SimpleNamespace(is_running=True)
    keepalive = Keepalive(lambda: scope, outcome, output, 5.0)
    clock.now = NOW + 5
    match obstacle:
        case "the source has gone":
            scope = None
        case "the source does not run":
            scope.is_running = False
        case "ended":
            outcome.decide("closed")
        case "too early":
            clock.now = NOW + 4.99
        case "within an event":
            output.tail = b"data: a\n"
        case "no connection":
            output.connection = None
        case "no write":
            line.write = None
        case "not received":
            line.has_got = lambda size: size != 0
        case "full":
            line.full = True
        case "hung up":
            line.is_gone = True
    keepalive.write()
    assert len(line.written) == (obstacle is None)
    assert output.bytes == 13 * (obstacle is None)
    assert not keepalive.is_writing


def test_when_a_keepalive_is_due(clock):
    """From the silence on; never without one, nor where there are no comments."""
    output = Output(EVENTS, None, End(stops=True))
    output.moved = NOW
    keepalive = Keepalive(lambda: None, Outcome(), output, 8.0)
    assert not keepalive.is_due(NOW + 7.999)
    assert keepalive.is_due(NOW + 8)
    assert keepalive.next_time(NOW + 7.999) == NOW + 8
    assert keepalive.next_time(NOW + 8) == NOW + 10
    assert keepalive.next_time(NOW + 20) == NOW + 22
    for never in (
        Keepalive(lambda: None, Outcome(), output, None),
        Keepalive(lambda: None, Outcome(), Output(RAW, None, End(stops=True)), 8.0),
    ):
        assert not never.is_due(NOW + 100)
        assert never.next_time(NOW) is None


def test_a_keepalive_that_fails(clock, caplog):
    """Is logged for debugging; the next is written all the same."""
    caplog.set_level(logging.DEBUG)
    line, output = Client(), Output(EVENTS, None, End(stops=True))
    output.connect(line, is_encoded=False, written=b"")
    write, line.write = line.write, lambda data: 1 / 0
    scope = SimpleNamespace(is_running=True)
    keepalive = Keepalive(lambda: scope, Outcome(), output, 5.0)
    keepalive.write()
    assert not keepalive.is_writing
    assert output.bytes == 0
    assert journal().flush()
    [record] = caplog.records
    assert record.levelname == "DEBUG"
    assert record.message == "no keepalive for GET '/test'"
    line.write = write
    keepalive.write()
    assert len(line.written) == 1


def test_the_end_of_its_time(clock, server):
    """At the deadline, by the clock or by the body's own look."""
    by_clock, by_look = (Watched(Client(server), Life(None, None, 60.0)) for _ in "ab")
    clock.to(59.99)
    by_look.monitor.look(clock.now)
    assert by_clock.reason is by_look.reason is None
    by_look.monitor.look(NOW + 60)
    assert by_look.reason == "max_duration"
    clock.to(60.0)
    assert by_clock.reason == "max_duration"
    assert by_clock.outcome.at == NOW + 60


def test_the_jitter_of_a_time(monkeypatch):
    """Up to a tenth less, never more."""
    seen = []
    monkeypatch.setattr(random, "uniform", lambda a, b: seen.append((a, b)) or a)
    assert jittered(60.0) == 54.0
    assert seen == [(0.9, 1)]


def test_how_often_a_watched_stream_looks(clock, server):
    """Once a second; at every look if nobody watches it."""
    line, looks = Client(server), []
    line.is_hung_up = lambda: looks.append(clock.now)
    watched = Watched(line)
    for seconds in (0, 0.5, 0.999, 1.0, 1.5, 2.0):
        clock.now = NOW + seconds
        watched.monitor.look(clock.now)
    assert [at - NOW for at in looks] == [0, 1.0, 2.0]
    watched.monitor.leave_connection()
    for seconds in (2.1, 2.2):
        clock.now = NOW + seconds
        watched.monitor.look(clock.now)
    assert len(looks) == 5


@pytest.mark.parametrize("stops", [None, NOW + 2, -math.inf])
def test_a_look_sees_the_servers_stop(clock, server, stops):
    """And ends a stream whose time is over."""
    line = Client(server)
    line.stopping, line.is_event_source = (lambda: stops), False
    watched = Watched(line)
    for seconds, is_over in ((0, stops == -math.inf), (1.999, False), (2.0, True)):
        clock.now = NOW + seconds
        watched.monitor.leave_connection()  # or it looks once a second
        watched.monitor.look(clock.now)
        expected = "shutdown" if stops is not None and is_over else watched.reason
        assert watched.reason == expected
    assert watched.reason == (None if stops is None else "shutdown")


@pytest.mark.parametrize(
    ("drain", "is_browser", "is_feed", "until", "ends"),
    [
        (None, True, False, 10.0, 0.0),
        (None, False, False, 10.0, 10.0),
        (3.0, True, False, 10.0, 3.0),
        (3.0, False, False, 10.0, 3.0),
        (30.0, False, False, 10.0, 10.0),
        (0.0, False, False, 10.0, 0.0),
        (30.0, False, True, 10.0, 0.0),
    ],
)
def test_until_when_a_stream_goes_on(
    clock, server, drain, is_browser, is_feed, until, ends
):
    """While its server stops; exactly until then."""
    line = Client(server)
    line.is_event_source = is_browser
    watched = Watched(line, Life(None, None, None, drain))
    watched.source.feed = object() if is_feed else None
    if ends:
        clock.now = NOW + ends - 0.001
        watched.monitor.shut_down(NOW, NOW + until)
        assert watched.reason is None
    clock.now = NOW + ends
    watched.monitor.shut_down(NOW, NOW + until)
    assert watched.reason == "shutdown"


def test_a_source_that_has_not_noticed_its_end(clock, server, caplog):
    """Is named after 30 seconds, once, with its place."""

    def source():
        yield

    watched = Watched(Client(server), source=source())
    watched.monitor.end("kicked")
    for seconds in (1, 29.9, 30.9):
        clock.to(seconds)
        assert clock.next() == seconds + 1
        clock.to(seconds)
    assert journal().flush()
    assert len(caplog.records) == 1
    clock.to(40)
    assert journal().flush()
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert "has not yielded for 30 s since its stream has ended (kicked)" in (
        record.message
    )
    assert f"source ({__file__}:" in record.message


@pytest.mark.parametrize("seconds", [29.99, 30.0])
def test_not_before_30_seconds(clock, server, caplog, seconds):
    """It may be about to end."""
    watched = Watched(Client(server))
    watched.monitor.end("kicked")
    clock.to(seconds)
    assert journal().flush()
    assert len(caplog.records) == (seconds == 30)


@pytest.mark.parametrize("reason", sorted(CUT | REASONS))
@pytest.mark.parametrize("is_full", [True, False])
def test_a_write_that_blocks_after_the_end(clock, server, reason, is_full):
    """Is cut after a second, unless the application has chosen the end."""
    watched = Watched(Client(server))
    watched.scope.is_running = False
    watched.line.full = is_full
    watched.monitor.end(reason)
    clock.to(0.99)
    assert watched.line.cuts == []
    clock.to(1.0)
    assert bool(watched.line.cuts) == (is_full and reason in CUT)
    assert clock.next() == 2.0


def stops(watched, clock, seconds, until=1000.0):
    """Tell it of its server's stop at a time; return whether it was interrupted."""
    clock.now = NOW + seconds
    try:
        watched.monitor.shut_down(NOW, NOW + until)
        for _ in range(100_000):  # an exception of another thread's comes by now
            pass
    except GeneratorExit:
        return True
    return False


def alone(story):
    """Call it in a thread that starts no other one, and return when it has ended.

    Before Python 3.12 what is raised in a thread hits one that it has just started, if
    that has not run yet; and a garbage collection may start threads, in finalizers.
    """
    gc.disable()
    try:
        with ThreadPoolExecutor(1) as executor:
            executor.submit(story).result()
    finally:
        gc.enable()


def test_a_thread_that_ignores_its_end_is_interrupted(clock, server):
    """After a second, once; again every 2.5 seconds when the time is over."""

    def story():
        watched = Watched(Client(server), Life(None, None, None, 0.0))
        assert not stops(watched, clock, 0)
        assert watched.reason == "shutdown"
        assert not stops(watched, clock, 0.99)
        assert watched.monitor.thrown_at == 0
        assert stops(watched, clock, 1.0)
        assert watched.monitor.thrown_at == NOW + 1
        assert not stops(watched, clock, 100)  # it may clean up
        assert not stops(watched, clock, 3.49, until=3)
        assert stops(watched, clock, 3.5, until=3.5)
        assert not stops(watched, clock, 5.99, until=3)
        assert stops(watched, clock, 6.0, until=3)

    alone(story)


@pytest.mark.parametrize("why", ["waits", "closes", "in a hub", "not ended", "done"])
def test_who_is_not_interrupted(clock, server, why):
    """Who is told in another way, or has nothing to be told."""
    life = Life(None, None, None, None if why == "not ended" else 0.0)
    watched = Watched(Client(server), life)
    watched.line.is_event_source = why != "not ended"
    stops(watched, clock, 0)
    if why == "waits":
        watched.scope.thread_wait = SimpleNamespace(wake=lambda: True)
    if why == "closes":
        watched.outcome.is_closing = True
    watched.monitor.in_hub = why == "in a hub"
    watched.scope.is_running = why != "done"
    assert not stops(watched, clock, 10)
    assert watched.monitor.thrown_at == 0


@pytest.mark.parametrize(
    ("reason", "moment"), [("shutdown", 1.0), ("denied", 1.0), ("closed", 5.0)]
)
def test_a_client_that_takes_nothing_holds_no_server_up(clock, server, reason, moment):
    """It is cut; five seconds are for one whose stream the application has ended."""
    watched = Watched(Client(server))
    watched.scope.is_running = False
    watched.line.full, watched.line.is_event_source = True, False
    watched.monitor.end(reason)
    watched.line.cuts.clear()
    stops(watched, clock, 2)
    stops(watched, clock, 2 + moment - 0.01)
    assert watched.line.cuts == []
    stops(watched, clock, 2 + moment)
    assert watched.line.cuts == [1]


def test_a_client_that_takes_something_is_waited_for(clock, server):
    """Its five seconds begin anew, as they do when it has room or its source runs."""
    watched = Watched(Client(server))
    watched.scope.is_running = False
    watched.line.full, watched.line.is_event_source = True, False
    stops(watched, clock, 0)
    watched.line.kept -= 1  # one byte more has been accepted
    stops(watched, clock, 4.9)
    stops(watched, clock, 5.0)
    watched.line.full = False
    stops(watched, clock, 6)
    watched.line.full = True
    stops(watched, clock, 8)
    stops(watched, clock, 12.9)
    watched.scope.is_running = True
    stops(watched, clock, 12.95)
    watched.scope.is_running = False
    stops(watched, clock, 13)
    stops(watched, clock, 17.9)
    assert watched.line.cuts == []
    assert watched.reason is None
    stops(watched, clock, 18)
    assert watched.line.cuts == [1]
    assert watched.reason == "shutdown"


def test_a_wait_whose_condition_is_held_is_woken_later(clock, server):
    """Every 5 ms, until it has been woken."""
    watched, answers = Watched(Client(server)), [False, False, True]
    watched.scope.thread_wait = SimpleNamespace(wake=lambda: answers.pop(0))
    watched.monitor.end("closed")
    assert len(answers) == 2
    assert clock.next() == 0.005
    clock.to(0.005)
    assert (len(answers), clock.next()) == (1, 0.01)
    clock.to(0.01)
    assert answers == []
    assert clock.next() == 1.0  # the look after the end alone
    watched.monitor.end("kicked")  # which changes nothing
    assert watched.reason == "closed"


def test_who_does_not_run_is_not_interrupted(clock, server):
    """Nor who is being closed; nor is a stream that is gone."""
    watched, wakes = Watched(Client(server)), []
    watched.scope.thread_wait = SimpleNamespace(wake=lambda: wakes.append(1) or True)
    watched.scope.is_running = False
    watched.monitor.interrupt()
    watched.scope.is_running, watched.outcome.is_closing = True, True
    watched.monitor.interrupt()
    watched.outcome.is_closing = False
    scope, watched.scope = watched.scope, None
    watched.monitor.interrupt()
    assert wakes == []
    watched.scope = scope
    watched.monitor.interrupt()
    assert wakes == [1]


@pytest.mark.parametrize("why", ["runs", "stands", "gone", "in a hub", "another's"])
def test_whose_connection_is_cut_off(clock, server, why):
    """That of a thread that runs, as long as its number is its own."""
    watched = Watched(Client(server))
    watched.scope.is_running = why != "stands"
    watched.monitor.in_hub = why == "in a hub"
    if why == "gone":
        watched.scope = None
    if why == "another's":
        watched.line.sock = None
    watched.monitor.cut_off()
    assert bool(watched.line.cuts) == (why == "runs")


@pytest.fixture
def number_0():
    """A server's socket with the number 0, and its client."""
    before = os.dup(0)
    server, client = socket.socketpair()
    try:
        os.dup2(server.fileno(), 0)
        server.close()
        yield socket.socket(fileno=0), client
    finally:
        os.dup2(before, 0)
        os.close(before)
        client.close()


def test_a_connection_may_have_the_number_0(clock, number_0, monkeypatch):
    """As where a daemon has closed standard input: it is watched like any other."""
    server, _ = number_0
    given = []
    monkeypatch.setattr(
        monitor_module,
        "give_up_after",
        lambda fd, seconds: given.append((fd, seconds)),
    )
    line = Client(server)
    watched = Watched(line, Life(None, 8.0))
    assert list(clock.watched) == [0]
    assert clock.next() == 2.0
    assert watched.monitor.piece(1 << 20) == PIECE  # TCP would tell more
    line.full = True
    for seconds in range(2, 12, 2):
        assert watched.reason is None
        clock.to(seconds)
    assert watched.reason == "send_timeout"
    assert line.cuts
    watched.monitor.forget(watched.stream)
    assert given == [(0, 9.5), (0, None)]
    other = Watched(line)
    line.sock = None
    clock.to(100)
    other.monitor.shut_down(NOW, NOW)
    assert other.monitor.how_gone() == "disconnected"
    server.detach()


@pytest.mark.parametrize("has_socket", [True, False])
def test_the_size_of_pieces(clock, server, has_socket):
    """A whole chunk where TCP tells what was taken, or nobody can be told."""
    watched = Watched(Client(server if has_socket else None))
    assert watched.monitor.piece(1 << 20) == 1 << 20
    one, other = socket.socketpair()
    with one, other:
        assert Watched(Client(one)).monitor.piece(1 << 20) == PIECE


def test_a_client_that_has_gone(clock):
    """The watch says so; the reason is the kernel's."""
    with tcp_pair() as (server, client):
        watched = Watched(Client(server))
        leave(client)
        clock.watched[server.fileno()]()
    assert watched.reason == "disconnected"


def test_a_stream_that_is_dropped_is_not_called(clock, server):
    """The watch's references are weak."""
    watched = Watched(Client(server), Life(15, None, None))
    [(_, tick)] = clock.timers.values()
    [hung_up] = clock.watched.values()
    reference = weakref.ref(watched.monitor)
    del watched
    gc.collect()  # `Watched` is a cycle, which a stream's parts are not
    assert reference() is None
    assert tick() is None
    assert hung_up() is None


# The send time-out.


class Sent:
    """A client that takes what we say, and the look at it."""

    def __init__(self, seconds=8.0):
        self.line, self.output = Client(), Output(RAW, None, End(stops=True))
        self.output.connect(self.line, is_encoded=False, written=b"")
        self.look_of = SendTimeout(self.output, seconds)

    def look(self, seconds, *, is_running=False):
        return self.look_of.look(NOW + seconds, -1, is_running=is_running)

    def next(self, seconds):
        return round(self.look_of.next_time(NOW + seconds) - NOW, 6)


@pytest.fixture
def no_kernel(monkeypatch):
    """One that tells nothing of what a client has taken."""
    for name in ("acknowledged", "queued"):
        monkeypatch.setattr(f"syncstream.streams.send_timeout.{name}", lambda fd: None)


@pytest.mark.usefixtures("no_kernel")
def test_when_a_client_is_looked_at():
    """Four times in a time-out; one that takes nothing just when it is over."""
    sent = Sent()
    assert sent.next(0) == 2.0
    sent.line.full = True
    sent.output.bytes, sent.output.moved = 1000, NOW
    assert not sent.look(1)  # what is new is progress
    assert sent.next(1) == 3.0
    assert sent.next(7.5) == 9.0
    assert sent.next(8.995) == 9.005
    assert sent.next(12) == 12.01
    assert not sent.look(8.99)
    assert sent.look(9)
    assert sent.next(9) == 11.0
    assert not sent.look(9.5)  # once more after a while


@pytest.mark.usefixtures("no_kernel")
def test_a_client_without_a_connection_is_not_looked_at():
    """Nor one whose bytes had all gone, while no more are ready."""
    sent = Sent()
    sent.line.full, sent.output.bytes = True, 10
    sent.output.connection = None
    assert not any(sent.look(n) for n in range(0, 100, 2))
    sent = Sent()
    sent.output.bytes = 10
    assert not sent.look(0, is_running=True)  # all had gone
    sent.line.full = True
    assert not any(sent.look(n, is_running=True) for n in range(2, 100, 2))
    sent.output.bytes, sent.output.moved = 20, NOW + 100
    assert not sent.look(100, is_running=True)
    assert sent.look(108, is_running=True)


@pytest.mark.usefixtures("no_kernel")
def test_all_had_gone_only_while_the_source_ran():
    """A source that does not run may have handed over more than was seen."""
    sent = Sent()
    sent.output.bytes = 10
    assert not sent.look(0)
    sent.line.full = True
    assert not sent.look(2, is_running=True)
    assert not sent.look(7.99, is_running=True)
    assert sent.look(8, is_running=True)


def test_the_progress_of_a_client(server, monkeypatch):
    """What TCP has acknowledged, else what the server has not kept."""
    line = Client(server)
    line.kept = 30
    name = "syncstream.streams.send_timeout.acknowledged"
    monkeypatch.setattr("syncstream.streams.send_timeout.queued", lambda fd: fd)
    monkeypatch.setattr(name, lambda fd: 5 if fd == server.fileno() else None)
    assert progress_of(line, server.fileno(), 100) == (5, 0)
    assert progress_of(line, -1, 100) == (-1, 70)
    monkeypatch.setattr(name, lambda fd: 0)
    assert progress_of(line, server.fileno(), 100) == (server.fileno(), 70)


def test_a_closed_stream_keeps_no_source():
    """Its response may be kept for long: by a test, or a framework's log."""

    class Items(list):
        """A list that may be referred to weakly."""

    source = Items(["a"])
    reference = weakref.ref(source)
    stream = stream_of(source, Line())
    del source
    assert list(stream) == [b": ok\n\n", b"data: a\n\n"]
    stream.close()
    assert reference() is None
    assert stream.reason == "finished"
    assert list(stream) == []
