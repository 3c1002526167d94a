"""The record of a process, by itself: its servers, its counts, its exit."""

import logging
import math
import threading
import time
from dataclasses import dataclass, field

import pytest

from syncstream.runtime.journal import journal
from syncstream.runtime.process import (
    AT_ONCE,
    EXIT_WAIT,
    Process,
    Served,
    drain_of_environment,
    process,
    stats,
)
from syncstream.runtime.watch import GRID
from tests.support.pairs import Threads, run_script
from tests.support.waits import TIMEOUT

pytestmark = pytest.mark.usefixtures("own_record")

PLACE = Threads()
LOG = logging.getLogger("syncstream.test")


@dataclass(eq=False)
class Stream:
    """Notes what it is told."""

    told: list = field(default_factory=list)

    def shut_down(self, since, until):
        self.told.append((since, until))


@dataclass(eq=False)
class Parked(Stream):
    """One that has left its server."""

    reason = None
    is_finishing = False


class Clock:
    """A watch that notes what it is to call."""

    def __init__(self):
        self.calls = []

    def call_at(self, when, callback):
        self.calls.append((when, callback))


def opened(record, stopping=None, *, server="server", clock=None):
    """Open a stream; return it and what serves it."""
    stream = Stream()
    return stream, record.opened(stream, clock, server, lambda: stopping)


def test_streams_of_one_server_are_served_together(own_record):
    """By its key; the `Stopping` is found once, the numbers are those of all."""
    found = []

    def find():
        found.append(1)

    streams = [Stream() for _ in range(5)]
    served = [
        own_record.opened(s, None, "ab"[n % 2], find) for n, s in enumerate(streams)
    ]
    assert served[0] is served[2] is served[4]
    assert served[1] is served[3] is not served[0]
    assert len(found) == 2
    assert (served[0].count(), served[1].count()) == (3, 2)
    assert own_record.open_streams == own_record.attached_streams == 5
    served[1].parked.add(Parked())
    assert (own_record.open_streams, own_record.attached_streams) == (6, 5)
    assert own_record.parked_streams == 1
    own_record.closed(streams[0], served[0])
    own_record.closed(streams[0], served[0])
    assert served[0].count() == 2
    del streams[1]  # nobody else refers to it
    assert served[1].count() == 2
    assert stats()["open"] == 4


def test_a_server_without_streams_is_forgotten(own_record):
    """It alone: the others, and their state, stay."""
    (first, one), (second, two) = (opened(own_record, server=key) for key in "ab")
    assert own_record.look() is not None
    own_record.closed(first, one)
    when = own_record.look()
    assert time.monotonic() < when < time.monotonic() + 2 * GRID
    assert opened(own_record, server="b")[1] is two
    again, three = opened(own_record, server="a")
    assert three is not one
    assert own_record.open_streams == 2
    for stream, served in ((again, three), (second, two)):
        own_record.closed(stream, served)
    assert own_record.look() is None
    assert own_record.open_streams == 0
    assert opened(own_record, server="b")[1] is not two


def test_a_stream_that_comes_as_its_server_is_forgotten(own_record):
    """It is looked after all the same."""
    stream, served = opened(own_record)
    own_record.closed(stream, served)

    class Late(dict):
        """Streams, to which one is added while they are being counted."""

        def __len__(self):
            count = super().__len__()
            if not count:
                self["late"] = lambda: None
            return count

    served.open = Late()
    assert own_record.look() is not None
    assert own_record.open_streams == 1


def test_the_clock_looks_while_there_are_streams(own_record):
    """One look is set, however many streams, and servers, there are."""
    clock = Clock()
    held = [opened(own_record, lambda: None, server=n, clock=clock) for n in range(3)]
    [(when, look)] = clock.calls
    assert time.monotonic() - 1 < when < time.monotonic() + 2 * GRID
    assert own_record.is_looking
    for stream, served in held:
        assert look() is not None
        own_record.closed(stream, served)
    assert look() is None
    assert not own_record.is_looking
    held.append(opened(own_record, lambda: None, clock=clock))
    assert len(clock.calls) == 2


@pytest.mark.parametrize("tells", ["server", "process", "nobody"])
def test_who_is_never_told_is_not_looked_at(own_record, tells):
    """A server that does not show its stop costs no look, unless the process does."""
    clock = Clock()
    if tells == "process":
        own_record.stop_when(lambda: None)
    stream, _ = opened(own_record, (lambda: None) if tells == "server" else None)
    assert clock.calls == []  # without a clock nobody looks
    stopping = (lambda: None) if tells == "server" else None
    opened(own_record, stopping, clock=clock)
    assert len(clock.calls) == (tells != "nobody")
    assert own_record.is_looking == (tells != "nobody")
    assert stream.told == []


