"""Listen to a stream for a while, and say in plain words what is wrong with it.

Rule: what was seen and what it means stay apart. `examine` talks to the network and
returns an `Observation`; `judge` is a pure function from that to findings, `report`
a pure function from both to text. Whatever comes from outside is escaped where it
is shown, and bounded where it is kept; each wait ends at a deadline.

Specs: https://html.spec.whatwg.org/multipage/server-sent-events.html (what an
EventSource asks for and accepts), RFC 9110 and 9112 (HTTP/1.1 and its framing).
"""

from __future__ import annotations

import contextlib
import json
import queue
import re
import socket
import ssl
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from .. import __version__
from ..brokers import shown
from ..errors import RemoteProtocolError
from ..runtime.clock import time
from .observation import (
    BURST,
    MAX_REDIRECTS,
    Arrival,
    End,
    Head,
    Observation,
    coding_of,
    show,
    span,
)
from .wire import NoStream, Response, Text, is_sendable, parse_header

__all__ = ["examine", "parse_url"]

CONNECT = 10.0  # seconds for DNS, TCP and TLS together
PROBE = 10.0  # seconds that the second connection, which offers gzip, listens at most
# Who sends more than this in the time has been heard well enough.
MAX_BYTES = 64 * 1024 * 1024
MAX_EVENTS = 100_000
MAX_READS = 20_000


# --- What was seen ------------------------------------------------------------------


def parse_url(text: str) -> str:
    """Return an address to listen to, as it is sent.

    Raises:
        ValueError: It is no http or https address, or holds a password.
    """
    # What is wrong may be a password, or a query's token: only the scheme is shown.
    if "://" not in text:
        raise ValueError(f"must start with http:// or https://, got {shown(text)}")
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
        if host and not host.isascii():
            host = host.encode("idna").decode()
    except ValueError:  # it quotes them
        raise ValueError(
            f"is no address: its host or its port cannot be read, got {shown(text)}"
        ) from None
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"must start with http:// or https://, got {shown(text)}")
    if parts.username is not None:
        raise ValueError("must hold no password: use --header 'Authorization: ...'")
    if not host or not re.fullmatch(r"[A-Za-z0-9._:%~-]+", host):
        raise ValueError(f"must name a host, got {shown(text)}")
    netloc = f"[{host}]" if ":" in host else host
    if port is not None:
        netloc += f":{port}"
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
    query = quote(parts.query, safe="/%:@!$&'()*+,;=~?[]|")
    return SplitResult(parts.scheme, netloc, path, query, "").geturl()


def examine(
    url: str,
    *,
    seconds: float = 20.0,
    headers: Sequence[tuple[str, str]] = (),
    last_event_id: str | None = None,
    insecure: bool = False,
    data: bytes | None = None,
) -> Observation:
    """Listen to a stream, and return what was seen of it.

    It blocks for at most ``seconds`` and `CONNECT`, and if there was a stream once
    more for ``min(seconds, PROBE)`` and `CONNECT`, over all redirects. What the
    network does is in the result: no ``OSError`` is raised.

    Args:
        url: An http or https address.
        seconds: How long to listen.
        headers: More request headers, or others instead of an EventSource's own.
            Another origin, to which a redirect leads, is not given them.
        last_event_id: The id to resume after, as a reconnecting browser does.
        insecure: Take any TLS certificate.
        data: What to send, by POST; ``None`` asks by GET. JSON by its Content-Type if
            it is JSON, else a form, unless ``headers`` say so. It is sent once: there
            is no second connection that offers gzip.

    Raises:
        ValueError: An argument is wrong.
    """
    if not 0 < seconds < float("inf"):
        raise ValueError(f"seconds must be positive, got {seconds!r}")
    if last_event_id is not None and not is_sendable(last_event_id):
        raise ValueError(f"last_event_id must be one line, got {last_event_id!r}")
    given = [parse_header(f"{name}: {value}") for name, value in headers]
    if last_event_id is not None:
        given.append(("Last-Event-ID", last_event_id))
    request = _Request(parse_url(url), tuple(given), insecure, data)
    seen = replace(_Listening(request).run(seconds), is_posted=data is not None)
    is_free = not any(name.lower() == "accept-encoding" for name, _ in given)
    if seen.head is None or seen.head.status != 200 or coding_of(seen.head):
        return seen
    if not is_free or seen.kind == "other" or data is not None:
        return seen
    probe = _Listening(request, is_probe=True).run(min(seconds, PROBE))
    return replace(seen, probe=probe)


