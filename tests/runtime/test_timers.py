"""The watch's timers, and its table of descriptors: their edges, and their lock."""

import contextlib
import gc
import math
import os
import select
import threading
import time
from functools import partial

import pytest

import syncstream.runtime.watch
from syncstream.runtime.journal import journal
from syncstream.runtime.watch import (
    AGAIN,
    GRID,
    LOOK_EVERY,
    Timer,
    Watches,
    elsewhere,
    native_epoll,
    on_grid,
    watch,
)
from syncstream.runtime.worker import Worker
from tests.support.descriptors import open_files
from tests.support.pairs import Threads, check_script, leave, tcp_pair
from tests.support.waits import TIMEOUT, await_true

PLACE = Threads()
FAR = 1000.0  # seconds: no test waits for it
KEPT = 1000  # cancelled timers, before they are dropped

pytestmark = pytest.mark.usefixtures("own_watches")


@pytest.fixture(params=["epoll", "no epoll"])
def own_watch(request, monkeypatch):
    """Both kinds."""
    if request.param == "no epoll":
        monkeypatch.setattr(syncstream.runtime.watch, "native_epoll", lambda: None)
    return watch()


def later():
    return time.monotonic() + FAR


def far_of(one):
    """The timers of the tests', which come late."""
    soon = time.monotonic() + FAR / 2
    return [timer for when, _, timer in one.timers if when > soon]


@pytest.mark.parametrize("live", [1, 500, 3000])
def test_how_many_cancelled_timers_are_kept(live):
    """So many, or as many as there are others; with one more all are dropped."""
    one = watch()
    # They come before those that are cancelled, so that none of these is looked at.
    kept = {one.call_at(later() - FAR / 2, lambda: None) for _ in range(live)}
    for _ in range(2):  # the count begins anew
        most = max(KEPT, live)
        gone = [one.call_at(later(), lambda: None) for _ in range(most + 1)]
        for timer in gone[:-1]:
            one.cancel(timer)
            one.cancel(timer)  # which counts once
        assert len(one.timers) == live + len(gone)
        one.cancel(gone[-1])
        assert {timer for _, _, timer in one.timers} == kept


