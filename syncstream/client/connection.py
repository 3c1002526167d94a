"""`Connection`: one request and its response, which any thread can end.

``close()`` of a response that another thread reads from ends no read. What ends it is
a shutdown of the socket, by its descriptor, of which a duplicate is kept: its number
stays ours although the reader closes the connection meanwhile.

The module imports requests, and nothing imports it before an `EventSource` is made.
"""

from __future__ import annotations

import _socket
import _thread
import copy
from collections import OrderedDict
from collections.abc import Callable
from contextvars import ContextVar
from http.client import HTTPException, HTTPResponse, IncompleteRead
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection

from ..errors import ConnectError
from ..runtime.sockets import hang_up, native
from .chunked import ChunkedBody
from .responses import READ_SIZE

__all__ = ["Connection", "Requests", "Response", "Session"]

Response = requests.Response
Session = requests.Session

CONNECT_TIMEOUT = 10.0  # seconds for the TCP connection, as Go's and curl's clients'

_FAILURES = (OSError, urllib3.exceptions.HTTPError, HTTPException)
# What the caller has got wrong is a ValueError, too. requests' own errors are OSErrors.
_WRONG = (ValueError, requests.exceptions.UnrewindableBodyError)

_opening: ContextVar[Connection | None] = ContextVar("opening", default=None)


class Connection:
    """One attempt: its request, its response, and its end from any thread.

    Attributes:
        is_shut: Whether `shut` was called.
    """

    def __init__(self) -> None:
        self.is_shut = False
        # Held for a moment only, never while waiting: good for gevent's hubs, too.
        self._lock: Any = native(_thread, "allocate_lock")()
        self._is_in_use = False  # a thread or greenlet opens it or reads it
        self._body: Response | None = None
        self._fd = -1

    def open(self, send: Callable[[], Response]) -> Response | None:
        """Send the request; return the response, whose body is not read yet.

        Returns:
            ``None`` if another thread has ended it.

        Raises:
            ConnectError: There is no response.
            ValueError: The request cannot be sent, such as one with a wrong URL.
        """
        if not self._enter():
            return None
        token = _opening.set(self)
        try:
            self._body = send()
            self.hold(_fileno(self._body.raw))
            return None if self.is_shut else self._body
        except requests.TooManyRedirects as error:
            status = error.response.status_code if error.response is not None else None
            raise ConnectError("the server redirects too often", status) from error
        except _WRONG:
            raise
        except _FAILURES as error:
            if self.is_shut:
                return None
            raise ConnectError(f"no response: {_name(error)}") from error
        finally:
            _opening.reset(token)
            self._leave()

    def read(self) -> bytes:
        """Return the next bytes of the body, decoded, as soon as there are any.

        Returns:
            ``b""`` at the body's end, and when another thread has ended it.

        Raises:
            ConnectError: The connection broke, or the server was silent for too long.
        """
        if self._body is None or not self._enter():
            return b""
        try:
            data: bytes = self._body.raw.read1(READ_SIZE, decode_content=True)
            return data
        except _FAILURES as error:
            if self.is_shut:
                return b""
            raise ConnectError(f"the response broke off: {_name(error)}") from error
        finally:
            self._leave()

    def shut(self) -> None:
        """End it at once, and what another thread is doing with it; from any thread."""
        with self._lock:
            self.is_shut = True
            is_in_use = self._is_in_use
            if self._fd >= 0:
                hang_up(self._fd)
        if not is_in_use:  # otherwise whoever uses it disposes of it
            self._dispose()

    def hold(self, fd: int) -> None:
        """Remember the socket that is read from now on."""
        if fd < 0:
            return
        with self._lock:
            before, self._fd = self._fd, _socket.dup(fd)
            if self.is_shut:
                hang_up(self._fd)
        if before >= 0:
            _socket.close(before)

    def _enter(self) -> bool:
        with self._lock:
            self._is_in_use = not self.is_shut
            return self._is_in_use

    def _leave(self) -> None:
        with self._lock:
            self._is_in_use = False
            is_shut = self.is_shut
        if is_shut:
            self._dispose()

    def _dispose(self) -> None:
        with self._lock:
            fd, self._fd = self._fd, -1
            body, self._body = self._body, None
        if fd >= 0:
            _socket.close(fd)
        if body is not None:
            body.close()


def _fileno(raw: Any) -> int:
    try:
        fd: int = raw.fileno()
    except (AttributeError, OSError, ValueError):  # an empty body, or one of memory
        return -1
    return fd


def _name(error: BaseException) -> str:
    """Return an error's cause, without a URL, which may hold a token."""
    reason = getattr(error, "reason", None) or (error.args[0] if error.args else None)
    if isinstance(reason, BaseException) and reason is not error:
        return _name(reason)
    return type(error).__name__