@dataclass(frozen=True, slots=True)
class _Request:
    url: str
    headers: tuple[tuple[str, str], ...]
    insecure: bool
    data: bytes | None = None

    def encode(self, coding: str) -> bytes:
        """Return the request that an EventSource would send, but for the coding."""
        parts = urlsplit(self.url)
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        default = {"http": 80, "https": 443}[parts.scheme]
        host = parts.netloc.removesuffix(f":{default}")
        fields = {
            "Host": host,
            "Accept": "text/event-stream",
            "Accept-Encoding": coding,
            "Cache-Control": "no-cache",
            "User-Agent": f"syncstream-doctor/{__version__}",
        }
        if self.data is not None:
            fields["Content-Type"] = _type_of(self.data)
            fields["Content-Length"] = str(len(self.data))
        own = {name.lower() for name, _ in self.headers}
        pairs = [(n, v) for n, v in fields.items() if n.lower() not in own]
        lines = [f"{name}: {value}" for name, value in (*pairs, *self.headers)]
        method = "GET" if self.data is None else "POST"
        head = "\r\n".join([f"{method} {target} HTTP/1.1", *lines, "", ""])
        return head.encode() + (self.data or b"")

    def redirected(self, url: str, status: int) -> _Request:
        """Return the request for another address, without secrets for others."""
        # As browsers do (https://fetch.spec.whatwg.org/#http-redirect-fetch).
        data = self.data if status in (307, 308) else None
        if urlsplit(url)[:2] == urlsplit(self.url)[:2]:
            return replace(self, url=url, data=data)
        return replace(self, url=url, headers=(), data=None)


def _type_of(data: bytes) -> str:
    try:
        json.loads(data)
    except RecursionError:  # nothing else nests
        return "application/json"
    except ValueError:
        return "application/x-www-form-urlencoded"
    return "application/json"


class _Listening:
    """One request, its redirects, and what comes back."""

    def __init__(self, request: _Request, *, is_probe: bool = False) -> None:
        self._request = request
        self._is_probe = is_probe
        self._seen = Observation(request.url)
        self._arrivals: list[Arrival] = []
        self._size = 0
        self._events = 0

    def run(self, seconds: float) -> Observation:
        deadline = time.monotonic() + CONNECT + seconds
        try:
            while self._ask(seconds, deadline):
                pass
        except NoStream as error:
            self._note(failure=error.finding)
        return replace(self._seen, arrivals=tuple(self._arrivals))

    def _note(self, **changes: Any) -> None:
        self._seen = replace(self._seen, **changes)

    def _ask(self, seconds: float, deadline: float) -> bool:
        """Send the request; tell whether the answer is another address."""
        self._note(connected=None)
        begin = time.monotonic()
        limit = min(deadline, begin + CONNECT)
        with contextlib.closing(_connect(self._request, limit)) as sock:
            self._note(connected=time.monotonic() - begin)
            self._start = time.monotonic()
            deadline = min(deadline, self._start + seconds)
            reader = Response()
            try:
                rest = self._read_head(sock, reader, deadline)
            finally:
                self._note(listened=self._now())
            head = reader.head
            assert head is not None
            self._note(head=head, head_at=self._now())
            if head.status in (301, 302, 303, 307, 308):
                return self._redirect(head)
            if head.status == 200 and not (self._is_probe and not coding_of(head)):
                self._read_body(sock, reader, rest, deadline)
                self._note(listened=self._now())
        return False

    def _now(self) -> float:
        return time.monotonic() - self._start

    def _read_head(
        self, sock: socket.socket, reader: Response, deadline: float
    ) -> bytes:
        """Read until the head is there; return what came after it."""
        cure = "see that a worker is free (each stream holds one), and that the view"
        cure += " is a generator whose head leaves before its first event: SSEResponse"
        try:
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
            sock.sendall(self._request.encode("gzip" if self._is_probe else "identity"))
            rest = None
            while rest is None:
                data = _receive(sock, deadline)
                if data is None:
                    waited = span(self._now())
                    part = "only a part of a head" if reader.has_begun else "no head"
                    raise NoStream(
                        "no-head",
                        f"the server took the request, and {part} came in {waited}",
                        f"{cure} sends it at once; a proxy may buffer, too",
                    )
                if not data:
                    raise NoStream(
                        "no-head",
                        "the server closed the connection without an answer",
                        "look into its log; is this the right port?",
                    )
                rest = reader.take_head(data)
        except OSError as error:
            raise NoStream(
                "no-head",
                f"the connection broke before an answer: {_reason(error)}",
                "look into the log of server and proxy; is this the right port?",
            ) from error
        return rest

    def _redirect(self, head: Head) -> bool:
        # Latin-1 shows the bytes; a path in UTF-8 is meant.
        location = head.get("Location").encode("latin-1").decode(errors="replace")
        try:
            url = parse_url(urljoin(self._request.url, location))
        except ValueError:
            return False
        if not location or len(self._seen.redirects) == MAX_REDIRECTS:
            return False
        before, self._request = (
            self._request,
            self._request.redirected(url, head.status),
        )
        is_other = urlsplit(url)[:2] != urlsplit(before.url)[:2]
        has_dropped = is_other and bool(before.headers or before.data is not None)
        self._note(
            url=url,
            redirects=(*self._seen.redirects, (head.status, url)),
            has_dropped_headers=has_dropped or self._seen.has_dropped_headers,
            head=None,
        )
        return True

    def _read_body(
        self, sock: socket.socket, reader: Response, rest: bytes, deadline: float
    ) -> None:
        assert reader.head is not None
        self._text = Text(reader.head, deadline)
        end: End | None = None
        problem = ""
        try:
            self._take(reader.feed(rest))
            while (end := self._ended(reader)) is None:
                data = _receive(sock, deadline)
                if data:
                    self._take(reader.feed(data))
                    continue
                end = "closed" if reader.ends_by_closing else "cut"
                if data is None:
                    end = "open"
                break
        except OSError as error:
            end, problem = "reset", _reason(error)
        except (RemoteProtocolError, zlib.error) as error:
            end, problem = "broken", str(error)
        # The last words of NDJSON need no line end.
        if end in ("whole", "closed"):
            try:
                self._text.close()
            except RemoteProtocolError as error:
                end, problem = "broken", str(error)
        self._note(end=end, problem=problem, **self._text.facts())

    def _take(self, body: bytes) -> None:
        if not body:
            return
        text, now = self._text, self._now()
        events, comments = text.feed(body)
        self._arrivals.append(Arrival(now, len(body), events, comments, text.is_torn))
        self._size += len(body)
        self._events += events

    def _ended(self, reader: Response) -> End | None:
        if reader.is_whole:
            return "whole"
        if (
            self._size > MAX_BYTES
            or self._text.is_bloated
            or self._events > (BURST if self._is_probe else MAX_EVENTS)
            or len(self._arrivals) > MAX_READS
        ):
            return "enough"
        return None


