"""Waits in a generator: they end with the stream, and take nothing from others."""

import asyncio
import multiprocessing
import queue
import random
import signal
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from syncstream import ClientDisconnected, current_stream, sleep
from syncstream.runtime.sockets import is_hung_up
from syncstream.runtime.waiter import Waiter, wake_all
from syncstream.runtime.waiting import ThreadWait, wait
from syncstream.runtime.watch import Watch
from tests.runtime.waitables import PLACE, WAITABLES, Waiting, in_stream, waiter
from tests.support.pairs import (
    Greenlets,
    Line,
    check_script,
    leave,
    serve,
    stream_of,
    tcp_pair,
)
from tests.support.waits import TIMEOUT, await_true


@pytest.mark.parametrize("end", ["hang-up", "stop", "close"])
@pytest.mark.parametrize("kind", [*WAITABLES, "sleep"])
def test_a_wait_ends_with_the_stream(kind, end):
    """At once, with its exception; no waiter stays behind in the condition."""
    waitable = WAITABLES[kind]() if kind != "sleep" else None
    function = waiter(in_stream, waitable) if waitable else lambda: sleep(60)
    with tcp_pair() as (server, client):
        waiting = Waiting(function, Line(server))
        waiting.await_wait()
        if end == "hang-up":
            leave(client)
        elif end == "stop":
            waiting.stream.stop("kicked")
        else:
            waiting.stream.close()
        chunks = waiting.join()
    assert chunks[0] == b": ok\n\n"
    assert len(chunks) == (2 if end == "stop" else 1)  # a word when to come back
    error = ClientDisconnected if end == "hang-up" else GeneratorExit
    assert waiting.seen == [error]
    condition = getattr(waitable, "not_empty", getattr(waitable, "_cond", waitable))
    assert not condition or not condition._waiters


@pytest.mark.parametrize("kind", WAITABLES)
def test_a_wait_returns_what_it_waited_for(kind):
    """As the waitable's own wait does, in a stream and outside of one."""

    def give(waitable):
        if hasattr(waitable, "put"):
            waitable.put(7)
        elif hasattr(waitable, "set"):
            waitable.set()
        else:
            with waitable:
                waitable.notify()

    for place in ("stream", "thread"):
        waitable = WAITABLES[kind]()
        condition = getattr(waitable, "not_empty", getattr(waitable, "_cond", waitable))
        if place == "stream":
            waiting = Waiting(waiter(in_stream, waitable))
            join = waiting.join
        else:
            join = PLACE.start(waiter(wait, waitable))
        await_true(lambda condition=condition: condition._waiters)
        give(waitable)
        got = join() if place == "thread" else (join(), waiting.seen[0])[1]
        assert got == (7 if hasattr(waitable, "put") else True)


@pytest.mark.parametrize("timeout", [0, 0.03])
@pytest.mark.parametrize("kind", WAITABLES)
def test_a_wait_has_a_time_limit(kind, timeout):
    """Queues raise Empty, the others return False; nothing stays behind."""
    waitable = WAITABLES[kind]()
    condition = getattr(waitable, "not_empty", getattr(waitable, "_cond", waitable))

    def function():
        start = time.monotonic()
        try:
            return waiter(in_stream, waitable, timeout)()
        except queue.Empty:
            return "empty"
        finally:
            assert time.monotonic() - start >= timeout

    waiting = Waiting(function)
    waiting.join()
    assert waiting.seen == ["empty" if hasattr(waitable, "put") else False]
    assert not condition._waiters


def test_what_is_there_is_taken_at_once():
    """Without giving anything back: that is for waits."""
    line, given = Line(), []
    line.before_wait = lambda: given.append(1)
    items, event = queue.Queue(), threading.Event()
    items.put(1)
    event.set()
    waiting = Waiting(lambda: (in_stream(items), in_stream(event)), line)
    waiting.join()
    assert waiting.seen == [(1, True)]
    assert given == [1]  # at its beginning


def test_what_is_given_back_may_use_the_waitable():
    """It is not called under the lock of what is waited for."""
    line, event, items = Line(), threading.Event(), queue.Queue()

    def give_back():
        if current_stream() and waiting_for:
            waiting_for.pop()()

    line.before_wait = give_back
    waiting_for = []

    def function():
        waiting_for.append(event.set)
        first = in_stream(event, 5)
        waiting_for.append(lambda: items.put(3))
        return first, in_stream(items, 5)

    waiting = Waiting(function, line)
    waiting.join()
    assert waiting.seen == [(True, 3)]


