"""The generators of the live tests: a table of names, the same for all frameworks.

Each tells the test what becomes of it, under the key that the request names.
"""

import os
import threading

from syncstream import sleep
from tests.apps.control import gate, note


def noted(source):
    """Note a source's start, its end, and the thread of both."""

    def run(key):
        note(f"{key}-started", os.getpid())
        thread = threading.get_ident()
        how = "finished"
        try:
            yield from source(key)
        except BaseException as error:
            how = type(error).__name__
            raise
        finally:
            note(f"{key}-ended", [how, threading.get_ident() == thread])

    return run


@noted
def gated(key):
    """Yield 0, 1, 2 …, each when the test opens the gate."""
    n = 0
    while True:
        gate(key)
        yield n
        n += 1


@noted
def ticking(key):
    """Yield numbers without an end, pausing as a plain program would."""
    import time

    n = 0
    while True:
        yield n
        n += 1
        time.sleep(0.02)


@noted
def waiting(key):
    """Yield once, and wait."""
    yield 0
    sleep(60)


@noted
def three(key):
    """Yield three numbers."""
    yield from range(3)


@noted
def silent(key):
    """Wait for the gate, then end."""
    gate(key)
    return
    yield


@noted
def broken(key):
    """Fail before the first item."""
    raise RuntimeError("MARK")
    yield


def raising(error):
    @noted
    def source(key):
        yield 0
        raise error("MARK")

    return source


SOURCES = {
    "gated": gated,
    "ticking": ticking,
    "waiting": waiting,
    "three": three,
    "silent": silent,
    "broken": broken,
    **{
        f"raise-{error.__name__}": raising(error)
        for error in (GeneratorExit, SystemExit, KeyboardInterrupt, RuntimeError)
    },
}


def as_sse(items):
    """Frame items as a hand-written view does."""
    for item in items:
        yield f"data: {item}\n\n".encode()
