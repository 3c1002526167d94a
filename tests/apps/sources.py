"""The generators of the live tests: a table of names, the same for all frameworks.

Each tells the test what becomes of it, under the key that the request names.
"""

import asyncio
import os
import queue
import socket
import threading
import time
from contextlib import asynccontextmanager, suppress

from syncstream import current_stream, sleep
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


def noted_async(source):
    """Note an asynchronous source's start, and its end after an await."""

    @asynccontextmanager
    async def told(key):
        try:
            yield
        finally:
            await asyncio.sleep(0)
            note(f"{key}-left", "left")

    async def run(key):
        note(f"{key}-started", os.getpid())
        how = "finished"
        try:
            async with told(key):
                async for item in source(key):
                    yield item
        except BaseException as error:
            how = type(error).__name__
            raise
        finally:
            await asyncio.sleep(0.01)
            note(f"{key}-ended", how)

    return run


@noted_async
async def async_gated(key):
    """Yield 0, 1, 2 …, each when the test opens the gate."""
    n = 0
    while True:
        await asyncio.to_thread(gate, key)
        yield n
        n += 1


@noted_async
async def async_waiting(key):
    """Yield once, and wait."""
    yield 0
    note(f"{key}-waiting", True)
    await asyncio.sleep(60)


async def async_unencodable(key):
    """Yield what is no JSON; a handler at the yield sees why."""
    try:
        yield {1, 2}
    except TypeError as error:
        yield f"thrown: {type(error).__name__}"


@noted_async
async def async_checkpoints(key):
    """Yield nothing for a while, without an await; others have their turns."""
    await asyncio.to_thread(gate, key)
    for _ in range(1000):
        yield None
    yield "something"


@noted_async
async def async_half(key):
    """Yield half an event, wait, and yield its rest."""
    yield b"data: a"
    await asyncio.to_thread(gate, key)
    yield b"b\n\n"
    await asyncio.to_thread(gate, key)


@noted_async
async def async_incomplete(key):
    """Yield an event without the blank line behind it."""
    yield b"data: a"
    yield b"\n"


@noted_async
async def async_aborted(key):
    """Answer by a status, too late."""
    yield 0
    from werkzeug.exceptions import NotFound

    raise NotFound


@noted_async
async def async_own(key):
    """Use its own stream, which has left its server."""
    stream = current_stream()
    await asyncio.to_thread(gate, key)
    stream.on_close(lambda: note(f"{key}-told", stream.reason))
    yield [stream is current_stream(), stream.connected, stream.last_event_id]
    stream.stop("finished")
    await asyncio.sleep(60)


@noted_async
async def async_linked(key):
    """Read in a thread from what never answers; it is linked."""
    ours, theirs = socket.socketpair()

    def read():
        note(f"{key}-waiting", True)
        with suppress(OSError):  # it may be closed by now
            ours.recv(1)
        note(f"{key}-read", "ended")

    current_stream().link(ours)
    with theirs:
        yield 0
        await asyncio.to_thread(read)


async def async_slow_end(key):
    """Yield, wait, and take long to end."""
    try:
        yield 0
        note(f"{key}-waiting", True)
        await asyncio.sleep(60)
    finally:
        note(f"{key}-ending", True)
        await asyncio.sleep(2)
        note(f"{key}-ended", "in time")


@noted_async
async def async_large(key):
    """Yield more at once than a connection takes, twice."""
    yield "a" * 3_000_000
    yield "b" * 3_000_000


@noted_async
async def async_text(key):
    """Yield text, and wait."""
    yield None
    yield "some text"
    note(f"{key}-waiting", True)
    await asyncio.sleep(60)


@noted_async
async def async_three(key):
    """Yield three numbers."""
    for n in range(3):
        await asyncio.sleep(0.001)
        yield n


@noted_async
async def async_broken(key):
    """Fail before the first item."""
    raise RuntimeError("MARK")
    yield


@noted_async
async def async_failing(key):
    """Fail after the first item."""
    yield 0
    raise RuntimeError("MARK")