def test_a_pulse_is_not_missed():
    """An event that is set and cleared at once has woken those who waited."""
    event = threading.Event()
    waiting = Waiting(lambda: in_stream(event))
    waiting.await_wait()
    await_true(lambda: event._cond._waiters)
    with event._cond:  # what set() and clear() do
        event._flag = True
        event._cond.notify_all()
        event._flag = False
    waiting.join()
    assert waiting.seen == [True]


def test_an_event_is_true_only_when_it_was_set():
    """Streams that end while it is set and cleared wake nobody who came later."""
    event, stop, spurious = threading.Event(), threading.Event(), []
    sets, clears = [], []

    def plain():
        while not stop.is_set():
            before = len(clears)
            if event.wait(0.05) and len(sets) == before:
                spurious.append(before)  # all that were set had been cleared

    joins = [PLACE.start(plain) for _ in range(4)]
    for _ in range(20):
        waiting = [Waiting(lambda: in_stream(event)) for _ in range(3)]
        stops = [PLACE.start(one.stream.stop) for one in waiting]
        sets.append(1)
        event.set()
        event.clear()
        clears.append(1)
        for join in [*stops, *(one.join for one in waiting)]:
            join()
    stop.set()
    for join in joins:
        join()
    assert spurious == []


def test_a_dying_waiter_of_an_event_wakes_nobody():
    """Its notification was for all, and those have got it."""
    event = threading.Event()
    waiting = Waiting(lambda: in_stream(event))
    waiting.await_wait()
    await_true(lambda: event._cond._waiters)
    with event._cond:
        event._cond.notify_all()  # as set() does
        waiting.stream.stop("kicked")
        late = threading.Lock()
        late.acquire()
        event._cond._waiters.append(late)  # one who comes after the clear()
    waiting.join()
    assert waiting.seen == [GeneratorExit]
    assert late in event._cond._waiters
    assert late.locked()


@pytest.mark.parametrize("how", ["ended", "found out", "hung up"])
def test_a_dying_waiter_passes_a_notification_on(how, monkeypatch):
    """One item, two waiters, and the first of them dies of another cause."""
    items = queue.Queue()
    if how == "hung up":  # the watch does not know yet
        monkeypatch.setattr(Watch, "add", lambda self, fd, hung_up: None)
    with tcp_pair() as (server, client):
        waiting = Waiting(lambda: in_stream(items), Line(server))
        await_true(lambda: items.not_empty._waiters)
        got = []
        join = PLACE.start(lambda: got.append(items.get(timeout=TIMEOUT)))
        await_true(lambda: len(items.not_empty._waiters) == 2)
        if how == "ended":
            with items.mutex:
                items._put("item")
                items.not_empty.notify()
                waiting.stream.stop("kicked")
        elif how == "found out":
            check = waiting.stream.check

            def late_check():
                waiting.stream.stop("kicked")
                check()

            monkeypatch.setattr(waiting.stream, "check", late_check)
            items.put("item")
        else:
            client.close()
            await_true(lambda: is_hung_up(server.fileno()))
            items.put("item")
        waiting.join()
        join()
    assert got == ["item"]
    assert waiting.seen[0] in (GeneratorExit, ClientDisconnected)


class Late:
    """A lock whose wait times out just when somebody releases it."""

    def __init__(self, notify):
        self.notify = notify

    def acquire(self, blocking=True, timeout=-1):
        if timeout > 0 or not blocking:
            self.notify()
            return False
        return True

    def release(self):
        """Too late."""


def test_a_notification_at_the_last_moment_counts():
    """After the time, before the condition is held again: it is not lost."""
    condition = threading.Condition(threading.Lock())
    seen = []

    other = threading.Lock()
    other.acquire()

    def notify():
        with condition:
            condition.notify()
            condition._waiters.append(other)  # who comes a moment later

    def source():
        from syncstream.runtime import waiting

        thread_wait = waiting.ThreadWait(condition)
        thread_wait.lock = Late(notify)
        with condition:
            seen.append(thread_wait.wait(0.5))
        yield "a"

    serve(stream_of(source(), Line()))
    assert seen == [True]
    assert [*condition._waiters] == [other]  # it was one notification


