"""What a generator may wait for, and a stream that does."""

import queue
import threading

from syncstream import current_stream
from tests.support.pairs import (
    Line,
    Threads,
    serve,
    stream_of,
)
from tests.support.waits import TIMEOUT, await_true

PLACE = Threads()


class Waiting:
    """A stream whose generator waits by a function, in a thread."""

    def __init__(self, function, line=None, *, final=lambda: None):
        self.seen = []
        self.entered = threading.Event()

        def source():
            try:
                self.entered.set()
                self.seen.append(function())
                yield "a"
            except GeneratorExit as error:
                self.seen.append(type(error))
                raise
            finally:
                self.final = final()

        self.stream = stream_of(source(), line or Line())
        self.join = PLACE.start(lambda: serve(self.stream))
        assert self.entered.wait(TIMEOUT)

    def await_wait(self):
        await_true(lambda: self.stream.thread_wait)


def waiter(stream_wait, waitable, timeout=None):
    """Return a wait for something; a condition is held meanwhile."""
    if hasattr(waitable, "notify"):

        def held():
            with waitable:
                return stream_wait(waitable, timeout)

        return held
    return lambda: stream_wait(waitable, timeout)


def in_stream(waitable, timeout=None):
    return current_stream().wait(waitable, timeout)


WAITABLES = {
    "Queue": queue.Queue,
    "LifoQueue": queue.LifoQueue,
    "PriorityQueue": queue.PriorityQueue,
    "Event": threading.Event,
    "Condition": threading.Condition,
    "Condition, Lock": lambda: threading.Condition(threading.Lock()),
}
