"""The journal: lines are logged in order, elsewhere, and none of them breaks it."""

import _thread
import io
import logging
import os
import signal
import sys
import threading
import time
import warnings

import pytest

import syncstream.runtime.journal
from syncstream.runtime.journal import MOST, Journal, is_enabled, journal, report
from tests.support.pairs import run_script
from tests.support.waits import TIMEOUT, await_true

LOG = logging.getLogger("syncstream.test")


class Falsy(Exception):
    """One that its own length makes false."""

    def __len__(self):
        return 0


class Unspeakable(Exception):
    """One that cannot be printed."""

    def __str__(self):
        raise RuntimeError("not even this")

    __repr__ = __str__


def raised(error):
    try:
        raise error
    except type(error) as caught:
        return caught


@pytest.fixture
def broken(monkeypatch):
    """A logger whose filter raises."""
    monkeypatch.setattr(LOG, "filters", [lambda record: 1 / 0])
    return LOG


@pytest.mark.parametrize("error", [ValueError("why"), Falsy("why")], ids=["", "falsy"])
def test_an_error_comes_with_its_traceback(caplog, error):
    """Whatever its truth is; and the line names its place in the code."""
    report(LOG, logging.ERROR, "it %s", "failed", error=raised(error))
    (record,) = caplog.records
    assert record.getMessage() == "it failed"
    assert record.exc_info[1] is error
    assert "in raised" in caplog.text
    assert record.funcName == "test_an_error_comes_with_its_traceback"


def test_a_line_without_an_error_has_no_traceback(caplog):
    """Neither its own nor that of an exception which is being handled."""
    try:
        raise ValueError
    except ValueError:
        report(LOG, logging.ERROR, "fine")
    (record,) = caplog.records
    assert not record.exc_info


@pytest.mark.parametrize(
    ("message", "args", "error", "text"),
    [
        ("all %d", (5,), None, "syncstream: all 5 (not logged: ZeroDivisionError)\n"),
        ("all %d", (), None, "syncstream: all %d (not logged: ZeroDivisionError)\n"),
        (
            "all",
            (),
            ValueError("secret"),
            "syncstream: all (not logged: ValueError, ZeroDivisionError)\n",
        ),
        (
            "all",
            (),
            Unspeakable(),
            "syncstream: all (not logged: Unspeakable, ZeroDivisionError)\n",
        ),
    ],
    ids=["arguments", "none", "error", "unspeakable"],
)
def test_what_cannot_be_logged_is_printed(broken, capsys, message, args, error, text):
    """With the names of the errors, and no text of theirs."""
    report(
        broken,
        logging.ERROR,
        message,
        *args,
        error=None if not error else raised(error),
    )
    printed = capsys.readouterr().err
    assert printed.endswith(text)
    assert ("in raised" in printed) == (error is not None)


@pytest.mark.parametrize("stderr", [None, io.TextIOWrapper(io.BytesIO())])
def test_where_nothing_can_be_printed(broken, monkeypatch, stderr):
    """Under pythonw, or where a daemon has closed it: nothing is raised."""
    if stderr is not None:
        stderr.close()
    monkeypatch.setattr(sys, "stderr", stderr)
    report(broken, logging.ERROR, "lost", error=raised(ValueError()))


def test_a_level_is_asked_for(monkeypatch):
    """A logger that raises is taken to log it, so that `report` shows the error."""
    monkeypatch.setattr(LOG, "isEnabledFor", lambda level: level > logging.INFO)
    assert is_enabled(LOG, logging.WARNING) is True
    assert is_enabled(LOG, logging.INFO) is False
    monkeypatch.setattr(LOG, "isEnabledFor", lambda level: 1 / 0)
    assert is_enabled(LOG, logging.INFO) is True


def test_lines_come_in_order_and_elsewhere(caplog):
    """With no word about dropped lines, as there are none."""
    caplog.set_level(logging.INFO, LOG.name)
    own, threads = Journal(), set()
    LOG.addFilter(note := lambda record: threads.add(threading.get_ident()) or True)
    try:
        for n in range(3):
            own.later(LOG, logging.INFO, "line %d", n, error=raised(ValueError(n)))
        own.later(LOG, logging.DEBUG, "too low")
        assert own.flush() is True
    finally:
        LOG.removeFilter(note)
    assert caplog.messages == ["line 0", "line 1", "line 2"]
    assert [str(record.exc_info[1]) for record in caplog.records] == ["0", "1", "2"]
    assert threads.isdisjoint({threading.get_ident()})
    assert len(threads) == 1