@pytest.mark.parametrize("kind", ["Queue", "LifoQueue", "PriorityQueue"])
def test_items_are_neither_lost_nor_doubled(kind):
    """20 streams, stopped at random, and 20 threads get from one queue."""
    items, got = WAITABLES[kind](), []
    total = 600

    def plain():
        while (item := items.get(timeout=TIMEOUT)) is not None and item < total:
            got.append(item)

    def streaming():
        while True:
            got.append(in_stream(items))

    joins = [PLACE.start(plain) for _ in range(20)]
    waiting = [Waiting(streaming) for _ in range(20)]
    stopping = random.sample(waiting, 20)
    for n in range(total):
        items.put(n)
        if n % 30 == 10:
            stopping.pop().stream.stop()
        if n % 50 == 25:
            PLACE.pause(0.001)
    for one in waiting:
        one.join()
    await_true(lambda: len(got) >= total)
    for _ in joins:
        items.put(total)
    for join in joins:
        join()
    assert sorted(got) == list(range(total))


def test_every_notification_is_somebodys():
    """One item at a time to waiters of which every second one is being stopped."""
    items = queue.Queue()
    for n in range(50):
        waiting = Waiting(lambda: in_stream(items))
        got = []
        join = PLACE.start(lambda got=got: got.append(items.get(timeout=TIMEOUT)))
        if n % 2:
            await_true(lambda: len(items.not_empty._waiters) == 2)
        stop = PLACE.start(waiting.stream.stop)
        items.put(n)
        stop()
        waiting.join()
        if waiting.seen == [n]:
            items.put("for the other one")
        join()
        assert got == [n] or (got == ["for the other one"] and waiting.seen == [n])
    assert not items.not_empty._waiters


def test_a_condition_may_be_held_twice():
    """The whole of a recursive lock is given back while its holder waits."""
    condition = threading.Condition()

    def function():
        with condition, condition:
            first = in_stream(condition)
            assert condition._is_owned()
            return first, in_stream(condition)

    waiting = Waiting(function)
    await_true(lambda: condition._waiters)
    with condition:
        condition.notify()
    await_true(lambda: condition._waiters)
    waiting.stream.stop()
    waiting.join()
    assert waiting.seen == [GeneratorExit]
    assert condition.acquire(blocking=False)
    condition.release()


def test_a_condition_that_somebody_holds_is_waited_for():
    """stop() returns at once; the wait ends when the other lets go."""
    condition = threading.Condition(threading.Lock())

    def function():
        with condition:
            return in_stream(condition)

    waiting = Waiting(function)
    await_true(lambda: condition._waiters)
    with condition:
        waiting.stream.stop()
        PLACE.pause(0.02)
        assert waiting.seen == []
    waiting.join()
    assert waiting.seen == [GeneratorExit]


@pytest.mark.parametrize("lock", [threading.Lock, threading.RLock])
def test_a_condition_that_is_not_held(lock):
    """A RuntimeError, as from its own wait; nobody else's lock is released."""
    condition = threading.Condition(lock())

    def function():
        with pytest.raises(RuntimeError, match="un-acquired"):
            in_stream(condition, 1)
        return "told"

    waiting = Waiting(function)
    waiting.join()
    assert waiting.seen == ["told"]
    assert not condition._waiters


@pytest.mark.skipif(sys.version_info < (3, 13), reason="new in Python 3.13")
@pytest.mark.parametrize("immediate", [True, False])
def test_a_queue_that_is_shut_down(immediate):
    """ShutDown comes out of the wait, at once, and before it."""
    items = queue.Queue()

    def function():
        with pytest.raises(queue.ShutDown):
            in_stream(items)
        with pytest.raises(queue.ShutDown):
            in_stream(items)
        return "shut"

    waiting = Waiting(function)
    await_true(lambda: items.not_empty._waiters)
    items.shutdown(immediate)
    waiting.join()
    assert waiting.seen == ["shut"]