def test_a_clock_that_fails_is_asked_again(own_record):
    """By the next stream; the one that it failed is not open."""

    class Failing(Clock):
        def call_at(self, when, callback):
            super().call_at(when, callback)
            raise RuntimeError("no memory")

    failing, clock, stream = Failing(), Clock(), Stream()
    with pytest.raises(RuntimeError, match="no memory"):
        own_record.opened(stream, failing, "server", lambda: lambda: None)
    assert own_record.open_streams == 0
    assert not own_record.is_looking
    kept = opened(own_record, lambda: None, clock=clock)
    assert len(clock.calls) == 1
    assert kept[1].count() == 1


@pytest.mark.parametrize(
    ("server", "process", "expected"),
    [
        (None, None, None),
        (5.0, None, 5.0),
        (None, 5.0, 5.0),
        (5.0, 7.0, 5.0),
        (7.0, 5.0, 5.0),
        (7.0, AT_ONCE, AT_ONCE),
    ],
)
def test_the_earlier_stop_counts(own_record, server, process, expected):
    """The server's own or the process's; the first sets when it was noticed."""
    stream, served = opened(own_record, lambda: server)
    own_record.stop_when(lambda: process)
    before = time.monotonic()
    assert own_record.until(served) == expected
    if expected is None:
        assert served.since is None
        own_record.look()
        assert stream.told == []
        return
    since = served.since
    assert before <= since <= time.monotonic()
    assert own_record.until(served) == expected
    own_record.look()
    assert stream.told == [(since, expected)]
    assert served.since == since


def test_a_stop_of_the_program_is_at_once(own_record):
    """Of all servers' streams, and of those that have left; one failure is logged."""
    (first, one), (second, two) = (opened(own_record, server=key) for key in "ab")
    parked = Parked()
    one.parked.add(parked)
    own_record.stop()
    for stream, served in ((first, one), (second, two)):
        [(since, until)] = stream.told
        assert (since, until) == (served.since, -math.inf)
    assert parked.told == first.told
    since = one.since
    own_record.stop()
    assert one.since == since
    assert len(first.told) == 2


def test_a_stream_that_cannot_be_told(own_record, caplog):
    """It keeps no other from being told."""
    held = [opened(own_record) for _ in range(3)]
    held[0][0].shut_down = lambda since, until: 1 / 0
    one, two = Parked(), Parked()
    held[0][1].parked.update((one, two))
    for parked in (one, two):
        parked.shut_down = lambda since, until, parked=parked: (
            parked.told.append(until),
            1 / 0,
        )
    own_record.stop()
    assert [len(stream.told) for stream, _ in held] == [0, 1, 1]
    assert one.told == two.told == [-math.inf]
    assert journal().flush()
    text = "a stream could not be told that the server stops: it goes on"
    assert caplog.messages == [text] * 3
    assert caplog.text.count("ZeroDivisionError: ") == 3


def test_a_stop_that_cannot_be_asked_for(own_record, caplog):
    """It is logged once, and counts as no stop."""
    stream, served = opened(own_record, lambda: 1 / 0)
    for _ in range(3):
        assert served.until() is None
        own_record.look()
    assert Served(None).until() is None
    assert stream.told == []
    assert journal().flush()
    [record] = caplog.records
    assert record.levelname == "ERROR"
    assert record.message.startswith("whether the server stops is unknown")
    assert "ZeroDivisionError" in record.message


def test_ends_are_added_up(own_record):
    """Each number by itself, however many there are, and they stay."""
    expected = {"streams": 0, "seconds": 0.0, "events": 0, "bytes": 0}
    for n in range(250):
        own_record.count("finished", 0.5, n, 2 * n)
        expected["streams"] += 1
        expected["seconds"] += 0.5
        expected["events"] += n
        expected["bytes"] += 2 * n
    own_record.count("closed")
    one = {"streams": 1, "seconds": 0.0, "events": 0, "bytes": 0}
    for _ in range(2):
        assert stats() == {"open": 0, "ended": {"finished": expected, "closed": one}}
    stats()["ended"]["finished"]["streams"] = 0  # the caller's own copy
    assert stats()["ended"]["finished"] == expected


def test_a_count_waits_for_nobody(own_record):
    """Who ends a stream may be anywhere; what is counted meanwhile is not lost."""
    counted = threading.Event()
    with own_record.lock:

        def count():
            for _ in range(300):
                own_record.count("closed")
            counted.set()

        join = PLACE.start(count)
        assert counted.wait(TIMEOUT)
    join()
    assert stats()["ended"]["closed"]["streams"] == 300
    with own_record.lock:
        asked = threading.Event()
        join = PLACE.start(lambda: (stats(), asked.set()))
        assert not asked.wait(0.05)  # sums that belong together
    join()
    assert asked.is_set()


