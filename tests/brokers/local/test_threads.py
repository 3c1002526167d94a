"""Native threads that do jobs while their callers wait."""

import time

from syncstream.brokers.local.threads import Job, Thread
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