@pytest.mark.parametrize("when", ["before", "meanwhile", "after"])
def test_those_that_were_due_count_no_more(when):
    """A cancelled timer whose time has come is dropped, and is not counted twice.

    Nor is one counted that is cancelled while it runs, or after it has run.
    """
    one = watch()
    for _ in range(3):
        timers, came = [], threading.Event()
        with one.lock:  # nothing is due before all are there
            due = time.monotonic()
            for n in range(KEPT // 2):
                call = partial(cancel_one, one, timers, n, when == "meanwhile")
                timers.append(one.call_at(due, call))
                if when == "before":
                    one.cancel(timers[n])
            one.call_at(due + 0.001, came.set)
        assert came.wait(TIMEOUT)
        for timer in timers:
            one.cancel(timer)
    await_true(lambda: one.timers == [])
    # It comes before those that are cancelled, so that none of these is looked at.
    kept = one.call_at(later() - FAR / 2, lambda: None)
    gone = [one.call_at(later(), lambda: None) for _ in range(KEPT + 1)]
    for timer in gone[:-1]:
        one.cancel(timer)
    assert len(one.timers) == 1 + len(gone)
    one.cancel(gone[-1])
    assert [timer for _, _, timer in one.timers] == [kept]


def cancel_one(one, timers, n, is_now):
    """Be a timer's call: cancel it if it is time."""
    if is_now:
        one.cancel(timers[n])


def test_what_is_dropped_keeps_the_order():
    """The others come at their times all the same."""
    one, came = watch(), []
    with one.lock:  # none comes before all are there
        begin = time.monotonic()
        for n in random_order(50):
            one.call_at(begin + n / 1000, lambda n=n: came.append(n))
        for _ in range(KEPT + 1):
            one.cancel(one.call_at(later(), lambda: None))
        assert len(one.timers) == 50
    await_true(lambda: len(came) == 50)
    assert came == list(range(50))


def random_order(count):
    return [(n * 37) % count for n in range(count)]


def test_the_same_time_is_first_come_first_served(own_watch):
    """Timers of one time are not compared, and come in the order they were set."""
    came, when = [], time.monotonic() + 0.1
    for n in range(20):
        own_watch.call_at(when, lambda n=n: came.append(n))
    await_true(lambda: len(came) == 20)
    assert came == list(range(20))


def test_times_on_the_grid():
    """Never earlier, less than one step later; what is on it stays, near enough."""
    for when in (0.0, 0.01, 0.08, 0.0801, 1.0, 12345.678, 1e9 + 0.03):
        found = on_grid(when)
        assert when - 1e-6 <= found < when + GRID
        assert math.isclose(on_grid(found), found, abs_tol=GRID * 1.01)
        assert math.isclose(found / GRID, round(found / GRID), rel_tol=1e-9)
    assert on_grid(1e15) == 1e15
    assert on_grid(math.inf) == math.inf


def test_timers_that_are_not_urgent_share_a_time(own_watch):
    """Those of a second and more; shorter ones are exact."""
    now = time.monotonic()
    exact = own_watch.call_at(now + 0.9, lambda: None)
    shared = own_watch.call_at(now + 1.5, lambda: None)
    times = {timer: when for when, _, timer in own_watch.timers}
    assert times[exact] == now + 0.9
    assert times[shared] == on_grid(now + 1.5)
    for timer in (exact, shared):
        own_watch.cancel(timer)


def test_a_timer_has_not_failed():
    """At first."""
    timer = Timer(lambda: None)
    assert timer.has_failed is False
    assert timer.callback() is None


def test_a_timer_that_fails_is_tried_again(monkeypatch, caplog):
    """After a while; only its first failure is logged, even after a success."""
    monkeypatch.setattr(syncstream.runtime.watch, "AGAIN", 0.02)
    one, times = watch(), []

    def fail():
        times.append(time.monotonic())
        if len(times) == 3:
            return time.monotonic()
        if len(times) == 5:
            return None
        raise ValueError(len(times))

    timer = one.call_at(time.monotonic(), fail)
    await_true(lambda: len(times) == 5)
    assert timer.has_failed
    assert times[1] - times[0] >= 0.02
    assert times[2] - times[1] >= 0.02
    assert journal().flush()
    assert caplog.text.count("ValueError: ") == 1
    assert AGAIN == 1.0


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_timer_that_exits_is_tried_again(monkeypatch, caplog, error):
    """The watch goes on, and says so."""
    monkeypatch.setattr(syncstream.runtime.watch, "AGAIN", 0.01)
    one, calls = watch(), []

    def leave():
        calls.append(1)
        if len(calls) < 3:
            raise error

    one.call_at(time.monotonic(), leave)
    await_true(lambda: len(calls) == 3)
    assert journal().flush()
    assert caplog.text.count("the watch for hang-ups failed and goes on") == 2


def test_a_timer_of_the_past_comes_once_a_round():
    """It cannot keep the others from their times."""
    one, order = watch(), []

    def past():
        order.append("past")
        return 0.0 if len(order) < 50 else None

    with one.lock:
        one.call_at(0.0, past)
        one.call_at(time.monotonic() - 1, lambda: order.append("other"))
    await_true(lambda: order.count("past") >= 40)
    assert order.index("other") <= 2


def test_a_cancelled_timer_sets_itself_no_more():
    """Cancelled by its own callback, or by another while it runs."""
    one, calls, done = watch(), [], threading.Event()

    def tick():
        calls.append(1)
        one.cancel(timer)
        done.set()
        return time.monotonic()

    timer = one.call_at(time.monotonic() + 0.02, tick)
    assert done.wait(TIMEOUT)
    await_true(lambda: one.timers == [])
    one.call_at(time.monotonic() + 0.01, done.clear)
    await_true(lambda: not done.is_set())
    assert calls == [1]


class Held:
    """Runs something while the watch's lock is held."""

    def __init__(self, one):
        self._one = one

    def keeps_waiting(self, function):
        """Tell whether the function waits for the lock; then let it end."""
        done = threading.Event()
        with self._one.lock:
            join = PLACE.start(lambda: (function(), done.set()))
            waits = not done.wait(0.1)
        join()
        return waits


OPERATIONS = ["add", "add again", "remove", "call_at", "cancel"]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_changes_the_tables_takes_the_lock(own_watch, operation):
    """Each of the methods, for two threads may call them at once."""
    held, timer = Held(own_watch), own_watch.call_at(later(), lambda: None)

    def hung_up():
        """Nobody hangs up."""

    with tcp_pair() as (server, _):
        fd = server.fileno()
        if operation in ("remove", "add again"):
            own_watch.add(fd, hung_up)
        calls = {
            "add": lambda: own_watch.add(fd, hung_up),
            "add again": lambda: own_watch.add(fd, hung_up),
            "remove": lambda: own_watch.remove(fd, hung_up),
            "call_at": lambda: own_watch.call_at(later(), lambda: None),
            "cancel": lambda: own_watch.cancel(timer),
        }
        assert held.keeps_waiting(calls[operation])
        own_watch.remove(fd, hung_up)


def test_the_clock_takes_the_lock():
    """To read its timers, and to set one again."""
    one, calls = watch(), []
    with one.lock:
        # Only the first of two wakes it; it is held up before the call, then.
        one.call_at(time.monotonic(), lambda: calls.append("first"))
        time.sleep(0.1)
        assert calls == []
    await_true(lambda: calls == ["first"])
    entered, go_on = threading.Event(), threading.Event()

    def again():
        entered.set()
        go_on.wait(TIMEOUT)
        calls.append("again")
        return later()

    timer = one.call_at(time.monotonic(), again)
    assert entered.wait(TIMEOUT)
    with one.lock:
        go_on.set()
        await_true(lambda: calls[-1] == "again")
        time.sleep(0.1)
        assert timer not in far_of(one)
    await_true(lambda: timer in far_of(one))
    one.cancel(timer)


def test_a_look_takes_the_lock(monkeypatch):
    """Without epoll who is removed while the watch looks at it is not told."""
    looking, go_on, told = threading.Event(), threading.Event(), []

    def is_hung_up(fd):
        looking.set()
        return go_on.wait(TIMEOUT)

    monkeypatch.setattr(syncstream.runtime.watch, "native_epoll", lambda: None)
    monkeypatch.setattr(syncstream.runtime.watch, "is_hung_up", is_hung_up)
    one = watch()
    with tcp_pair() as (server, _):
        one.add(server.fileno(), lambda: told.append(1))
        assert looking.wait(TIMEOUT)
        with one.lock:
            go_on.set()
            time.sleep(0.1)
            del one.watched[server.fileno()]
        time.sleep(2 * LOOK_EVERY)
    assert told == []


def test_without_epoll_each_is_told_once(monkeypatch):
    """And again when it is added again."""
    monkeypatch.setattr(syncstream.runtime.watch, "native_epoll", lambda: None)
    one, told = watch(), []

    def hung_up():
        told.append(1)

    with tcp_pair() as (server, client):
        leave(client)
        for count in (1, 2):
            one.add(server.fileno(), hung_up)
            await_true(lambda count=count: len(told) == count)
            time.sleep(3 * LOOK_EVERY)
            assert len(told) == count
        one.remove(server.fileno(), hung_up)


def test_an_epoll_that_is_lost_while_it_is_added_to(monkeypatch, caplog):
    """It is not taken away in the middle; what was added is checked from then on."""
    registering, lost = threading.Event(), threading.Event()

    class Losing:
        """An epoll that is closed by other code while it is added to."""

        def __init__(self):
            self._epoll = select.epoll()
            self.is_lost = False

        def __getattr__(self, name):
            return getattr(self._epoll, name)

        def poll(self, timeout):
            found = self._epoll.poll(timeout)
            if registering.is_set():
                lost.set()
                raise ValueError("I/O operation on closed epoll object")
            return found

        def register(self, fd, mask):
            if threading.current_thread().name == "adds":
                registering.set()
                one.call_at(0, lambda: None)
                assert lost.wait(TIMEOUT)
                time.sleep(0.1)
                raise FileExistsError
            self._epoll.register(fd, mask)

    monkeypatch.setattr(syncstream.runtime.watch, "native_epoll", lambda: Losing)
    one, told = watch(), []
    with tcp_pair() as (server, client):

        def hung_up():
            told.append(1)

        def add():
            threading.current_thread().name = "adds"
            with contextlib.suppress(FileNotFoundError):
                one.add(server.fileno(), hung_up)

        PLACE.start(add)()
        leave(client)
        await_true(lambda: told)
        one.remove(server.fileno(), hung_up)
    assert journal().flush()
    assert "the watch's epoll is unusable" in caplog.text
    assert "20 times a second" in caplog.text


def test_a_descriptor_that_cannot_be_added():
    """Leaves nothing behind; who was there before stays."""
    one = watch()
    with pytest.raises(OSError, match="Bad file descriptor"):
        one.add(9999, lambda: None)
    assert 9999 not in one.watched
    with tcp_pair() as (server, _):
        fd = server.fileno()

        def first():
            """Is watched."""

        one.add(fd, first)
        one.add(fd, second := lambda: None)
        one.remove(fd, first)  # it is another's by now
        assert one.watched == {fd: second}
        one.remove(fd, second)
        one.remove(fd, second)
        assert one.watched == {}
        one.add(fd, first)
        server.close()
        one.remove(fd, first)  # the server was faster
        assert one.watched == {}


def test_a_hang_up_that_cannot_be_checked(monkeypatch, caplog):
    """Is checked again after a while, as epoll does not report it again."""
    monkeypatch.setattr(syncstream.runtime.watch, "AGAIN", 0.02)
    real, failures, told = syncstream.runtime.watch.is_hung_up, [], []

    def is_hung_up(fd):
        if not failures:
            failures.append(fd)
            raise OSError("no buffer space")
        return real(fd)

    monkeypatch.setattr(syncstream.runtime.watch, "is_hung_up", is_hung_up)
    one = watch()
    with tcp_pair() as (server, client):

        def hung_up():
            told.append(1)

        one.add(server.fileno(), hung_up)
        leave(client)
        await_true(lambda: told)
        one.remove(server.fileno(), hung_up)
    assert told == [1]
    assert journal().flush()
    text = "a hang-up could not be checked: trying again in 0 s"
    assert text in caplog.messages


def test_a_system_without_eventfd(monkeypatch):
    """Has no epoll that could be woken."""
    assert native_epoll() is select.epoll
    monkeypatch.delattr(os, "eventfd")
    assert native_epoll() is None


def test_a_watch_that_ends_leaves_no_descriptor(monkeypatch):
    """And no thread."""
    files, threads = open_files(), {*threading.enumerate()}
    for _ in range(3):
        own = Watches()
        monkeypatch.setattr(syncstream.runtime.watch, "watches", own)
        watch().call_at(later(), lambda: None)
        own.close()
    gc.collect()
    assert (open_files() - files, {*threading.enumerate()} - threads) == ({}, set())


def test_one_watch_for_all_threads(monkeypatch):
    """However many ask first, at once."""
    for _ in range(10):
        own = Watches()
        monkeypatch.setattr(syncstream.runtime.watch, "watches", own)
        start = threading.Barrier(4)
        joins = [
            PLACE.start(lambda start=start: (start.wait(), watch())[1])
            for _ in range(4)
        ]
        assert len({join() for join in joins}) == 1
        own.close()


def test_a_job_elsewhere_is_in_a_thread_of_its_own():
    """Its failure is logged, and no watch waits for it."""
    one, done = watch(), []
    elsewhere(one, lambda: done.append(threading.get_ident()))
    await_true(lambda: done)
    assert done[0] != threading.get_ident()


def test_calls_that_run_at_once(caplog):
    """A watch of threads runs and spawns in the caller's; what fails is logged."""
    one, ran = watch(), []
    one.run(lambda: ran.append(threading.get_ident()))
    one.spawn(lambda: ran.append(threading.get_ident()))
    one.run(lambda: 1 / 0)
    one.spawn(lambda: 1 / 0)
    assert ran == [threading.get_ident()] * 2
    assert journal().flush()
    assert caplog.text.count("ZeroDivisionError") >= 2
    assert one.is_over is False


WORKER = """
import gevent
from syncstream.runtime.watch import Worker
done = []
def do(job):
    done.append(job)
    if job == "fails":
        raise ValueError(job)
gevent.get_hub().handle_error = lambda *words: None
worker = Worker(do)
worker.begin()
assert not worker.jobs
worker.jobs.extend(["a", "fails", "b"])
worker.begin()
worker.begin()
assert done == []
gevent.sleep(0.01)
assert done == ["a", "fails", "b"], done
worker.jobs.append("c")
worker.begin()
gevent.sleep(0.01)
assert done[-1] == "c"
"""


def test_a_worker_goes_on_after_a_failure():
    """In order, in one greenlet at a time, and again when there is more."""
    assert check_script(WORKER) == ""
    assert Worker(lambda job: None).begin() is None


IN_A_HUB = """
import gevent, threading
from syncstream.runtime.watch import elsewhere, watch
done, failed = [], []
own = gevent.spawn(watch).get()
def job():
    gevent.sleep(0.001)  # it may wait, which a callback of the hub may not
    done.append(threading.get_ident())
elsewhere(own, job)
own.run(lambda: done.append("runs"))
own.spawn(lambda: (gevent.sleep(0.001), done.append("spawned")))
with gevent.Timeout(10):
    while len(done) < 3:
        gevent.sleep(0.001)
assert set(done) == {threading.get_ident(), "runs", "spawned"}, done
assert own.is_home and not own.is_over
"""


def test_a_job_elsewhere_is_in_a_greenlet_of_the_main_hub():
    """Where it may wait."""
    assert check_script(IN_A_HUB) == ""
