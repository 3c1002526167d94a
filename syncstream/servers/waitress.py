"""waitress."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from ..runtime.process import Stopping
from .contract import Environ, Headers, Server, SocketLike, Write, at_once, running

__all__ = ["SERVER"]


def _channel(environ: Environ) -> Any:
    # The callable is a bound method of the channel.
    return environ["waitress.client_disconnected"].__self__


def _socket(environ: Environ) -> SocketLike | None:
    socket: SocketLike | None = _channel(environ).socket
    return socket


def _headers(write: Write) -> Headers | None:
    task = getattr(write, "__self__", None)
    headers: Headers | None = getattr(task, "response_headers", None)
    return headers


def _start_response(environ: Environ) -> Any:
    return running("waitress.task", "__closure__", name="start_response")


def _own_write(environ: Environ) -> Write | None:
    task = running("waitress.task", "response_headers")
    write: Write | None = getattr(task, "write", None)
    return write


def _unsent(environ: Environ) -> int:
    # At most outbuf_high_watermark, 16 MiB by default; 0 once it is closed (3.0).
    unsent: int = _channel(environ).total_outbufs_len
    return unsent


def _drop(environ: Environ) -> None:
    # The main thread waits for room with select(2), which never reports a full Unix
    # socket as writable, even after a shutdown. Only the main thread may close it.
    channel = _channel(environ)
    channel.server.trigger.pull_trigger(channel.handle_close)  # 3.0; harmless twice


def _stopping(environ: Environ) -> Stopping:
    server = _channel(environ).server
    dispatcher = server.task_dispatcher

    def is_stopping() -> bool:
        # Ctrl-C tells every thread to stop, and waits 5 s for busy ones (3.0).
        # close() keeps the threads, but stops accepting.
        return len(dispatcher.threads) <= dispatcher.stop_count or not server.accepting

    return at_once(is_stopping)


def _threads(environ: Environ) -> int | None:
    threads: int = _channel(environ).adj.threads
    return threads


def _stays(environ: Environ) -> str | None:
    if _channel(environ).adj.channel_request_lookahead:
        # The main thread then reads while a request is served, and may close the
        # descriptor at any time.
        return "waitress reads ahead (channel_request_lookahead)"
    return None


def _lock(environ: Environ) -> AbstractContextManager[Any]:
    # A condition with a reentrant lock. The main thread holds it while it sends, and
    # while it clears ``connected`` before closing (3.0: handle_close).
    lock: AbstractContextManager[Any] = _channel(environ).outbuf_lock
    return lock


SERVER = Server(
    "waitress",
    runs=lambda environ: "waitress.client_disconnected" in environ,
    socket=_socket,
    is_tls=lambda environ: False,
    unread=lambda environ: 0,  # it has received all before it calls the application
    write_module="waitress.task",
    headers=_headers,
    own_write=_own_write,
    start_response=_start_response,
    unsent=_unsent,
    drop=_drop,
    closes_early=True,  # if a send fails in its main thread
    stopping=_stopping,
    threads=_threads,
    key=lambda environ: _channel(environ).server,
    stays=_stays,
    lock=_lock,
    is_closing=lambda environ: not _channel(environ).connected,
    closes_first=True,
)
