"""An asynchronous source's task, as the loop of `fanout` reads it."""

import asyncio
import threading

import pytest

from syncstream.runtime.event_loop import event_loop
from syncstream.streams.async_task import SourceTask
from tests.support.waits import TIMEOUT, await_true


class Reader:
    """Takes a task's answers, encoded; it is what the task wakes."""

    gevent_hub = None

    def __init__(self, source):
        self.task = SourceTask(source)
        self.task.encode = lambda item: None if item is None else b"%d" % item
        self._woken = threading.Semaphore(0)

    def wake(self):
        self._woken.release()

    def ask(self):
        self.task.ask(None, self)

    def take(self):
        while not self.task.has_answered:
            assert self._woken.acquire(timeout=TIMEOUT)
        return self.task.take()

    def rest(self):
        """Take all that comes until the source's end."""
        found = []
        while True:
            try:
                found.append(self.take())
            except StopIteration:
                return found
            self.ask()


class Asked:
    """A source as a view that sends: it waits until its items are taken."""

    must_be_asked = True

    def __init__(self, items):
        self._items = items

    def __aiter__(self):
        return self._items

    async def aclose(self):
        await self._items.aclose()


def let_the_loop_run(rounds=5):
    for _ in range(rounds):
        done = threading.Event()
        event_loop().call(done.set)
        assert done.wait(TIMEOUT)


@pytest.mark.parametrize(
    ("pause", "must_be_asked", "ahead"),
    [(True, False, 1), (False, False, 0), (True, True, 0)],
)
def test_how_far_a_source_goes_ahead(pause, must_be_asked, ahead):
    """By one item, if it waits for something: others would have no turn otherwise."""
    made = []

    async def numbers():
        for n in range(4):
            if pause:
                await asyncio.sleep(0)
            made.append(n)
            yield n

    reader = Reader(Asked(numbers()) if must_be_asked else numbers())
    reader.ask()
    for n in range(3):
        expected = [*range(n + 1 + ahead)]
        await_true(lambda expected=expected: made == expected)
        let_the_loop_run()
        assert made == expected
        assert reader.take() == b"%d" % n
        reader.ask()
    assert reader.rest() == [b"3"]


@pytest.mark.parametrize("fails", [False, True])
def test_an_end_comes_behind_the_items(fails):
    """Of those that were made before it was known that there are no more."""
    ended = threading.Event()

    async def two():
        try:
            for n in range(2):
                await asyncio.sleep(0)
                yield n
            if fails:
                raise ZeroDivisionError
        finally:
            ended.set()

    reader = Reader(two())
    reader.ask()
    assert reader.take() == b"0"
    reader.ask()
    assert ended.wait(TIMEOUT)
    let_the_loop_run()
    assert reader.take() == b"1"
    reader.ask()
    with pytest.raises(ZeroDivisionError if fails else StopIteration):
        reader.take()


@pytest.mark.parametrize("every", [1, 2, 3])
def test_nothing_is_lost_between_two_threads(every):
    """Whichever of them is the faster one; checkpoints among the items."""

    async def numbers():
        for n in range(3_000):
            if n % every == 0:
                await asyncio.sleep(0)
            if n % 100 == 0:
                yield None
            yield n

    reader = Reader(numbers())
    reader.ask()
    assert reader.rest() == [b"%d" % n for n in range(3_000)]


def test_a_cancel_of_others_waits_for_the_item():
    """It is thrown in at the yield, and the item that was made before comes first."""
    tasks = []

    async def numbers():
        tasks.append(asyncio.current_task())
        try:
            for n in range(9):
                await asyncio.sleep(0)
                yield n
        except asyncio.CancelledError:
            yield 77

    reader = Reader(numbers())
    reader.ask()
    await_true(lambda: reader.task.has_answered)
    let_the_loop_run()  # 1 is made, and waits
    event_loop().call(lambda: tasks[0].cancel())
    let_the_loop_run()
    assert reader.rest() == [b"0", b"1", b"77"]