def test_what_is_dropped_is_counted_once(caplog):
    """As many lines as may wait are kept; the number of the others is logged."""
    own, go_on, begun, seen = Journal(), threading.Event(), threading.Event(), []
    own.do(lambda: (begun.set(), go_on.wait(TIMEOUT)))
    assert begun.wait(TIMEOUT)
    for n in range(MOST + 3):
        own.do(lambda n=n: seen.append(n))
    go_on.set()
    assert own.flush()
    assert seen == list(range(MOST))
    text = "3 log lines were dropped: a logging handler is too slow"
    assert caplog.messages == [text]
    own.do(lambda: seen.append("more"))
    assert own.flush()
    assert caplog.messages == [text]


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_a_job_that_raises_is_printed(capsys, error):
    """The next is done all the same, in the same thread."""
    own, seen = Journal(), []

    def fail():
        seen.append(threading.get_ident())
        raise error

    own.do(fail)
    own.do(lambda: seen.append(threading.get_ident()))
    assert own.flush()
    assert seen == seen[:1] * 2
    text = f"syncstream: a log line was lost (not logged: {error.__name__})\n"
    assert capsys.readouterr().err == text


def test_a_flush_has_a_time_limit_for_each_line():
    """A line that is done gives the next its own time; a stuck one ends the wait."""
    own, go_on = Journal(), threading.Event()
    for _ in range(6):
        own.do(lambda: threading.Event().wait(0.1))
    assert own.flush(0.4) is True  # 0.6 s in all
    own.do(lambda: go_on.wait(TIMEOUT))
    own.do(lambda: None)
    assert own.flush(0.02) is False
    go_on.set()
    assert own.flush() is True


def test_without_a_thread_the_flush_logs(monkeypatch):
    """The caller does, then; and the next line tries to start one again."""
    own, seen, thread = Journal(), [], threading.get_ident()
    native = syncstream.runtime.journal.native

    def none_left(function, args):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(
            syncstream.runtime.journal,
            "native",
            lambda module, name: (
                none_left if name == "start_new_thread" else native(module, name)
            ),
        )
        for _ in range(2):
            own.do(lambda: seen.append(threading.get_ident()))
        assert seen == []
        assert own.flush()
    assert seen == [thread] * 2
    own.do(lambda: seen.append(threading.get_ident()))
    await_true(lambda: len(seen) == 3)
    assert seen[2] != thread


def test_one_thread_serves_many_callers(monkeypatch):
    """However slowly the first of them starts it."""
    native, starts = syncstream.runtime.journal.native, []

    def start_slowly(function, args):
        starts.append(1)
        time.sleep(0.1)
        return native(_thread, "start_new_thread")(function, args)

    monkeypatch.setattr(
        syncstream.runtime.journal,
        "native",
        lambda module, name: (
            start_slowly if name == "start_new_thread" else native(module, name)
        ),
    )
    own, seen, start = Journal(), [], threading.Barrier(4)

    def write():
        start.wait(TIMEOUT)
        own.do(lambda: seen.append(1))

    writers = [threading.Thread(target=write) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(TIMEOUT)
    assert own.flush()
    assert (len(seen), len(starts)) == (4, 1)


def test_a_process_has_one_journal():
    """A forked child has its own, with none of the parent's lines."""
    assert journal() is journal()
    begun, go_on, seen = threading.Event(), threading.Event(), []
    journal().do(lambda: (begun.set(), go_on.wait(TIMEOUT)))
    assert begun.wait(TIMEOUT)
    journal().do(lambda: seen.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forks beside threads
        pid = os.fork()
    if pid == 0:
        signal.alarm(10)
        journal().do(lambda: seen.append(2))
        os._exit(not (journal().flush() and seen == [2]))
    assert os.waitpid(pid, 0)[1] == 0
    go_on.set()
    assert journal().flush()
    assert seen == [1]


AT_EXIT = """
import functools, logging, sys, threading
from syncstream.runtime.journal import Journal, journal
log = logging.getLogger("syncstream.test")
logging.basicConfig(format="%(message)s")
go_on = threading.Event()
if sys.argv[1] == "slow":
    Journal.flush = functools.partialmethod(Journal.flush, 0.05)
    journal().do(lambda: go_on.wait(20))
journal().later(log, logging.WARNING, "the last line")
"""


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("fine", "the last line\n"),
        (
            "slow",
            "syncstream: log lines were lost at the exit: a logging handler takes too"
            " long (not logged: TimeoutError)\n",
        ),
    ],
)
def test_lines_are_logged_before_the_exit(how, text):
    """Or it is said that they are not."""
    assert run_script(AT_EXIT, how).stderr == text
