"""Native threads that do jobs while their callers wait."""

import collections
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from syncstream.brokers.local.threads import Job, Thread
from syncstream.runtime.waiter import Turn
from tests.support.waits import TIMEOUT, await_true


def test_a_thread_works_when_it_is_woken():
    """Once for each time; and it tells that it has ended."""
    served = []
    thread = Thread("the log", lambda: served.append(thread.take()))
    job = Job()
    thread.add(job)
    await_true(lambda: served)
    time.sleep(0.05)
    assert served == [job]
    assert thread.close(time.monotonic() + TIMEOUT)


def test_a_job_that_comes_at_the_end_is_done():
    """Or refused; a thread that has just ended keeps none."""
    adding, ended = threading.Event(), threading.Event()

    class Slow(collections.deque):
        def append(self, job):
            adding.set()
            ended.wait(0.2)
            super().append(job)

    def serve():
        while thread.jobs and (job := thread.take()) is not None:
            job.end()

    thread = Thread("the log", serve)
    thread.add(Job()).wait(time.monotonic() + TIMEOUT)
    thread.jobs = Slow()
    with ThreadPoolExecutor(1) as pool:
        turn = pool.submit(thread.add, Job())
        assert adding.wait(TIMEOUT)
        assert thread.close(time.monotonic() + TIMEOUT)
        ended.set()
        assert turn.result().wait(time.monotonic() + 1)


def test_a_job_is_taken_or_given_up():
    """Not both, whoever is in the middle of it."""
    taking, tried = threading.Event(), threading.Event()

    class Slow(collections.deque):
        def popleft(self):
            job = super().popleft()
            taking.set()
            tried.wait(0.2)
            return job

    thread, job = Thread("the log", lambda: None), Job()
    thread.jobs = Slow([job])
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(thread.take)
        assert taking.wait(TIMEOUT)
        assert not thread.give_up(job)
        tried.set()
        assert taken.result() is job


def test_a_thread_that_ends_waits_for_whoever_ends_it():
    """Two may end it at once: both are told, and `leave` is called once."""
    left, told = [], threading.Event()

    def leave():
        left.append(threading.get_native_id())
        told.set()

    thread = Thread("the log", lambda: None, leave)
    first, second = Turn(), Turn()
    with thread.lock:  # the second one is in the middle of `end`
        assert thread.end(first)
        assert told.wait(TIMEOUT)
        time.sleep(0.05)
        assert thread.end(second)
    assert first.wait(time.monotonic() + TIMEOUT)
    assert second.wait(time.monotonic() + TIMEOUT)
    assert len(left) == 1