def unwaitable():
    yield "SimpleQueue", queue.SimpleQueue()
    yield "object", object()
    yield "None", None
    yield "dict", {}
    yield "Semaphore", threading.Semaphore()
    yield "Barrier", threading.Barrier(2)
    yield "Lock", threading.Lock()
    yield "Thread", threading.Thread()
    yield "asyncio.Event", asyncio.Event()
    yield "asyncio.Condition", asyncio.Condition
    yield "asyncio.Queue", asyncio.Queue


@pytest.mark.parametrize(
    "waitable", [pytest.param(value, id=name) for name, value in unwaitable()]
)
def test_what_cannot_be_waited_for(waitable):
    """A TypeError, in a stream and outside of one, in a thread and in a hub."""

    def function():
        with pytest.raises(TypeError, match="waitable must be a queue"):
            in_stream(waitable, 1)
        return "told"

    waiting = Waiting(function)
    waiting.join()
    assert waiting.seen == ["told"]
    with pytest.raises(TypeError, match="waitable must be"):
        wait(waitable, 1)


def test_what_another_process_has_cannot_be_waited_for():
    """Nothing wakes a wait for multiprocessing's queues and events."""
    context = multiprocessing.get_context("spawn")
    items = context.Queue()
    try:
        for waitable in (items, context.Event(), context.Condition()):
            with pytest.raises(TypeError, match="thread can wait for"):
                wait(waitable, 1)
    finally:
        items.close()
        items.join_thread()


def test_gevents_in_a_thread_and_threadings_in_a_hub():
    """Each would hold up what it cannot wake."""
    gevent = pytest.importorskip("gevent")
    pytest.importorskip("gevent.event")
    pytest.importorskip("gevent.queue")

    for waitable in (gevent.event.Event(), gevent.queue.Queue()):
        with pytest.raises(TypeError, match="thread can wait for"):
            wait(waitable, 1)

    def in_hub():
        for kind in WAITABLES.values():
            with pytest.raises(TypeError, match="hub can wait for"):
                wait(kind(), 1)

    gevent.spawn(in_hub).get()


def test_gevents_in_a_hub():
    """Items, events, time limits, and the stream's end."""
    gevent = pytest.importorskip("gevent")
    pytest.importorskip("gevent.event")
    pytest.importorskip("gevent.queue")

    seen, place = [], Greenlets()
    items, event = gevent.queue.Queue(), gevent.event.Event()

    def source():
        stream = current_stream()
        items.put(1)
        seen.append(stream.wait(items))
        with pytest.raises(queue.Empty):
            stream.wait(items, 0.01)
        seen.append(stream.wait(event, 0.01))
        gevent.spawn_later(0.01, event.set)
        seen.append(stream.wait(event))
        seen.append("waits")
        stream.wait(items)
        yield

    stream = stream_of(source(), Line())
    join = place.start(lambda: serve(stream))
    place.await_true(lambda: "waits" in seen)
    stream.stop()
    join()
    assert seen == [1, False, True, "waits"]
    items.put("still there")
    assert len(items) == 1


PATCHED = """
import gevent.monkey
gevent.monkey.patch_all()
import gevent, queue, threading
from tests.support.pairs import Greenlets, Line, serve, stream_of
from tests.support.waits import await_true
from syncstream import current_stream
from tests.runtime.waitables import WAITABLES, in_stream, waiter

place = Greenlets()
for name, make in WAITABLES.items():
    for timeout in (None, 0.02):
        waitable, seen = make(), []

        def source():
            try:
                seen.append("waits")
                seen.append(waiter(in_stream, waitable, timeout)())
            except queue.Empty:
                seen.append(False)
            yield "a"

        stream = stream_of(source(), Line())
        join = place.start(lambda: serve(stream))
        place.await_true(lambda: seen)
        gevent.sleep(0)
        if timeout is None:
            stream.stop()
        join()
        assert seen == (["waits"] if timeout is None else ["waits", False]), seen
        # (gevent puts queues of its own in the place of some.)
        condition = getattr(waitable, "not_empty", getattr(waitable, "_cond", waitable))
        assert not getattr(condition, "_waiters", ()), name
        if hasattr(waitable, "put"):
            waitable.put(1)
            assert waitable.get(timeout=1) == 1
"""


