"""The loop of asynchronous sources: what they may use, with gevent and without."""

import asyncio
import sys
import threading
import time

import pytest

from syncstream import SSEResponse
from tests.support.pairs import check_script
from tests.wsgi.asking import get


def items_of(source):
    """Return what a source's response sends, without the opening."""
    return get(SSEResponse(source), buffered=True).data.removeprefix(b": ok\n\n")


def test_the_thread_has_a_name():
    """Tools such as py-spy show it."""

    async def source():
        yield threading.current_thread().name

    assert items_of(source()) == b"data: syncstream-asyncio\n\n"
    assert "syncstream-asyncio" in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("kind", ["exec", "shell"])
def test_a_source_starts_a_process(kind):
    """The loop is not in the main thread, where some of asyncio's watchers must be."""

    async def source():
        pipe = asyncio.subprocess.PIPE
        code = "print(input())"
        if kind == "exec":
            start = asyncio.create_subprocess_exec(
                sys.executable, "-c", code, stdin=pipe, stdout=pipe
            )
        else:
            start = asyncio.create_subprocess_shell(
                f"{sys.executable} -c '{code}'; exit 3", stdin=pipe, stdout=pipe
            )
        process = await start
        found, _ = await process.communicate(b"found")
        yield found.decode().strip()
        yield str(process.returncode)

    code = b"0" if kind == "exec" else b"3"
    assert items_of(source()) == b"data: found\n\ndata: %s\n\n" % code


def test_a_source_calls_what_is_thread_sensitive():
    """As Django's asynchronous ORM does."""
    sync_to_async = pytest.importorskip("asgiref.sync").sync_to_async
    assert sync_to_async(threading.get_ident)._thread_sensitive

    async def source():
        idents = {await sync_to_async(threading.get_ident)() for _ in range(3)}
        yield str(len(idents - {threading.get_ident()}))

    assert items_of(source()) == b"data: 1\n\n"


GEVENT = """
from gevent import monkey
monkey.patch_all()
import asyncio, logging, socket, threading, time
import gevent
from gevent.event import Event
from syncstream import StreamResponse
from tests.wsgi.asking import get

native = monkey.get_original
ident, pause = native("_thread", "get_ident"), native("time", "sleep")
for name in ("asyncio", "syncstream.stream"):  # a slow machine has blocked the loop
    logging.getLogger(name).setLevel("ERROR")

def body_of(source):
    return get(StreamResponse(source), buffered=True).get_data(True)

def run(make):
    async def source():
        found.append(await make())
        yield ""
    found = []
    body_of(source())
    return found[0]
"""


def test_gevent_a_call_in_a_thread_blocks_no_source():
    """Even one that gevent does not know: another source ends it."""
    pytest.importorskip("gevent")
    assert check_script(GEVENT + BLOCKS) == "True\nTrue\n"


BLOCKS = """
lock = native("_thread", "allocate_lock")()
lock.acquire()
began = []

def blocks():
    began.append(ident())
    return lock.acquire(True, 10), ident()

async def waits():
    is_free, thread = await asyncio.to_thread(blocks)
    yield f"{is_free}\\n{thread != ident()}\\n"

async def releases():
    while not began:
        await asyncio.sleep(0.001)
    lock.release()
    yield ""

both = [gevent.spawn(body_of, source()) for source in (waits, releases)]
gevent.joinall(both, timeout=15)
print(both[0].value, end="")
"""


def test_gevent_what_it_has_patched_works_in_a_thread():
    """Waits of both hubs, look-ups, and the "threads" that the call itself starts."""
    pytest.importorskip("gevent")
    assert check_script(GEVENT + PATCHED) == ""