@noted_async
async def async_looking_up(key):
    """Use what an upstream's client uses: a host's address, a thread, httpx."""
    import httpx

    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo("localhost", 80)
    yield "found" if found else "not found"
    yield await asyncio.to_thread(str, "a thread")

    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nan answer\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server, httpx.AsyncClient(trust_env=False) as client:
        port = server.sockets[0].getsockname()[1]
        async with client.stream("GET", f"http://localhost:{port}/") as response:
            async for line in response.aiter_lines():
                yield line


SOURCES = {
    "async-gated": async_gated,
    "async-waiting": async_waiting,
    "async-text": async_text,
    "async-aborted": async_aborted,
    "async-checkpoints": async_checkpoints,
    "async-half": async_half,
    "async-incomplete": async_incomplete,
    "async-large": async_large,
    "async-linked": async_linked,
    "async-slow-end": async_slow_end,
    "async-own": async_own,
    "async-three": async_three,
    "async-unencodable": async_unencodable,
    "async-broken": async_broken,
    "async-failing": async_failing,
    "async-looking-up": async_looking_up,
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


def noted_push(view):
    """Note a pushing view's start, its end, and the thread of both."""

    def run(sse, key):
        note(f"{key}-started", os.getpid())
        thread = threading.get_ident()
        how = "finished"
        try:
            view(sse, key)
        except BaseException as error:
            how = type(error).__name__
            raise
        finally:
            sleep(0.001)
            note(f"{key}-ended", [how, threading.get_ident() == thread])

    return run


@noted_push
def push_gated(sse, key):
    """Send 0, 1, 2 …, each when the test opens the gate."""
    n = 0
    while True:
        gate(key)
        sse.send(n)
        n += 1


@noted_push
def push_three(sse, key):
    """Send three numbers."""
    for n in range(3):
        sse.send(n)


@noted_push
def push_failing(sse, key):
    """Fail after the first event."""
    sse.send(0)
    raise RuntimeError("MARK")


def push_waiting(wait):
    """Return a view that sends once, and waits."""

    @noted_push
    def view(sse, key):
        sse.send(0)
        note(f"{key}-waiting", True)
        wait()

    return view


def receive():
    """Wait in a socket for what never comes."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.accept()


def noted_async_push(view):
    """Note a pushing coroutine's start, and its end after an await."""

    @asynccontextmanager
    async def told(key):
        try:
            yield
        finally:
            await asyncio.sleep(0)
            note(f"{key}-left", "left")

    async def run(sse, key):
        note(f"{key}-started", os.getpid())
        how = "finished"
        try:
            async with told(key):
                await view(sse, key)
        except BaseException as error:
            how = type(error).__name__
            raise
        finally:
            await asyncio.sleep(0.01)
            note(f"{key}-ended", how)

    return run


@noted_async_push
async def async_push_gated(sse, key):
    """Send 0, 1, 2 …, each when the test opens the gate."""
    n = 0
    while True:
        await asyncio.to_thread(gate, key)
        await sse.send(n)
        n += 1


@noted_async_push
async def async_push_waiting(sse, key):
    """Send once, and wait."""
    await sse.send(0)
    note(f"{key}-waiting", True)
    await asyncio.sleep(60)


@noted_async_push
async def async_push_three(sse, key):
    """Send three numbers."""
    for n in range(3):
        await asyncio.sleep(0.001)
        await sse.send(n)


@noted_async_push
async def async_push_failing(sse, key):
    """Fail after the first event."""
    await sse.send(0)
    raise RuntimeError("MARK")


PUSHED = {
    "gated": push_gated,
    "three": push_three,
    "failing": push_failing,
    "waiting": push_waiting(lambda: sleep(60)),
    "waiting-stream": push_waiting(lambda: current_stream().wait(queue.Queue())),
    # These are interrupted where gevent has patched them.
    "waiting-time": push_waiting(lambda: time.sleep(60)),
    "waiting-queue": push_waiting(lambda: queue.Queue().get()),
    "waiting-socket": push_waiting(receive),
}
ASYNC_PUSHED = {
    "gated": async_push_gated,
    "three": async_push_three,
    "failing": async_push_failing,
    "waiting": async_push_waiting,
}


def as_sse(items):
    """Frame items as a hand-written view does."""
    for item in items:
        yield f"data: {item}\n\n".encode()