class _Lines:
    """A head's lines, and the last one that was read."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.last = b""

    def readline(self, limit: int = -1) -> bytes:
        self.last = self._file.readline(limit)
        return self.last

    def close(self) -> None:
        self._file.close()


class _Response(HTTPResponse):
    """A response with a whole head, which reads all chunks that have come at once.

    ``http.client`` takes a head that breaks off for one that is complete: a 200 without
    a Content-Type, say.
    """

    _chunks: ChunkedBody | None = None
    fp: Any

    def begin(self) -> None:
        file = self.fp
        self.fp = lines = _Lines(file)
        try:
            super().begin()
        finally:
            if self.fp is lines:  # it is not closed
                self.fp = file
        if not lines.last:
            self.close()
            raise IncompleteRead(b"")

    def read1(self, size: int = -1) -> bytes:
        if not self.chunked or self.fp is None:
            return super().read1(size)
        if self._chunks is None:
            self._chunks = ChunkedBody()
        while not self._chunks.is_complete:
            received = self.fp.read1(size)
            if not received:
                raise IncompleteRead(b"")
            try:
                data = self._chunks.feed(received)
            except ValueError as error:
                raise HTTPException(str(error)) from error
            if data:
                return data
        self.close()  # the connection is free for another request
        return b""


class _Watched:
    """A connection of urllib3 that tells its socket before it waits for an answer."""

    sock: Any

    def getresponse(self) -> Any:
        opening = _opening.get()
        if opening is not None and self.sock is not None:
            opening.hold(self.sock.fileno())
        return super().getresponse()  # type: ignore[misc]


class _WatchedHTTP(_Watched, HTTPConnection):
    response_class = _Response


class _WatchedHTTPS(_Watched, HTTPSConnection):
    response_class = _Response


class _HTTPPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _WatchedHTTP


class _HTTPSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _WatchedHTTPS


_POOLS = {"http": _HTTPPool, "https": _HTTPSPool}


class _Adapter(HTTPAdapter):
    """requests' adapter, with connections whose wait for an answer can be ended."""

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **options)
        if type(manager) is urllib3.ProxyManager:  # SOCKS has connections of its own
            manager.pool_classes_by_scheme = _POOLS
        return manager


class Requests:
    """Sends an event source's requests, with a session's settings as they are then.

    A plain session is copied, and its plain adapters are replaced by ones whose wait
    for an answer can be ended. A session or an adapter of a class of its own is used as
    it is.

    Args:
        session: ``None`` for one of its own.
        method, url, headers, data, json: Of each request.
        read_timeout: Seconds, or ``None``.
    """

    def __init__(
        self,
        session: Session | None,
        method: str,
        url: str,
        headers: dict[str, Any],
        data: Any,
        json: Any,
        read_timeout: float | None,
    ) -> None:
        self._session = requests.Session() if session is None else session
        try:
            self._session.get_adapter(url)
        except requests.exceptions.InvalidSchema:  # its message has the URL
            raise ValueError(
                "url must begin with http:// or https://, or what an adapter of the"
                " session is mounted at"
            ) from None
        self._adapters: dict[int, _Adapter] = {}  # by the id of the replaced one
        self._method = method
        self._target = url
        self._headers = headers
        self._data = data
        self._json = json
        self._timeout = (CONNECT_TIMEOUT, read_timeout)

    def send(self, last_event_id: str | None) -> Response:
        """Send a request, and follow redirects; return the response's head."""
        headers = dict(self._headers)
        if last_event_id:
            # HTTP strips a field's value; requests refuses one that must be stripped.
            headers["Last-Event-ID"] = last_event_id.encode().strip()
        return self._sender().request(
            self._method,
            self._target,
            headers=headers,
            data=self._data,
            json=self._json,
            timeout=self._timeout,
            stream=True,
        )

    def _sender(self) -> Session:
        session = self._session
        if type(session) is not requests.Session:
            return session
        sender = copy.copy(session)
        sender.adapters = OrderedDict(
            (prefix, self._watched(adapter))
            for prefix, adapter in session.adapters.items()
        )
        return sender

    def _watched(self, adapter: Any) -> Any:
        if type(adapter) is not HTTPAdapter:
            return adapter
        if id(adapter) not in self._adapters:
            watched = _Adapter.__new__(_Adapter)
            watched.__setstate__(adapter.__getstate__())
            self._adapters[id(adapter)] = watched
        return self._adapters[id(adapter)]

    def close(self) -> None:
        """Close idle connections, but none of the session's that was given."""
        for adapter in list(self._adapters.values()):
            adapter.close()
