"""`run_coroutine`: a thread or greenlet waits for what a coroutine returns."""

import asyncio
import contextlib
import contextvars
import signal
import subprocess
import sys
import threading

import pytest

from syncstream import NDJSONResponse
from syncstream.runtime.coroutines import run_coroutine
from tests.support.waits import TIMEOUT, await_true
from tests.wsgi.asking import get

variable = contextvars.ContextVar("variable", default="unset")


async def returning(value):
    await asyncio.sleep(0)
    return value


async def raising(error):
    await asyncio.sleep(0)
    raise error


def test_the_result_is_returned():
    """Of many at once, to each its own."""
    found = {}

    def run(n):
        found[n] = run_coroutine(returning(n))

    threads = [threading.Thread(target=run, args=(n,)) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert found == {n: n for n in range(10)}


@pytest.mark.parametrize("kind", [ValueError, SystemExit, KeyboardInterrupt])
def test_an_error_is_raised(kind):
    """It is the same object; other tasks of the loop go on."""
    error = kind("MARK")
    with pytest.raises(kind) as caught:
        run_coroutine(raising(error))
    assert caught.value is error
    assert run_coroutine(returning(1)) == 1


def test_a_cancel_that_is_not_ours():
    """It is an error: nobody has cancelled the caller."""
    with pytest.raises(RuntimeError, match="raising was cancelled") as caught:
        run_coroutine(raising(asyncio.CancelledError()))
    assert isinstance(caught.value.__cause__, asyncio.CancelledError)


def test_context_variables_come_back():
    """Those that the coroutine has set, and no others."""

    async def sets():
        found = variable.get()
        variable.set("inner")
        return found

    def run():
        variable.set("outer")
        assert run_coroutine(sets()) == "outer"
        assert variable.get() == "inner"
        with pytest.raises(ValueError, match="MARK"):
            run_coroutine(raising(ValueError("MARK")))

    contextvars.copy_context().run(run)
    assert variable.get() == "unset"


def test_in_the_loop_it_is_refused():
    """It would wait for itself, for ever."""

    async def source():
        try:
            run_coroutine(returning(1))
        except RuntimeError as error:
            yield str(error)

    assert b"await it" in get(NDJSONResponse(source())).data


class Interrupt(Exception):
    """What a signal's handler raises in the main thread."""


@contextlib.contextmanager
def interrupting(begun):
    """Raise it there once, when the event is set."""
    is_over, raised = threading.Event(), []

    def handle(number, frame):
        if begun.is_set() and not raised:
            raised.append(True)
            raise Interrupt

    def send():
        # Again and again: one that comes just before a wait does not end it.
        while not is_over.wait(0.01):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handle)
    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("end", ["cancelled", "failed"])
def test_an_interrupted_caller_cancels_it(end, caplog):
    """What it raises then is logged, as nobody waits for it."""
    story, begun = [], threading.Event()

    async def waits():
        begun.set()
        try:
            await asyncio.sleep(TIMEOUT)
        except asyncio.CancelledError:
            story.append("cancelled")
            if end == "failed":
                raise ValueError("MARK") from None
            raise

    with interrupting(begun), pytest.raises(Interrupt):
        run_coroutine(waits())
    await_true(lambda: story == ["cancelled"])
    if end == "failed":
        await_true(lambda: "ValueError: MARK" in caplog.text)
        assert "failed after its caller had gone" in caplog.text
    else:
        assert run_coroutine(returning(1)) == 1
        assert "had gone" not in caplog.text


IN_GEVENT = """
from gevent import monkey
monkey.patch_all()
import asyncio, gevent, time
from syncstream.runtime.coroutines import run_coroutine

async def slow(n):
    try:
        await asyncio.sleep(0.2)
    except asyncio.CancelledError:
        print("cancelled")
        raise
    return n

began = time.monotonic()
found = [gevent.spawn(run_coroutine, slow(n)) for n in range(5)]
gevent.joinall(found, raise_error=True)
print([each.value for each in found], time.monotonic() - began < 0.9)
try:
    with gevent.Timeout(0.01):
        run_coroutine(slow(1))
except gevent.Timeout:
    pass
print(run_coroutine(slow(2)))
"""


def test_greenlets_wait_in_their_hub():
    """They wait beside each other, and gevent's time-outs cancel."""
    output = subprocess.run(
        [sys.executable, "-c", IN_GEVENT],
        stdout=subprocess.PIPE,
        timeout=2 * TIMEOUT,
        check=True,
        text=True,
    ).stdout
    assert output.splitlines() == ["[0, 1, 2, 3, 4] True", "cancelled", "2"]
