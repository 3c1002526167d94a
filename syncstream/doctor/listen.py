"""Listen to a stream for a while, and note what comes and when.

Specs: https://html.spec.whatwg.org/multipage/server-sent-events.html (what an
EventSource asks for and accepts), RFC 9110 and 9112 (HTTP/1.1 and its framing).
"""

from __future__ import annotations

import contextlib
import socket
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urljoin, urlsplit

from ..errors import RemoteProtocolError
from ..runtime.clock import time
from .body import Text
from .connect import connect, reason_of
from .observation import (
    BURST,
    MAX_REDIRECTS,
    Arrival,
    End,
    Head,
    NoStream,
    Observation,
    coding_of,
    span,
)
from .request import Request, is_sendable, parse_header, parse_url
from .response import Response

__all__ = ["examine"]

CONNECT = 10.0  # seconds for DNS, TCP and TLS together
PROBE = 10.0  # seconds; the longest time to listen to the second connection (gzip)
# Limits for one stream: a verdict needs no more.
MAX_BYTES = 64 * 1024 * 1024
MAX_EVENTS = 100_000
MAX_READS = 20_000


def examine(
    url: str,
    *,
    seconds: float = 20.0,
    headers: Sequence[tuple[str, str]] = (),
    last_event_id: str | None = None,
    insecure: bool = False,
    data: bytes | None = None,
) -> Observation:
    """Listen to a stream, and return an observation.

    The call blocks for at most ``seconds`` plus `CONNECT`, redirects included. If there
    was a stream, a second connection that accepts gzip takes at most
    ``min(seconds, PROBE)`` plus `CONNECT` more. Network errors are part of the
    observation: no ``OSError`` is raised.

    Args:
        url: An http or https address.
        seconds: How long to listen.
        headers: Request headers, in addition to or instead of an EventSource's own.
            After a redirect to another origin they are not sent.
        last_event_id: The id to resume after, as a reconnecting browser does.
        insecure: Accept any TLS certificate.
        data: The body of a POST; ``None`` sends GET. The Content-Type is JSON's if the
            body is JSON, else a form's, unless ``headers`` has one. The body is sent
            once: there is no second connection.

    Raises:
        ValueError: An argument is invalid.
    """
    if not 0 < seconds < float("inf"):
        raise ValueError(f"seconds must be positive, got {seconds!r}")
    if last_event_id is not None and not is_sendable(last_event_id):
        raise ValueError(f"last_event_id must be one line, got {last_event_id!r}")
    given = [parse_header(f"{name}: {value}") for name, value in headers]
    if last_event_id is not None:
        given.append(("Last-Event-ID", last_event_id))
    request = Request(parse_url(url), tuple(given), insecure, data)
    seen = replace(_Listening(request).run(seconds), is_posted=data is not None)
    is_free = not any(name.lower() == "accept-encoding" for name, _ in given)
    if seen.head is None or seen.head.status != 200 or coding_of(seen.head):
        return seen
    if not is_free or seen.kind == "other" or data is not None:
        return seen
    probe = _Listening(request, is_probe=True).run(min(seconds, PROBE))
    return replace(seen, probe=probe)


class _Listening:
    """One request, its redirects and its response."""

    def __init__(self, request: Request, *, is_probe: bool = False) -> None:
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
        """Send the request; return whether the response is a redirect to follow."""
        self._note(connected=None)
        begin = time.monotonic()
        limit = min(deadline, begin + CONNECT)
        request = self._request
        sock = connect(request.url, limit, insecure=request.insecure)
        with contextlib.closing(sock):
            self._note(connected=time.monotonic() - begin)
            self._start = time.monotonic()
            deadline = min(deadline, self._start + seconds)
            response = Response(sock, deadline)
            try:
                head = self._read_head(sock, response, deadline)
            finally:
                self._note(listened=self._now())
            self._note(head=head, head_at=response.received_at - self._start)
            if head.status in (301, 302, 303, 307, 308):
                return self._redirect(head)
            if head.status == 200 and not (self._is_probe and not coding_of(head)):
                self._read_body(response, Text(head, deadline))
                self._note(listened=self._now())
        return False

    def _now(self) -> float:
        return time.monotonic() - self._start

    def _read_head(
        self, sock: socket.socket, response: Response, deadline: float
    ) -> Head:
        """Send the request, and read until the head is there."""
        try:
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
            sock.sendall(self._request.encode("gzip" if self._is_probe else "identity"))
            return response.read_head()
        except TimeoutError as error:
            part = "only a part of a head" if response.has_begun else "no head"
            raise NoStream(
                "no-head",
                f"the server accepted the connection, but {part} came in"
                f" {span(self._now())}",
                "make sure that a worker is free (each stream occupies one), and that"
                " the head is sent before the first event, as SSEResponse does; a proxy"
                " may buffer, too",
            ) from error
        except OSError as error:
            raise NoStream(
                "no-head",
                f"the connection broke before an answer: {reason_of(error)}",
                "check the logs of the server and the proxy; is this the right port?",
            ) from error

    def _redirect(self, head: Head) -> bool:
        # Headers are decoded as Latin-1, but paths are UTF-8.
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

    def _read_body(self, response: Response, text: Text) -> None:
        end: End | None = None
        problem = ""
        try:
            while (end := self._enough(text)) is None:
                body = response.read()
                if not body:
                    end = response.end
                    break
                self._take(body, response.received_at - self._start, text)
        except TimeoutError:
            end = "open"
        except OSError as error:
            end, problem = "reset", reason_of(error)
        except (RemoteProtocolError, zlib.error) as error:
            end, problem = "broken", str(error)
        # The last line of NDJSON needs no line end.
        if end in ("whole", "closed"):
            try:
                text.close()
            except RemoteProtocolError as error:
                end, problem = "broken", str(error)
        self._note(end=end, problem=problem, **text.facts())

    def _take(self, body: bytes, at: float, text: Text) -> None:
        events, comments = text.feed(body)
        arrival = Arrival(at, len(body), events, comments, text.is_torn)
        if self._arrivals and self._arrivals[-1].at == at:  # one read, several chunks
            arrival = self._arrivals.pop() + arrival
        self._arrivals.append(arrival)
        self._size += len(body)
        self._events += events

    def _enough(self, text: Text) -> End | None:
        if (
            self._size > MAX_BYTES
            or text.is_bloated
            or self._events > (BURST if self._is_probe else MAX_EVENTS)
            or len(self._arrivals) > MAX_READS
        ):
            return "enough"
        return None