def test_lines_that_come_once(own_record, caplog):
    """Each by its text, or by its key where texts of one line differ."""
    for n in range(2):
        own_record.warn_once(LOG, "text")
        own_record.warn_once(LOG, f"text {n}", "key")
        own_record.warn_once(LOG, "text", "other key")
        own_record.say_once(LOG, logging.ERROR, "said %d", n)
    assert journal().flush()
    assert sorted(caplog.messages) == ["said 0", "text", "text", "text 0"]
    assert {r.levelname for r in caplog.records} == {"WARNING", "ERROR"}


def test_labels_are_shared_and_not_kept_for_ever(own_record):
    """Equal ones are one object, but for a cache that has begun anew."""
    first, second = "".join(["la", "bel"]), "".join(["lab", "el"])
    assert first is not second
    assert own_record.shared_label(first) is first
    assert own_record.shared_label(second) is first
    for n in range(198):
        own_record.shared_label(f"other {n}")
    assert own_record.shared_label(second) is first
    own_record.shared_label("the last")
    assert own_record.shared_label(second) is second


def test_what_is_remembered_has_an_end(own_record):
    """Two hundred values; with one more it begins anew. None is a value, too."""
    found = []

    def remembered(key):
        return own_record.memo(key, lambda: found.append(key))

    for key in range(200):
        assert remembered(key) is None
    for key in range(200):
        remembered(key)
    assert len(found) == 200
    remembered(200)
    remembered(200)
    remembered(0)
    assert found[200:] == [200, 0]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *((text, float(text)) for text in ("0", "0.0", "1.5", " 30 ", "1e308")),
        *((text, None) for text in ("-0.1", "inf", "nan", "", "5 s")),
    ],
)
def test_the_seconds_of_the_environment(monkeypatch, caplog, text, seconds):
    """From 0 on, and finite; anything else is said once, and not taken."""
    monkeypatch.setenv("SYNCSTREAM_DRAIN", text)
    for _ in range(2):
        assert drain_of_environment() == seconds
    assert journal().flush()
    said = f"SYNCSTREAM_DRAIN must be seconds, 0 or more, got {text!r}: ignored"
    assert caplog.messages == [said] * (seconds is None)


def test_no_seconds_of_the_environment(monkeypatch, caplog):
    """It is not set: nothing is said."""
    monkeypatch.delenv("SYNCSTREAM_DRAIN", raising=False)
    assert drain_of_environment() is None
    assert caplog.messages == []


def test_the_end_waits_for_the_streams(own_record):
    """As long as they take, and no longer than that."""
    stream, served = opened(own_record)
    begin = time.monotonic()
    own_record.end(0.1)
    assert 0.1 <= time.monotonic() - begin < TIMEOUT
    assert stream.told
    stream.shut_down = lambda since, until: own_record.closed(stream, served)
    begin = time.monotonic()
    own_record.end(TIMEOUT)
    assert time.monotonic() - begin < TIMEOUT / 2
    assert EXIT_WAIT == 1.0


def test_clean_ups_are_done_last_first(own_record, caplog):
    """Each once, also behind one that fails or adds another."""
    done = []
    own_record.at_exit(lambda: done.append("first"))
    own_record.at_exit(lambda: 1 / 0)
    own_record.at_exit(
        lambda: (done.append("last"), own_record.at_exit(lambda: done.append("added")))
    )
    own_record.leave()
    assert done == ["last", "added", "first"]
    own_record.leave()
    assert len(done) == 3
    assert journal().flush()
    assert caplog.messages == ["a clean-up at the interpreter's exit failed"]


AT_EXIT = """
import logging, threading, time
from syncstream.runtime.process import process
from syncstream.runtime.waiting import say
logging.basicConfig(format="%(message)s")
log = logging.getLogger("syncstream.test")

class Stream:
    def shut_down(self, since, until):
        print("told", flush=True)
        threading.Timer(0.05, end).start()

def end():
    say(log, logging.WARNING, "ended")
    process().closed(stream, served)

stream = Stream()
served = process().opened(stream, None, "server", lambda: None)
process().at_exit(lambda: print("clean-up", process().open_streams, flush=True))
"""


def test_the_exit_of_the_interpreter():
    """Streams are told, and awaited; then come the clean-ups, and all lines."""
    done = run_script(AT_EXIT)
    assert done.stdout == "told\nclean-up 0\n"
    assert done.stderr == "ended\n"
    assert done.returncode == 0


def test_a_process_has_one_record():
    """And `stats` is its own."""
    assert process() is process()
    assert isinstance(process(), Process)
    process().count("closed")
    assert stats()["ended"]["closed"]["streams"] == 1