PATCHED = """
lock, by_hub, left = threading.Lock(), threading.Event(), threading.Event()
is_held = Event()

def holds():
    with lock:
        is_held.set()
        gevent.sleep(0.02)
    by_hub.set()

def leaves():
    "Runs on when the call has returned."
    time.sleep(0.02)
    left.set()

def calls():
    with lock:
        time.sleep(0.01)
    assert by_hub.wait(10)
    assert socket.getaddrinfo("localhost", 80)
    near, far = socket.socketpair()
    with near, far:
        threading.Thread(target=lambda: (time.sleep(0.01), far.send(b"x"))).start()
        assert near.recv(1) == b"x"
    threading.Thread(target=leaves).start()
    return "done"

async def main():
    return await asyncio.to_thread(calls)

held = gevent.spawn(holds)
is_held.wait()
assert run(main) == "done"
assert left.wait(10)

async def look_up():
    return await asyncio.get_running_loop().getaddrinfo("localhost", 80)

assert run(look_up)

# As many threads as asyncio has, in which all calls are made.
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor() as executor:
    most = executor._max_workers

def takes(n):
    pause(0.01)
    return n, ident()

async def many():
    return await asyncio.gather(*(asyncio.to_thread(takes, n) for n in range(3 * most)))

found = run(many)
assert [n for n, _ in found] == list(range(3 * most))
assert 1 < len({thread for _, thread in found}) <= most

# One that waits for a thread and is cancelled is never made.
may_end = native("_thread", "allocate_lock")()
may_end.acquire()
made = []

def holds_a_thread():
    with may_end:
        pass

def in_thread(*call):
    return asyncio.ensure_future(asyncio.to_thread(*call))

async def cancelled():
    first = [in_thread(holds_a_thread) for _ in range(most)]
    last = in_thread(made.append, 1)
    await asyncio.sleep(0.01)
    last.cancel()
    may_end.release()
    await asyncio.gather(*first)
    return await asyncio.gather(asyncio.to_thread(str, 2), last, return_exceptions=True)

result, problem = run(cancelled)
assert (result, type(problem), made) == ("2", asyncio.CancelledError, [])

# What a call raises.
def raises(error):
    raise error

async def exits():
    try:
        await asyncio.to_thread(raises, SystemExit("MARK"))
    except SystemExit as error:
        return str(error)

assert run(exits) == "MARK"

async def stops(kind):
    try:
        await asyncio.to_thread(raises, kind("MARK"))
    except Exception as error:
        return type(error).__name__, str(error.__cause__ or error)

assert run(lambda: stops(ValueError)) == ("ValueError", "MARK")
assert run(lambda: stops(StopIteration)) == ("RuntimeError", "MARK")

# An executor of the application's own is used.
class Own(ThreadPoolExecutor):
    def submit(self, *call):
        made.append(call)
        return super().submit(*call)

async def own():
    with Own(1) as executor:
        asyncio.get_running_loop().set_default_executor(executor)
        return await asyncio.to_thread(str, 3)

assert (run(own), len(made)) == ("3", 1)
"""


def test_gevent_an_upstream_is_read_with_httpx():
    """By its name, from a server in the other hub."""
    pytest.importorskip("gevent")
    pytest.importorskip("httpx")
    assert check_script(GEVENT + UPSTREAM) == "from upstream"


UPSTREAM = """
import httpcore, httpx  # first here: one of their modules starts a process
from gevent.pywsgi import WSGIServer

def upstream(environ, start_response):
    start_response("200 OK", [])
    yield b"from "
    gevent.sleep(0.01)
    yield b"upstream"

async def source():
    url = f"http://localhost:{server.server_port}/"
    async with httpx.AsyncClient(verify=False) as client:
        async with client.stream("GET", url) as response:
            async for text in response.aiter_text():
                yield text

server = WSGIServer(("localhost", 0), upstream, log=None)
server.start()
print(body_of(source()), end="")
server.stop()
"""


def test_gevent_what_cannot_work_names_the_cure():
    """Processes, and asgiref's one thread, which is a greenlet of another hub's."""
    pytest.importorskip("gevent")
    pytest.importorskip("asgiref")
    assert check_script(GEVENT + REFUSED) == ""


REFUSED = """
from asgiref.sync import sync_to_async

async def exec():
    await asyncio.create_subprocess_exec("true")

async def shell():
    await asyncio.create_subprocess_shell("true")

async def sensitive():
    await sync_to_async(str)(1)

async def attempt(make):
    try:
        await make()
    except RuntimeError as error:
        return str(error)

for make, what in ((exec, "start a process"), (shell, "start a process"),
                   (sensitive, "sync_to_async")):
    problem = run(lambda: attempt(make))
    assert what in problem and "-k gthread" in problem, problem

async def insensitive():
    return await sync_to_async(str, thread_sensitive=False)(1)

assert run(insensitive) == "1"
"""


def test_gevent_threads_end_with_the_process():
    """One whose call does not end holds nothing up."""
    pytest.importorskip("gevent")
    began = time.monotonic()
    assert check_script(GEVENT + ENDS) == "main\n"
    assert time.monotonic() - began < 15


ENDS = """
async def source():
    await asyncio.gather(*(asyncio.to_thread(pause, 0.01) for _ in range(3)))
    task = asyncio.ensure_future(asyncio.to_thread(pause, 60))
    yield b"a"
    await task

chunks = get(StreamResponse(source())).iter_encoded()
assert next(chunks) == b"a"
print("main")
"""