def test_the_standard_librarys_in_a_patched_process():
    """They wait in the hub, and end with the stream."""
    pytest.importorskip("gevent")
    assert check_script(PATCHED) == ""


@pytest.mark.parametrize("timeout", [-1, float("nan"), "1", [1]])
def test_time_limits_that_are_none(timeout):
    """Negative or not a number: said at once."""
    error = ValueError if isinstance(timeout, (int, float)) else TypeError
    with pytest.raises(error, match="timeout must be"):
        wait(queue.Queue(), timeout)


def test_waits_elsewhere_are_plain():
    """In another thread than the generator's, and in its own `finally`."""
    items, seen = queue.Queue(), []

    def helper(stream):
        with pytest.raises(queue.Empty):
            stream.wait(items, 0.1)
        seen.append("helper")

    def source():
        stream = current_stream()
        join = PLACE.start(lambda: helper(stream))
        try:
            seen.append("waits")
            sleep(60)
            yield
        finally:
            join()
            start = time.monotonic()
            sleep(0.02)
            with pytest.raises(queue.Empty):
                stream.wait(items, 0.02)
            seen.append(time.monotonic() - start >= 0.04)

    stream = stream_of(source(), Line())
    join = PLACE.start(lambda: serve(stream))
    await_true(lambda: seen)
    stream.stop()
    join()
    assert sorted(map(str, seen)) == ["True", "helper", "waits"]


@contextmanager
def interrupting(seen, ready=lambda: True, before=lambda: None):
    """Raise KeyboardInterrupt in the wait of the main thread, once it is `ready`.

    Args:
        seen: Has something once the interrupt has been caught.
        before: Called by the signal's handler, before it raises.
    """
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals come to the main thread")
    raised = []

    def is_waiting():
        # In the system call, or just before it: nothing is half done there.
        frame = sys._current_frames()[threading.main_thread().ident]
        return (
            frame.f_code is ThreadWait.wait.__code__ and "has_failed" in frame.f_locals
        )

    def interrupt():
        await_true(lambda: is_waiting() and ready())
        # More than one: what comes just before the system call does not end that.
        while not seen:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
            PLACE.pause()

    def raises(*args):
        if not raised:
            raised.append(True)
            before()
            raise KeyboardInterrupt

    handler = signal.signal(signal.SIGUSR1, raises)
    try:
        join = PLACE.start(interrupt)
        yield
        join()
    finally:
        signal.signal(signal.SIGUSR1, handler)


@pytest.mark.parametrize("kind", WAITABLES)
def test_an_interrupted_wait_leaves_no_waiter(kind):
    """KeyboardInterrupt in the main thread: raised, and the condition is as before."""
    waitable = WAITABLES[kind]()
    condition = getattr(waitable, "not_empty", getattr(waitable, "_cond", waitable))
    seen = []

    def source():
        try:
            waiter(in_stream, waitable)()
        except KeyboardInterrupt:
            seen.append("interrupted")
        yield "a"

    with interrupting(seen):
        assert len(serve(stream_of(source(), Line()))) == 2
    assert seen == ["interrupted"]
    assert not condition._waiters
    assert condition.acquire(blocking=False)
    condition.release()


@pytest.mark.parametrize("how", ["notified", "stopped"])
def test_an_interrupted_wait_passes_a_notification_on(how):
    """One that came in the same moment: to the next waiter. An end is its own."""
    condition, seen, others = threading.Condition(), [], []

    def source():
        with condition, pytest.raises(KeyboardInterrupt):
            in_stream(condition)
        seen.append("interrupted")
        yield "a"

    def other():
        await_true(lambda: condition._waiters)
        with condition:
            others.append(condition.wait(TIMEOUT))

    def notify():
        with condition:
            condition.notify()

    def before():
        notify() if how == "notified" else stream.thread_wait.wake()

    stream = stream_of(source(), Line())
    join = PLACE.start(other)
    with interrupting(seen, lambda: len(condition._waiters) == 2, before):
        assert len(serve(stream)) == 2
    assert len(condition._waiters) == (0 if how == "notified" else 1)
    if how == "stopped":
        notify()
    join()
    assert others == [True]


