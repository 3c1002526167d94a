"""The loop of asynchronous sources: what they may use."""

import asyncio
import sys
import threading

import pytest

from syncstream import SSEResponse
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
