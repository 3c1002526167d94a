"""`Lanes`: threads that run jobs for the loop, whatever becomes of these."""

import threading
import time
from types import SimpleNamespace

import pytest

from syncstream.fanout import lanes as lanes_module
from syncstream.fanout.lanes import Crew, HubCrew, HubLane, Job, Lane, run_safely
from syncstream.runtime.journal import journal
from tests.support.waits import TIMEOUT, await_true


def test_a_lane_does_its_jobs_in_order():
    """Whatever one raises; it tells when the last one began."""
    lane, done, ready = Lane(), [], threading.Event()
    before = time.monotonic()

    def broken():
        raise SystemExit

    for job in (lambda: done.append(1), broken, lambda: done.append(2), ready.set):
        lane.do(job)
    assert ready.wait(TIMEOUT)
    assert done == [1, 2]
    assert before <= lane.began <= time.monotonic()


def test_a_job_tells_of_its_failure(caplog):
    """Both are logged if that fails, too."""
    told, error = [], LookupError("first")

    def failed(error):
        told.append(error)
        raise LookupError("second")

    def call():
        raise error

    run_safely(Job(call, failed))
    run_safely(Job(lambda: told.append(1), failed))
    assert told == [error, 1]
    journal().flush()
    assert [record.message for record in caplog.records] == [
        "work for a subscriber failed twice",
        "work for a subscriber failed",
    ]


def no_threads(monkeypatch, error):
    """Have no thread be started; return what makes it possible again."""

    def refuse(function, args):
        raise error

    real = lanes_module.native
    monkeypatch.setattr(lanes_module, "native", lambda module, name: refuse)
    return lambda: monkeypatch.setattr(lanes_module, "native", real)


@pytest.mark.parametrize("error", [RuntimeError("no thread"), MemoryError()])
def test_without_a_thread_another_lane_does_it(monkeypatch, error, caplog):
    """The last one keeps its jobs until a thread can be started."""
    ends, done, ready = Lane(), [], threading.Event()
    reads = Lane(ends)
    allow = no_threads(monkeypatch, error)
    reads.do(lambda: done.append(1))
    ends.do(lambda: done.append(2))
    assert done == []
    journal().flush()
    texts = [record.message for record in caplog.records]
    assert len(texts) == 2
    assert texts[0].startswith("no thread can be started, so work for a subscriber")
    allow()
    ends.do(ready.set)
    assert ready.wait(TIMEOUT)
    assert done == [1, 2]


@pytest.mark.parametrize("error", [RuntimeError("no thread"), MemoryError()])
def test_who_cannot_be_asked_is_asked_later(monkeypatch, error, caplog):
    """With the next one, or once it is late."""
    crew, ready = Crew(), threading.Event()
    allow = no_threads(monkeypatch, error)
    crew.do(ready.set)
    crew.hurry()
    journal().flush()
    texts = [record.message for record in caplog.records]
    assert len(texts) == 2
    assert texts[0].startswith("authorize cannot be called")
    allow()
    assert not ready.is_set()
    crew.hurry()
    assert ready.wait(TIMEOUT)


def test_a_crew_has_as_many_threads_as_are_late(monkeypatch):
    """One, and one more for each that hangs, up to a maximum; then they end."""
    monkeypatch.setattr(lanes_module, "MOST_ASKING", 3)
    crew, go_on, running, done = Crew(), threading.Event(), [], []

    def hang():
        running.append(threading.get_ident())
        go_on.wait(TIMEOUT)
        done.append(1)

    for _ in range(5):
        crew.do(hang)
    await_true(lambda: len(running) == 1)
    for count in (2, 3):
        crew.hurry()
        await_true(lambda count=count: len(running) == count)
    crew.hurry()
    time.sleep(0.05)
    assert len(set(running)) == 3
    go_on.set()
    await_true(lambda: len(done) == 5)
    ready = threading.Event()
    crew.do(ready.set)
    assert ready.wait(TIMEOUT)
    crew.hurry()  # nothing is late
    assert len(set(running)) == 3


class Watch:
    """A hub's watch that runs nothing by itself.

    Attributes:
        is_over: The hub was destroyed, as it tells.
        error: What `run` raises: the hub is being destroyed.
    """

    def __init__(self, is_over=False, error=None):
        self.is_over, self.error, self.told = is_over, error, []

    def run(self, function):
        if self.error is not None:
            raise self.error
        self.told.append(function)


@pytest.mark.parametrize(
    ("watch", "kept"),
    [
        (Watch(), 2),
        (Watch(is_over=True), 0),
        (Watch(error=RuntimeError("destroyed")), 0),
    ],
    ids=["", "over", "just over"],
)
def test_the_lane_of_a_hub_that_is_gone_gives_its_jobs_away(watch, kept):
    """All that wait, in their order; else the hub is told."""
    given, rest = [], SimpleNamespace()
    rest.do = given.append
    lane = HubLane(watch, rest)
    lane.start()
    jobs = [lambda: None, lambda: None]
    for job in jobs:
        lane.do(job)
    assert given == jobs[: 2 - kept]
    assert len(watch.told) == kept


def test_a_lane_of_a_hub_keeps_so_many_jobs():
    """More go to the other one."""
    given, rest = [], SimpleNamespace()
    rest.do = given.append
    lane = HubLane(Watch(), rest, 2)
    jobs = [lambda: None for _ in range(4)]
    for job in jobs:
        lane.do(job)
    assert given == jobs[2:]


@pytest.mark.parametrize("call", ["do", "hurry"])
@pytest.mark.parametrize(
    ("watch", "kept"),
    [
        (Watch(), True),
        (Watch(is_over=True), False),
        (Watch(error=RuntimeError("destroyed")), False),
    ],
    ids=["", "over", "just over"],
)
def test_the_crew_of_a_hub_that_is_gone_gives_its_jobs_away(watch, kept, call):
    """What waits, and what comes; a hub that lives is told."""
    given, rest = [], SimpleNamespace()
    rest.do = given.append
    first = Watch()
    crew, job = HubCrew(first, rest), repr
    crew.do(job)
    first.error, first.is_over = watch.error, watch.is_over
    if call == "do":
        crew.do(job)
    else:
        crew.hurry()
    count = 2 if call == "do" else 1
    assert given == [job] * (0 if kept else count)
    assert len(first.told) == 1 + kept


@pytest.mark.parametrize("level", [10, 40])
def test_a_line_that_nobody_wants_is_not_made(level, caplog):
    """Nor does one that cannot be logged do any harm."""
    caplog.set_level(20, "syncstream.fanout")
    done = []
    logs = SimpleNamespace(do=done.append)
    lanes = lanes_module.Lanes(None, None, None, None, logs)
    lanes.say(level, "%s", "text")
    assert len(done) == (level == 40)
    logs.do = None
    lanes.say(level, "%s", "text")
    for job in done:
        job()
    assert [record.message for record in caplog.records] == ["text"] * (level == 40)