def _receive(sock: socket.socket, deadline: float) -> bytes | None:
    """Return what comes next, ``b""`` at the end, ``None`` when the time is up."""
    left = deadline - time.monotonic()
    if left <= 0:
        return None
    sock.settimeout(left)
    try:
        return sock.recv(65536)
    except TimeoutError:
        return None


def _reason(error: OSError) -> str:
    """Return an error's reason, without Python's decorations."""
    if isinstance(error, ssl.SSLError):
        return (error.reason or "TLS error").replace("_", " ").lower()
    return error.strerror or str(error) or type(error).__name__


def _connect(request: _Request, deadline: float) -> socket.socket:
    """Return a connection to the address, TLS and all.

    Raises:
        NoStream: It cannot be had, or not before the deadline.
    """
    parts = urlsplit(request.url)
    host = parts.hostname or ""
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    where = f"port {port} of {show(host)}"
    error: OSError = TimeoutError("no time was left")
    for family, kind, protocol, _, address in _resolve(host, port, deadline):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        sock = None
        try:
            sock = socket.socket(family, kind, protocol)
            sock.settimeout(left)
            sock.connect(address)
        except OSError as e:
            error = e
            if sock is not None:
                sock.close()
            continue
        if parts.scheme == "http":
            return sock
        try:
            return _encrypted(sock, host, deadline, request.insecure)
        except BaseException:
            sock.close()
            raise
    if isinstance(error, ConnectionRefusedError):
        text = f"nothing listens on {where}: the connection was refused"
        cure = "start the server; check the port, and the address that it binds to"
    elif isinstance(error, TimeoutError):
        text = f"{where} did not answer in time"
        cure = "check address, firewall and security group"
    else:
        text = f"{where} cannot be reached: {_reason(error)}"
        cure = "check address and network"
    raise NoStream("connection", text, cure) from error


def _resolve(host: str, port: int, deadline: float) -> list[Any]:
    """Return what getaddrinfo says, which has no time limit of its own."""
    answers: queue.SimpleQueue[list[Any] | Exception] = queue.SimpleQueue()

    def resolve() -> None:
        try:
            answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:  # a label may be too long for IDNA
            answers.put(error)

    threading.Thread(target=resolve, daemon=True).start()
    answer: list[Any] | Exception
    try:
        answer = answers.get(timeout=max(deadline - time.monotonic(), 0.001))
    except queue.Empty:
        answer = TimeoutError("no answer in time")
    if isinstance(answer, Exception):
        reason = _reason(answer) if isinstance(answer, OSError) else str(answer)
        raise NoStream(
            "dns",
            f"the name {show(host)} has no address: {show(reason)}",
            "check the spelling, and what DNS says of it",
        ) from answer
    return answer


def _encrypted(
    sock: socket.socket, host: str, deadline: float, insecure: bool
) -> ssl.SSLSocket:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    sock.settimeout(max(deadline - time.monotonic(), 0.001))
    try:
        return context.wrap_socket(sock, server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        raise NoStream(
            "tls",
            f"the certificate is not trusted: {show(error.verify_message)}",
            "renew or correct it, with its whole chain; --insecure listens all the"
            " same, browsers will not",
        ) from error
    except TimeoutError as error:
        raise NoStream(
            "tls", "TLS was not set up in time", "does this port speak TLS? Try http://"
        ) from error
    except (OSError, ValueError) as error:
        reason = _reason(error) if isinstance(error, OSError) else str(error)
        raise NoStream(
            "tls",
            f"TLS cannot be set up: {show(reason)}",
            "does this port speak TLS? If not, try http://",
        ) from error