def test_waits_and_stops_race():
    """60 stops at any moment of a wait: each ends it, and none is lost."""
    items = queue.Queue()
    for n in range(60):
        waiting = Waiting(lambda n=n: in_stream(items) if n % 2 else sleep(60))
        if n % 3 == 0:
            waiting.await_wait()
        for stop in [PLACE.start(waiting.stream.stop) for _ in range(1 + n % 2)]:
            stop()
        waiting.join()
        assert waiting.seen == [GeneratorExit]


class InHub:
    """What wakes of a greenlet are called on."""

    def __init__(self, hub, switch):
        self.gevent_hub, self.switch = hub, switch


def test_a_greenlet_that_fails_keeps_no_other_asleep():
    """Those of one hub are woken in one callback: each, and the hub is told."""
    gevent = pytest.importorskip("gevent")
    woken, told = [], []

    def fail():
        raise LookupError("broken")

    class Hub:
        loop = gevent.get_hub().loop

        def handle_error(self, context, type, value, traceback):
            told.append((context, type))

    hub = Hub()
    waiters = [InHub(hub, fail), InHub(hub, lambda: woken.append(1))]
    wake_all(waiters)
    Greenlets().await_true(lambda: woken)
    assert told == [(waiters[0], LookupError)]


def test_a_wake_is_done_when_it_has_been_said():
    """Whoever is awake already, too: nobody is to try it again."""
    waiter = Waiter()
    assert waiter.wake() is True
    assert waiter.wake() is True


@pytest.mark.parametrize("timeout", [60, None])
def test_a_greenlets_wait_that_is_broken_off_can_be_gone_on_with(timeout):
    """A wake that comes afterwards ends the next wait, not what it does meanwhile."""
    gevent = pytest.importorskip("gevent")

    def run():
        waiter = Waiter()
        with gevent.Timeout(0.01, False):
            waiter.wait(timeout)
        wake_all([waiter])
        gevent.sleep(0.01)
        waiter.wait(timeout)
        return "woken"

    assert gevent.spawn(run).get(timeout=TIMEOUT) == "woken"


def test_a_greenlets_wait_has_no_time_left_when_it_was_woken():
    """Its timer does not end a later wait."""
    gevent = pytest.importorskip("gevent")

    def run():
        waiter = Waiter()
        wake_all([waiter])
        gevent.sleep(0)
        waiter.wait(None)
        gevent.spawn(wake_all, [waiter])
        waiter.wait(0.03)
        gevent.sleep(0.05)
        start = time.monotonic()
        waiter.wait(0.05)
        return time.monotonic() - start

    assert gevent.spawn(run).get(timeout=TIMEOUT) > 0.04


def test_a_stopped_greenlet_passes_a_notification_on():
    """Two wait for one thing; the first is notified, then stopped before it runs."""
    pytest.importorskip("gevent")
    assert check_script(PASS_ON) == ""


PASS_ON = """
import gevent.monkey
gevent.monkey.patch_all()
import gevent, threading
from tests.support.pairs import Line, serve, stream_of
from syncstream import current_stream
from syncstream.runtime.watch import watch

Queue = gevent.monkey.get_original("queue", "Queue")  # with gevent's locks

def in_condition(condition, stream):
    with condition:  # held where the stream's end arrives
        return stream.wait(condition)

def notify(condition):
    with condition:
        condition.notify()

for waitable, wait, give, waiters in (
    (queue := Queue(), lambda queue, stream: stream.wait(queue),
     lambda queue: queue.put(1), queue.not_empty._waiters),
    (condition := threading.Condition(), in_condition, notify, condition._waiters),
):
    got = []

    def source(name):
        yield name
        wait(waitable, current_stream())
        got.append(name)

    streams = {name: stream_of(source(name), Line()) for name in "ab"}
    greenlets = []
    for stream in streams.values():
        greenlets.append(gevent.spawn(serve, stream))
        while len(waiters) < len(greenlets):
            gevent.sleep(0.001)

    def notify_and_stop():
        give(waitable)
        streams["a"].stop("kicked")

    # In this callback, where it may as well be a later one.
    monitoring = gevent.spawn(watch).get()
    monitoring.run = lambda callback: callback()
    gevent.get_hub().loop.run_callback(notify_and_stop)
    gevent.joinall(greenlets, timeout=10)
    assert got == ["b"], (waitable, got)
"""
