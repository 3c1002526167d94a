"""Checks: findings drawn from an observation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from ..protocol import sse
from . import timing
from .cures import STATUS, TIMEOUTS, proxies_of
from .observation import (
    MAX_REDIRECTS,
    Finding,
    Head,
    Observation,
    place,
    show,
    span,
)

__all__ = ["exit_status", "judge"]


def judge(seen: Observation) -> list[Finding]:
    """Return the findings about a stream, faults first."""
    found = list(_redirected(seen))
    if seen.failure is not None:
        found.append(seen.failure)
    elif seen.head is not None:
        checks = _CHECKS if seen.head.status == 200 else (_status,)
        found += [finding for check in checks for finding in check(seen, seen.head)]
    return sorted(found, key=lambda finding: finding.level != "fault")


def exit_status(seen: Observation, findings: Sequence[Finding]) -> int:
    """Return 0 for a healthy stream, 1 if there are faults, 2 without a connection."""
    if seen.connected is None:
        return 2
    return int(any(finding.level == "fault" for finding in findings))


def _redirected(seen: Observation) -> Iterator[Finding]:
    if not seen.redirects:
        return
    targets = ", then ".join(f"{n} to {place(url)}" for n, url in seen.redirects)
    dropped = "; your --header and --data were not sent to the other origin"
    yield Finding(
        "redirect",
        f"the address redirects: {targets}{dropped * seen.has_dropped_headers}",
        "give clients the final address: each reconnection follows the redirects again",
        "note",
    )


def _status(seen: Observation, head: Head) -> Iterator[Finding]:
    status = head.status
    if status in STATUS:
        text, cure = STATUS[status]
    elif 300 <= status < 400:
        text = "the redirect cannot be followed: it has no valid Location, or it is"
        text += f" one of more than {MAX_REDIRECTS}"
        cure = "answer 200 at the address itself"
    elif status >= 500:
        text, cure = "the server failed", "check the logs of the server and the proxy"
    elif status >= 400:
        text, cure = "the server refuses the request", "correct the request"
    else:
        text, cure = "an EventSource accepts no status but 200", "answer 200"
    if retry_after := head.get("Retry-After"):
        text += f" (Retry-After: {show(retry_after, 40)})"
    yield Finding("status", f"{status} {show(head.reason, 40)}: {text}", cure)


def _content_type(seen: Observation, head: Head) -> Iterator[Finding]:
    value = head.get("Content-Type")
    charset = re.search(r"charset\s*=\s*\"?([^\s;\"]+)", value, re.IGNORECASE)
    if seen.kind == "other":
        text = f"Content-Type is {show(value)}" if value else "there is no Content-Type"
        if "text/html" in value.lower():
            text += " (a login or an error page?)"
        yield Finding(
            "content-type",
            f"{text}: a browser's EventSource fails and does not reconnect",
            "send Content-Type: text/event-stream, as SSEResponse does",
        )
    elif charset and charset[1].lower() not in ("utf-8", "utf8"):
        yield Finding(
            "charset",
            f"charset={show(charset[1], 40)}: event streams are always UTF-8, and"
            " Chromium rejects any other charset",
            "send Content-Type: text/event-stream; charset=utf-8",
        )
    elif seen.kind == "sse" and not charset and not seen.is_ascii:
        yield Finding(
            "charset",
            "the stream has non-ASCII text, but Content-Type has no charset: browsers"
            " assume UTF-8, other clients (such as requests) assume Latin-1",
            "send Content-Type: text/event-stream; charset=utf-8",
            "note",
        )


def _caching(seen: Observation, head: Head) -> Iterator[Finding]:
    words = head.words("Cache-Control")
    cure = "send Cache-Control: no-cache, no-transform, as SSEResponse does"
    value = show(head.get("Cache-Control")) or "missing"
    if head.get("X-Cache").lower().startswith("hit") or head.get("Age") not in (
        "",
        "0",
    ):
        yield Finding("cached", "the response came from a cache", cure)
    elif not words & {"no-cache", "no-store"}:
        yield Finding(
            "cache-control",
            f"Cache-Control is {value}, without no-cache: a proxy or cache may store"
            " the stream, and deliver nothing before its end",
            cure,
        )
    elif "no-transform" not in words:
        yield Finding(
            "cache-control",
            f"Cache-Control is {value}, without no-transform: a proxy may compress"
            " the stream, which delays events",
            cure,
            "note",
        )


def _framing(seen: Observation, head: Head) -> Iterator[Finding]:
    lengths, coding = head.all("Content-Length"), head.get("Transfer-Encoding").lower()
    if lengths and coding:
        yield Finding(
            "framing",
            "the head has both Content-Length and Transfer-Encoding, which a proxy"
            " may reject as an attack (RFC 9112, 6.3)",
            "set neither in the application: the server frames the response",
        )
    elif lengths:
        yield Finding(
            "content-length",
            f"Content-Length is {show(', '.join(lengths), 40)}: either the response"
            " was complete before it was sent, or it will be cut at that length",
            "return the generator itself, without a Content-Length; look for"
            " middleware that reads the whole response",
            "fault" if seen.kind == "sse" else "note",
        )
    if coding not in ("", "chunked"):
        yield Finding(
            "framing",
            f"Transfer-Encoding is {show(coding, 40)}, not chunked alone",
            "leave it to the server: applications must not set it (PEP 3333)",
        )
    if head.malformed:
        yield Finding(
            "head",
            f"the head has malformed lines ({head.malformed})",
            "look for line breaks in header values that the application sets",
        )


def _connection(seen: Observation, head: Head) -> Iterator[Finding]:
    words = head.words("Connection")
    if {"close", "keep-alive"} <= words or "upgrade" in words:
        yield Finding(
            "connection",
            f"Connection is {show(head.get('Connection'), 40)}, which contradicts"
            " itself or the response",
            "leave Connection to the server (PEP 3333): waitress and wsgiref answer 500"
            " if the application sets it",
            "note",
        )
    if head.version == "1.0":
        yield Finding(
            "http-1.0",
            "the response is HTTP/1.0, which has no end mark: clients cannot tell a"
            " broken stream from a finished one",
            "configure the server or proxy that answered to use HTTP/1.1",
            "note",
        )


def _accel(seen: Observation, head: Head) -> Iterator[Finding]:
    # nginx obeys X-Accel-Buffering and removes it (ngx_http_proxy_module,
    # proxy_pass_header): behind nginx its absence means nothing.
    if "nginx" in (name for name, _ in proxies_of(head)):
        return
    value = head.get("X-Accel-Buffering").strip().lower()
    if value != "no":
        yield Finding(
            "x-accel-buffering",
            f"X-Accel-Buffering is {show(value, 40) or 'missing'}: nginx would buffer"
            " the stream",
            "send X-Accel-Buffering: no, as SSEResponse does",
            "note",
        )


def _format(seen: Observation, head: Head) -> Iterator[Finding]:
    if seen.end == "broken":
        yield Finding(
            "broken",
            f"the response cannot be read: {show(seen.problem, 200)}",
            "leave the framing to the server, and send one JSON value per line"
            if seen.kind == "ndjson"
            else "leave the framing of the response to the server",
        )
    if not seen.is_utf8:
        yield Finding(
            "utf-8",
            "some bytes are not UTF-8: clients see U+FFFD instead",
            "encode text as UTF-8, and binary data as base64",
        )
    if seen.kind != "sse":
        return
    if seen.stray:
        yield Finding(
            "stray-lines",
            f"{seen.stray} lines are neither fields nor comments: clients ignore them;"
            f' the first is "{show(seen.sample, 40)}"',
            'write each line of data as "data: ...", as SSEResponse does',
        )
    elif (
        seen.arrivals
        and not seen.events
        and seen.arrivals[-1].is_torn
        and seen.end != "broken"
    ):
        yield Finding(
            "no-blank-line",
            "fields came, but no blank line to complete the event",
            "end each event with a blank line, as SSEResponse does",
        )
    if seen.dataless:
        yield Finding(
            "no-data",
            f"{seen.dataless} events have a name but no data: browsers drop them",
            'send an empty "data:" line, as Event("", event=...) does',
            "note",
        )


def _ids(seen: Observation, head: Head) -> Iterator[Finding]:
    if seen.kind != "sse":
        return
    if seen.events and not seen.last_id and not seen.is_posted:
        yield Finding(
            "no-ids",
            "events have no id: a client that reconnects cannot resume",
            "send ids, Event(data, id=n), and resume after last_event_id(environ);"
            " ids are not needed if clients may miss events",
            "note",
        )
    if seen.retry is not None and seen.retry < 100:
        yield Finding(
            "retry",
            f"retry is {seen.retry} ms: after a restart all clients reconnect at once",
            "send 1000 ms or more: SSEResponse(..., retry=1000)",
            "note",
        )


def _ending(seen: Observation, head: Head) -> Iterator[Finding]:
    is_torn = bool(seen.arrivals) and seen.arrivals[-1].is_torn
    if seen.end in ("cut", "reset"):
        how = "without its end mark"
        if seen.end == "reset":
            how = f"with a connection error ({show(seen.problem, 80)})"
        yield Finding(
            "cut",
            f"the stream ended after {span(seen.listened)} {how}: it was cut,"
            f" not finished{_suspect(seen)}",
            "check the application's log for an exception; if there is none, check the"
            " timeouts of the server and the proxy, and send keepalives",
        )
    elif seen.end in ("whole", "closed") and is_torn and seen.kind == "sse":
        yield Finding(
            "ended-within-event",
            "the stream ended in the middle of an event, which clients drop",
            "end each event with a blank line, including the last",
        )
    elif (
        seen.end in ("whole", "closed")
        and seen.kind == "sse"
        and seen.last_id not in sse.RESERVED_IDS
        and not seen.is_posted  # only an EventSource reconnects
    ):
        yield Finding(
            "ended",
            f"the stream ended after {span(seen.listened)}: browsers reconnect and"
            " start it again, forever",
            "answer 204 to clients that reconnect to a finished stream, as"
            ' SSEResponse(end="stop") does; or close the EventSource at a last event',
            "note",
        )


def _suspect(seen: Observation) -> str:
    last = seen.arrivals[-1].at if seen.arrivals else 0.0
    spans = {"life": seen.listened, "silence": seen.listened - last}
    for seconds, what, who in TIMEOUTS:
        if abs(spans[what] - seconds) < 1:
            return f"; {seconds:.0f} s is typical of {who}"
    return ""


_Check = Callable[[Observation, Head], Iterator[Finding]]
_CHECKS: tuple[_Check, ...] = (
    _content_type,
    timing.opening,
    timing.buffering,
    timing.encoding,
    _format,
    _ending,
    _framing,
    _caching,
    _accel,
    _connection,
    timing.keepalive,
    _ids,
)
