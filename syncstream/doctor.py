"""Listen to a stream for a while, and say in plain words what is wrong with it.

Rule: what was seen and what it means stay apart. `examine` talks to the network and
returns an `Observation`; `judge` is a pure function from that to findings, `report`
a pure function from both to text. Whatever comes from outside is escaped where it
is shown, and bounded where it is kept; each wait ends at a deadline.

Specs: https://html.spec.whatwg.org/multipage/server-sent-events.html (what an
EventSource asks for and accepts), RFC 9110 and 9112 (HTTP/1.1 and its framing).
"""

from __future__ import annotations

import codecs
import contextlib
import json
import queue
import re
import socket
import ssl
import statistics
import textwrap
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from . import __version__
from .brokers import shown
from .clock import time
from .errors import RemoteProtocolError
from .protocol import ndjson, sse

__all__ = [
    "Arrival",
    "Finding",
    "Head",
    "Observation",
    "examine",
    "exit_status",
    "judge",
    "parse_header",
    "parse_url",
    "report",
]

CONNECT = 10.0  # seconds for DNS, TCP and TLS together
PROBE = 10.0  # seconds that the second connection, which offers gzip, listens at most
MAX_REDIRECTS = 5
MAX_HEAD = 64 * 1024  # bytes of head, interim heads (1xx) included
MAX_LINE = 4096  # bytes of a chunk's size line
# Who sends more than this in the time has been heard well enough.
MAX_BYTES = 64 * 1024 * 1024
MAX_EVENTS = 100_000
MAX_READS = 20_000
MAX_INFLATED = 2 * 1024 * 1024  # bytes out of one read; a bomb makes 64 MiB of it

SLOW = 1.0  # seconds; a head or a first byte that takes longer was held back
SILENCE = 1.0  # seconds without a byte before what may be a burst
TOGETHER = 0.05  # seconds; what comes within them was sent at once
BURST = 3  # events at once
KEEPALIVE = 15.0  # seconds; the interval that the standard recommends (§9.2.7)
LATE = 3.0  # seconds by which a keepalive of that interval may come later
IDLE = 60.0  # seconds; nginx's proxy_read_timeout and AWS's load balancers

Level = Literal["fault", "note"]
End = Literal["open", "whole", "closed", "cut", "reset", "broken", "enough"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know about a stream, and what to do.

    Attributes:
        name: A short name that stays the same, such as ``content-type``.
        text: What was seen.
        cure: What to do.
        level: A ``fault`` breaks the stream for somebody, a ``note`` does not.
    """

    name: str
    text: str
    cure: str
    level: Level = "fault"


@dataclass(frozen=True, slots=True)
class Head:
    """A response's head.

    Attributes:
        version: ``1.0`` or ``1.1``.
        headers: Names and values as they came, bytes shown as Latin-1.
        malformed: Lines that are no header.
    """

    version: str
    status: int
    reason: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    malformed: int = 0

    def all(self, name: str) -> list[str]:
        """Return a header's values, one for each time it was sent."""
        return [value for n, value in self.headers if n.lower() == name.lower()]

    def get(self, name: str) -> str:
        """Return a header's values as one, ``""`` if it was not sent."""
        return ", ".join(self.all(name))

    def words(self, name: str) -> set[str]:
        """Return a header's comma-separated words, lower case, without arguments."""
        parts = self.get(name).lower().split(",")
        return {word for part in parts if (word := part.partition("=")[0].strip())}


@dataclass(frozen=True, slots=True)
class Arrival:
    """What one read from the connection brought of the body.

    Attributes:
        at: Seconds after the request was sent.
        size: Bytes, as they were on the wire but for the chunks' framing.
        events: Events (or lines of NDJSON) that it completed.
        comments: Comment lines that it completed.
        is_torn: It ended within an event or a line.
    """

    at: float
    size: int
    events: int = 0
    comments: int = 0
    is_torn: bool = False


@dataclass(frozen=True, slots=True)
class Observation:
    """What was seen of one stream.

    Attributes:
        url: The address that answered, after redirects.
        redirects: Status and target of each redirect that was followed.
        has_dropped_headers: A redirect led to another origin, which was not given
            the user's headers.
        connected: Seconds until a connection stood, TLS included; ``None``: none.
        failure: Why there is no response to speak of.
        head_at: Seconds from the request to the end of the head.
        listened: Seconds from the request to the end of listening.
        end: How it ended: ``open`` when the time was up, ``whole`` with its end
            mark, ``closed`` where HTTP has no mark, ``cut`` without the mark,
            ``reset`` by an error of the connection, ``broken`` by bytes that break
            the format, ``enough`` at one of the limits.
        problem: What broke it, for ``broken`` and ``reset``.
        stray: Lines that are neither fields nor comments; ``sample`` is the first.
        dataless: Blocks that name an event and have no data.
        is_posted: It was asked for by POST, as no EventSource does.
        probe: What a second connection saw that offered gzip.
    """

    url: str
    redirects: tuple[tuple[int, str], ...] = ()
    has_dropped_headers: bool = False
    connected: float | None = None
    failure: Finding | None = None
    head: Head | None = None
    head_at: float = 0.0
    arrivals: tuple[Arrival, ...] = ()
    listened: float = 0.0
    end: End = "open"
    problem: str = ""
    retry: int | None = None
    last_id: str | None = None
    stray: int = 0
    sample: str = ""
    dataless: int = 0
    is_posted: bool = False
    is_utf8: bool = True
    is_ascii: bool = True
    probe: Observation | None = None

    @property
    def kind(self) -> Literal["sse", "ndjson", "other"]:
        return "other" if self.head is None else _kind(self.head)

    @property
    def events(self) -> int:
        return sum(arrival.events for arrival in self.arrivals)

    @property
    def first_event(self) -> float | None:
        return next((a.at for a in self.arrivals if a.events), None)


_NDJSON_TYPES = frozenset(
    f"application/{name}" for name in ("x-ndjson", "ndjson", "jsonl", "x-jsonlines")
)


def _kind(head: Head) -> Literal["sse", "ndjson", "other"]:
    media_type = head.get("Content-Type").partition(";")[0].strip().lower()
    if media_type == "text/event-stream":
        return "sse"
    return "ndjson" if media_type in _NDJSON_TYPES else "other"


def show(text: str, length: int = 100) -> str:
    """Return text from outside as printable ASCII of a bounded length.

    An escape sequence would move the cursor, and hide a finding.
    """
    short = text[:length]
    escaped = "".join(
        c if " " <= c <= "~" else c.encode("unicode_escape").decode() for c in short
    )
    return f"{escaped}..." if len(text) > length else escaped


def _place(url: str, length: int = 100) -> str:
    """Return an address as reports show it: values of a query are often tokens."""
    parts = urlsplit(url)
    pairs = [part.partition("=") for part in parts.query.split("&")]
    query = "&".join(f"{name}=..." if equals else "..." for name, equals, _ in pairs)
    return show(parts._replace(query=query if parts.query else "").geturl(), length)


def _span(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 0.9995 else f"{seconds:.2f} s"


# --- What it means ------------------------------------------------------------------


def judge(seen: Observation) -> list[Finding]:
    """Return what is to be said about a stream, faults first."""
    found = list(_redirected(seen))
    if seen.failure is not None:
        found.append(seen.failure)
    elif seen.head is not None:
        checks = _CHECKS if seen.head.status == 200 else (_status,)
        found += [finding for check in checks for finding in check(seen, seen.head)]
    return sorted(found, key=lambda finding: finding.level != "fault")


def exit_status(seen: Observation, findings: Sequence[Finding]) -> int:
    """Return 0 for a healthy stream, 1 for faults, 2 for no connection."""
    if seen.connected is None:
        return 2
    return int(any(finding.level == "fault" for finding in findings))


def _redirected(seen: Observation) -> Iterator[Finding]:
    if not seen.redirects:
        return
    targets = ", then ".join(f"{n} to {_place(url)}" for n, url in seen.redirects)
    dropped = "; your --header and --data were not sent to the other origin"
    yield Finding(
        "redirect",
        f"the address redirects: {targets}{dropped * seen.has_dropped_headers}",
        "give clients the last address: each reconnection takes the detour again",
        "note",
    )


_STATUS = {
    204: (
        "which tells a browser to stop for good",
        "right for a stream that has finished, else answer 200; see --last-event-id",
    ),
    401: (
        "the server wants to know who you are",
        "give credentials: --header 'Authorization: ...' or --header 'Cookie: ...'."
        " A browser's EventSource sends cookies, and no header of your own",
    ),
    403: (
        "the server does not let you in",
        "give a user's cookie by --header 'Cookie: ...'; look at the server's"
        " permission and CSRF rules",
    ),
    404: (
        "there is no such address",
        "check the path, its trailing slash too, and the prefix that a proxy adds"
        " or takes away",
    ),
    405: (
        "the address takes no such method",
        "an EventSource sends GET: route it; what is asked for by POST: --data '...'",
    ),
    406: (
        "the server has nothing of the type that an EventSource accepts",
        "answer text/event-stream; for another stream say --header 'Accept: ...'."
        " Django REST framework refuses it for want of a renderer: give the view one"
        ' whose media_type is "text/event-stream" (README)',
    ),
    410: ("the stream is gone for good", "browsers stop here; give another address"),
    429: (
        "too many requests or connections",
        "raise the limit for streams: each browser tab holds one connection open",
    ),
    500: (
        "the view failed before its first byte",
        "the server's log has the traceback. On waitress and wsgiref a hop-by-hop"
        " header, such as Connection, is one cause: leave it to the server",
    ),
    502: (
        "a proxy could not get an answer from the application",
        "see that the application's server runs where the proxy looks for it, and"
        " what its log says",
    ),
    503: (
        "the server has no room or is not up",
        "give it more threads or greenlets than it has streams",
    ),
    504: (
        "a proxy waited in vain for the application",
        "let the head leave at once (SSEResponse does); raise the proxy's read"
        " timeout; see that a worker is free",
    ),
}


def _status(seen: Observation, head: Head) -> Iterator[Finding]:
    status = head.status
    if status in _STATUS:
        text, cure = _STATUS[status]
    elif 300 <= status < 400:
        text = "a redirect that leads nowhere: no Location that can be followed, or"
        text += f" more than {MAX_REDIRECTS} of them"
        cure = "answer 200 at the address itself"
    elif status >= 500:
        text, cure = "the server failed", "look into the log of server and proxy"
    elif status >= 400:
        text, cure = "the server refuses the request", "correct the request"
    else:
        text, cure = "not the 200 that an EventSource insists on", "answer 200"
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
            f"{text}: a browser's EventSource gives up for good",
            "send Content-Type: text/event-stream, as SSEResponse does",
        )
    elif charset and charset[1].lower() not in ("utf-8", "utf8"):
        yield Finding(
            "charset",
            f"charset={show(charset[1], 40)}: the format is UTF-8 by definition, and"
            " Chromium refuses any other name",
            "send Content-Type: text/event-stream; charset=utf-8",
        )
    elif seen.kind == "sse" and not charset and not seen.is_ascii:
        yield Finding(
            "charset",
            "no charset, and there is text beyond ASCII: browsers take UTF-8, but"
            " other clients (requests, for one) take Latin-1",
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
        yield Finding("cached", "the response comes out of a cache", cure)
    elif not words & {"no-cache", "no-store"}:
        yield Finding(
            "cache-control",
            f"Cache-Control is {value}, without no-cache: what is on the way may"
            " store the stream, and wait for its end to do so",
            cure,
        )
    elif "no-transform" not in words:
        yield Finding(
            "cache-control",
            f"Cache-Control is {value}, without no-transform: what is on the way may"
            " compress the stream, and so hold it back",
            cure,
            "note",
        )


def _framing(seen: Observation, head: Head) -> Iterator[Finding]:
    lengths, coding = head.all("Content-Length"), head.get("Transfer-Encoding").lower()
    if lengths and coding:
        yield Finding(
            "framing",
            "there is both a Content-Length and a Transfer-Encoding, which a proxy"
            " may refuse as an attack (RFC 9112, 6.3)",
            "let the application set neither: framing is the server's",
        )
    elif lengths:
        yield Finding(
            "content-length",
            f"Content-Length is {show(', '.join(lengths), 40)}: the response was"
            " complete before it was sent, or will be cut at that length",
            "return the generator itself, and set no Content-Length; look for a"
            " middleware that reads the whole response",
            "fault" if seen.kind == "sse" else "note",
        )
    if coding not in ("", "chunked"):
        yield Finding(
            "framing",
            f"Transfer-Encoding is {show(coding, 40)}, not chunked alone",
            "let the server set it: an application must not (PEP 3333)",
        )
    if head.malformed:
        yield Finding(
            "head",
            f"the head has malformed lines ({head.malformed})",
            "look for line ends in what the application puts into headers",
        )


def _connection(seen: Observation, head: Head) -> Iterator[Finding]:
    words = head.words("Connection")
    if {"close", "keep-alive"} <= words or "upgrade" in words:
        yield Finding(
            "connection",
            f"Connection is {show(head.get('Connection'), 40)}, which contradicts"
            " itself or the response",
            "the application must not set Connection: it is the server's (PEP 3333),"
            " and a 500 on waitress and wsgiref",
            "note",
        )
    if head.version == "1.0":
        yield Finding(
            "http-1.0",
            "the answer is HTTP/1.0: its end has no mark, so a client cannot tell a"
            " broken stream from a finished one",
            "let the server or proxy that you see here speak HTTP/1.1",
            "note",
        )


def _accel(seen: Observation, head: Head) -> Iterator[Finding]:
    # nginx obeys X-Accel-Buffering and takes it out (ngx_http_proxy_module,
    # proxy_pass_header): behind nginx its absence means nothing.
    if "nginx" in (name for name, _ in _proxies(head)):
        return
    value = head.get("X-Accel-Buffering").strip().lower()
    if value != "no":
        yield Finding(
            "x-accel-buffering",
            f"X-Accel-Buffering is {show(value, 40) or 'missing'}: behind nginx the"
            " stream would be buffered",
            "send X-Accel-Buffering: no, as SSEResponse does",
            "note",
        )


def _encoding(seen: Observation, head: Head) -> Iterator[Finding]:
    if value := _coding(head):
        yield Finding(
            "compressed",
            f"Content-Encoding is {show(value, 40)}, though none was accepted",
            "take the stream out of the compressing middleware or proxy",
        )
    probe = seen.probe
    if probe is None:
        return
    if probe.head is not None and probe.head.status == 200:
        if value := _coding(probe.head):
            yield _compressed(seen, probe, show(value, 40))
        return
    text = f"status {probe.head.status}" if probe.head is not None else "no answer"
    if probe.failure is not None:
        text = probe.failure.text
    yield Finding(
        "second-connection",
        f"a second connection, right after the first was left: {text}",
        "is a worker still busy with the client that has left? Yield more often, and"
        " give the server more threads than streams",
        "note",
    )


def _compressed(seen: Observation, probe: Observation, coding: str) -> Finding:
    cure = (
        "send Cache-Control: no-transform, and take text/event-stream out of the"
        " compressing middleware or proxy (nginx: gzip_types; Django: GZipMiddleware)"
    )
    plain, packed = seen.first_event, probe.first_event
    is_read = coding in _INFLATABLE
    what = f"with gzip accepted, as browsers do, the stream is compressed ({coding})"
    if plain is None or not is_read:
        return Finding("gzip", f"{what}; whether in time, is open", cure, "note")
    if packed is None:
        if probe.end == "open" and plain + SLOW > probe.listened:
            return Finding("gzip", f"{what}; no event came in time", cure, "note")
        text = f"{what} and held back: no event in {_span(probe.listened)}, against"
        return Finding("gzip", f"{text} {_span(plain)} without", cure)
    if packed > plain + SLOW:
        text = f"{what} and held back: first event after {_span(packed)}, against"
        return Finding("gzip", f"{text} {_span(plain)} without", cure)
    return Finding("gzip", f"{what}, and its events come in time", cure, "note")


def _coding(head: Head) -> str:
    value = head.get("Content-Encoding").strip().lower()
    return "" if value == "identity" else value


def _opening(seen: Observation, head: Head) -> Iterator[Finding]:
    if not seen.arrivals:
        if seen.end == "open":
            yield Finding(
                "silent",
                f"the head came, and then nothing for {_span(seen.listened)}:"
                " either there are no events, or something holds them back",
                "send an opening comment and keepalives (SSEResponse sends the"
                f" first); {_proxy_cure(head)}",
                "fault" if seen.kind == "sse" else "note",
            )
        return
    first = seen.arrivals[0].at
    level: Level = "fault" if seen.kind == "sse" else "note"
    if seen.head_at >= SLOW and first - seen.head_at < TOGETHER:
        yield Finding(
            "head-withheld",
            f"the head came after {_span(seen.head_at)}, together with the first"
            " bytes: it was held back until there was something to send",
            "send an opening comment at once, as SSEResponse does; for hand-written"
            f" generators there is StreamMiddleware; {_proxy_cure(head)}",
            level,
        )
    elif seen.head_at >= SLOW:
        yield Finding(
            "slow",
            f"the head took {_span(seen.head_at)}",
            "do slow work in the generator, after the first yield; see that a worker"
            " is free: each stream holds one of its threads",
            "note",
        )
    elif seen.kind == "sse" and first - seen.head_at >= SLOW:
        yield Finding(
            "no-opening",
            f"the first byte came {_span(first - seen.head_at)} after the head: some"
            " proxies hold a head back until there is a body",
            "send an opening comment at once, as SSEResponse does",
            "note",
        )


@dataclass(frozen=True, slots=True)
class _Group:
    """Reads that came together."""

    silence: float  # seconds without a byte before it
    at: float
    size: int
    events: int
    is_torn: bool
    pause: float  # seconds without a byte after it


def _groups(seen: Observation) -> list[_Group]:
    groups: list[list[Arrival]] = []
    for arrival in seen.arrivals:
        if not groups or arrival.at - groups[-1][0].at > TOGETHER:
            groups.append([])
        groups[-1].append(arrival)
    starts = [*(group[0].at for group in groups[1:]), seen.listened]
    ends = [0.0, *(group[-1].at for group in groups)]
    return [
        _Group(
            silence=group[0].at - before,
            at=group[0].at,
            size=sum(a.size for a in group),
            events=sum(a.events for a in group),
            is_torn=group[-1].is_torn,
            pause=after - group[-1].at,
        )
        for group, before, after in zip(groups, ends, starts, strict=False)
    ]


def _buffering(seen: Observation, head: Head) -> Iterator[Finding]:
    groups = _groups(seen)
    # An application yields whole events; who stops within one, and not just for
    # one that is being typed, counts bytes.
    torn = [
        g
        for g in groups
        if g.is_torn and g.pause >= SILENCE and (g.events > 1 or g.size >= 1024)
    ]
    bursts = [g for g in groups if g.silence >= SILENCE and g.events >= BURST]
    inside = sum(g.events for g in bursts)
    cure = f"switch buffering off: {_proxy_cure(head)}"
    if torn:
        size = f"{statistics.median_low(g.size for g in torn)} bytes"
        yield Finding(
            "buffering",
            f"{len(torn)} times a pause of up to {_span(max(g.pause for g in torn))}"
            f" began in the middle of an event (after {size}): something on the way"
            " collects bytes and sends them when its buffer is full",
            cure,
        )
    elif bursts and bursts[0] is groups[0] and inside == seen.events:
        yield Finding(
            "buffering",
            f"nothing came for {_span(groups[0].at)}, then {groups[0].events} events"
            " at once: something on the way collects them",
            cure,
        )
    elif bursts and inside * 2 >= seen.events:
        yield Finding(
            "bursts",
            f"{inside} of {seen.events} events came in {len(bursts)} bursts, after"
            f" silences of up to {_span(max(g.silence for g in bursts))}",
            f"if the application does not send them together, {cure}",
            "note",
        )


def _keepalive(seen: Observation, head: Head) -> Iterator[Finding]:
    silence = _longest_silence(seen)
    if seen.kind != "sse" or not seen.arrivals or silence < KEEPALIVE + LATE:
        return
    yield Finding(
        "keepalive",
        f"up to {_span(silence)} without a byte: proxies end what is silent for"
        " long (nginx and AWS after 60 s), and a client that has left is not noticed",
        "send a comment every 15 s when there is no event: SSEResponse does"
        ' (keepalive=15.0); by hand yield Event(comment="keepalive")',
        "fault" if silence >= IDLE else "note",
    )


def _longest_silence(seen: Observation) -> float:
    times = [seen.head_at, *(a.at for a in seen.arrivals), seen.listened]
    return max(after - before for before, after in pairwise(times))


def _format(seen: Observation, head: Head) -> Iterator[Finding]:
    if seen.end == "broken":
        yield Finding(
            "broken",
            f"what came cannot be read: {show(seen.problem, 200)}",
            "let nothing but the server frame the response, and send"
            " NDJSON as one JSON value a line"
            if seen.kind == "ndjson"
            else "let nothing but the server frame the response",
        )
    if not seen.is_utf8:
        yield Finding(
            "utf-8",
            "there are bytes that are not UTF-8: clients see U+FFFD instead",
            "encode text as UTF-8, and binary data as base64",
        )
    if seen.kind != "sse":
        return
    if seen.stray:
        yield Finding(
            "stray-lines",
            f"{seen.stray} lines are neither fields nor comments, and are ignored;"
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
            "fields came, but no blank line that completes the event",
            "end each event with an empty line, as SSEResponse does",
        )
    if seen.dataless:
        yield Finding(
            "no-data",
            f"{seen.dataless} events have a name and no data: browsers drop them",
            'send an empty "data:" line, as Event("", event=...) does',
            "note",
        )


def _ids(seen: Observation, head: Head) -> Iterator[Finding]:
    if seen.kind != "sse":
        return
    if seen.events and not seen.last_id and not seen.is_posted:
        yield Finding(
            "no-ids",
            "events have no id: a client that comes back cannot say what it has seen",
            "give ids, Event(data, id=n), and go on after last_event_id(environ);"
            " not needed if missed events do not matter",
            "note",
        )
    if seen.retry is not None and seen.retry < 100:
        yield Finding(
            "retry",
            f"retry: {seen.retry}: when the server restarts, all clients storm it",
            "send 1000 ms or more, SSEResponse(..., retry=1000)",
            "note",
        )


# Seconds, what they are counted over, and who ends streams after them.
_TIMEOUTS = (
    (30.0, "life", "gunicorn's --timeout for a sync worker"),
    (29.0, "life", "AWS API Gateway"),
    (55.0, "silence", "Heroku's router"),
    (60.0, "silence", "nginx's proxy_read_timeout or an AWS load balancer"),
    (60.0, "life", "Cloud Run or a CDN"),
    (100.0, "silence", "Cloudflare"),
)


def _ending(seen: Observation, head: Head) -> Iterator[Finding]:
    is_torn = bool(seen.arrivals) and seen.arrivals[-1].is_torn
    if seen.end in ("cut", "reset"):
        how = "without its end mark"
        if seen.end == "reset":
            how = f"by an error of the connection ({show(seen.problem, 80)})"
        yield Finding(
            "cut",
            f"the stream ended after {_span(seen.listened)} {how}: it is cut,"
            f" not finished{_suspect(seen)}",
            "the application's log has the error, if it raised one; else look at the"
            " timeouts of server and proxy, and send keepalives",
        )
    elif seen.end in ("whole", "closed") and is_torn and seen.kind == "sse":
        yield Finding(
            "ended-within-event",
            "the stream ended within an event, which clients drop",
            "end each event, also the last, with an empty line",
        )
    elif (
        seen.end in ("whole", "closed")
        and seen.kind == "sse"
        and seen.last_id not in sse.RESERVED_IDS
        and not seen.is_posted  # nobody comes back by himself
    ):
        yield Finding(
            "ended",
            f"the stream ended after {_span(seen.listened)}: browsers come back and"
            " start it again, for ever",
            'a finished stream should answer 204 to them, as SSEResponse(end="stop")'
            " lets it; or let the client close at a last event",
            "note",
        )


def _suspect(seen: Observation) -> str:
    last = seen.arrivals[-1].at if seen.arrivals else 0.0
    spans = {"life": seen.listened, "silence": seen.listened - last}
    for seconds, what, who in _TIMEOUTS:
        if abs(spans[what] - seconds) < 1:
            return f"; {seconds:.0f} s are typical of {who}"
    return ""


_Check = Callable[[Observation, Head], Iterator[Finding]]
_CHECKS: tuple[_Check, ...] = (
    _content_type,
    _opening,
    _buffering,
    _encoding,
    _format,
    _ending,
    _framing,
    _caching,
    _accel,
    _connection,
    _keepalive,
    _ids,
)

# Name, header, pattern of its value, and how to let a stream through.
_PROXIES = (
    (
        "nginx",
        "Server",
        "nginx|openresty|tengine",
        "nginx: let the application send X-Accel-Buffering: no, or set"
        " proxy_buffering off (and gzip off) for this location",
    ),
    ("Apache", "Server", "apache", "Apache: ProxyPass ... flushpackets=on; no DEFLATE"),
    ("Caddy", "Server", "caddy", "Caddy: flush_interval -1 in reverse_proxy"),
    ("Envoy", "Server", "envoy", "Envoy: no buffer or compressor filter; timeout 0s"),
    ("Traefik", "Server", "traefik", "Traefik: no buffering or compress middleware"),
    ("IIS", "Server", "iis", "IIS: responseBufferLimit 0, no dynamic compression"),
    (
        "Cloudflare",
        "CF-Ray",
        "",
        "Cloudflare: Content-Type text/event-stream, no-transform, no cache rule",
    ),
    ("CloudFront", "Via", "cloudfront", "CloudFront: CachingDisabled, no compression"),
    ("Varnish", "X-Varnish", "", "Varnish: return (pipe), or beresp.do_stream true"),
    ("Varnish", "Via", "varnish", "Varnish: return (pipe), or beresp.do_stream true"),
    ("Squid", "Via", "squid", "Squid: no caching and no adaptation for this address"),
    ("Heroku", "Via", "vegur|heroku", "Heroku: a byte at least every 55 s"),
    ("API Gateway", "Apigw-Requestid", "", "API Gateway buffers: go around it"),
    ("Google", "Via", "google", "Google: Cloud Run streams, App Engine standard not"),
)


def _proxies(head: Head) -> list[tuple[str, str]]:
    """Return name and cure of each proxy that shows."""
    return [
        (name, cure)
        for name, header, pattern, cure in _PROXIES
        if any(re.search(pattern, v, re.IGNORECASE) for v in head.all(header))
    ]


def _proxy_cure(head: Head) -> str:
    cures = dict.fromkeys(cure for _, cure in _proxies(head))
    return "; ".join(cures) or (
        "send X-Accel-Buffering: no and Cache-Control: no-cache, no-transform, and"
        " look for a proxy or middleware that buffers or compresses"
    )


# --- What is shown ------------------------------------------------------------------


def report(seen: Observation, findings: Sequence[Finding]) -> str:
    """Return facts and findings as lines of ASCII, 88 columns wide."""
    lines = [f"{name:<12}{text}" for name, text in _facts(seen)]
    for finding in findings:
        lines.append("")
        lines += _wrapped(f"{finding.level}: ", f"{finding.text} [{finding.name}]")
        lines += _wrapped("  cure: ", finding.cure)
    faults = sum(finding.level == "fault" for finding in findings)
    notes = len(findings) - faults
    verdict = "healthy" if not faults else _count(faults, "fault")
    lines += ["", verdict + (f", {_count(notes, 'note')}" if notes else "")]
    text = "\n".join(line.rstrip() for line in lines) + "\n"
    return text.encode("ascii", "backslashreplace").decode()


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        88,
        initial_indent=label,
        subsequent_indent=" " * 8,
        break_on_hyphens=False,
    )


def _facts(seen: Observation) -> Iterator[tuple[str, str]]:
    yield "address", _place(seen.url, 400)
    if seen.connected is not None:
        yield "connected", f"in {_span(seen.connected)}"
    head = seen.head
    if head is None:
        return
    words = f"HTTP/{head.version} {head.status} {show(head.reason, 40)}".rstrip()
    yield "head", f"{words}, after {_span(seen.head_at)}"
    yield "type", show(head.get("Content-Type")) or "none"
    yield "server", show(_server(head))
    if head.status != 200:
        return
    if seen.arrivals:
        yield "first byte", f"after {_span(seen.arrivals[0].at)}"
    else:
        yield "first byte", f"none in {_span(seen.listened)}"
    yield "events", _spacing(seen)
    if seen.kind != "ndjson":
        yield "comments", _cadence(seen)
        retry = "none" if seen.retry is None else f"{seen.retry} ms"
        ids = f'yes, the last is "{show(seen.last_id, 40)}"' if seen.last_id else "none"
        yield "retry", retry
        yield "ids", ids
    yield "silence", f"{_span(_longest_silence(seen))} at most"
    if seen.probe is not None and seen.probe.head is not None:
        coding = _coding(seen.probe.head)
        yield "compression", show(coding, 40) if coding else "none, gzip was accepted"
    yield "end", f"{_ENDS[seen.end]}, after {_span(seen.listened)}"


_ENDS: dict[End, str] = {
    "open": "still open when the time was up",
    "whole": "finished, with its end mark",
    "closed": "closed, which has no mark: finished or cut",
    "cut": "cut, without its end mark",
    "reset": "cut by an error of the connection",
    "broken": "given up: it cannot be read",
    "enough": "left, having heard enough",
}


def _server(head: Head) -> str:
    via, server = head.get("Via"), head.get("Server")
    proxies = ", ".join(dict.fromkeys(name for name, _ in _proxies(head)))
    text = server or "does not say"
    if via:
        text += f", via {via}"
    return f"{text} (proxy: {proxies})" if proxies else text


def _spacing(seen: Observation) -> str:
    count = seen.events
    if not count:
        return "none"
    times = [a.at for a in seen.arrivals for _ in range(a.events)]
    text = f"{count}, the first after {_span(times[0])}"
    if count < 2:
        return text
    gaps = [after - before for before, after in pairwise(times)]
    low, middle, high = min(gaps), statistics.median(gaps), max(gaps)
    return f"{text}; apart {_span(low)} / {_span(middle)} / {_span(high)} (min/med/max)"


def _cadence(seen: Observation) -> str:
    times = [a.at for a in seen.arrivals if a.comments]
    count = sum(a.comments for a in seen.arrivals)
    if len(times) < 3:  # an opening and one more say nothing
        return str(count) if count else "none"
    gaps = [after - before for before, after in pairwise(times)]
    return f"{count}, {_span(statistics.median(gaps))} apart (median)"


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


def parse_header(text: str) -> tuple[str, str]:
    """Return name and value of ``Name: value``.

    Raises:
        ValueError: It is no header that can be sent (RFC 9110, 5).
    """
    name, colon, value = text.partition(":")
    if not colon or not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
        raise ValueError("must be 'Name: value'; what came is not shown")
    if not _is_sendable(value):
        raise ValueError(f"must be one line of text, which {name} is not")
    return name, value.strip()


def _is_sendable(text: str) -> bool:
    return not re.search("[\0-\x08\x0a-\x1f\x7f\ud800-\udfff]", text)


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
    if last_event_id is not None and not _is_sendable(last_event_id):
        raise ValueError(f"last_event_id must be one line, got {last_event_id!r}")
    given = [parse_header(f"{name}: {value}") for name, value in headers]
    if last_event_id is not None:
        given.append(("Last-Event-ID", last_event_id))
    request = _Request(parse_url(url), tuple(given), insecure, data)
    seen = replace(_Listening(request).run(seconds), is_posted=data is not None)
    is_free = not any(name.lower() == "accept-encoding" for name, _ in given)
    if seen.head is None or seen.head.status != 200 or _coding(seen.head):
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


class _NoStream(Exception):
    """There is no response to listen to, for a reason."""

    def __init__(self, name: str, text: str, cure: str) -> None:
        super().__init__(text)
        self.finding = Finding(name, text, cure)


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
        except _NoStream as error:
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
            reader = _Response()
            try:
                rest = self._read_head(sock, reader, deadline)
            finally:
                self._note(listened=self._now())
            head = reader.head
            assert head is not None
            self._note(head=head, head_at=self._now())
            if head.status in (301, 302, 303, 307, 308):
                return self._redirect(head)
            if head.status == 200 and not (self._is_probe and not _coding(head)):
                self._read_body(sock, reader, rest, deadline)
                self._note(listened=self._now())
        return False

    def _now(self) -> float:
        return time.monotonic() - self._start

    def _read_head(
        self, sock: socket.socket, reader: _Response, deadline: float
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
                    waited = _span(self._now())
                    part = "only a part of a head" if reader.has_begun else "no head"
                    raise _NoStream(
                        "no-head",
                        f"the server took the request, and {part} came in {waited}",
                        f"{cure} sends it at once; a proxy may buffer, too",
                    )
                if not data:
                    raise _NoStream(
                        "no-head",
                        "the server closed the connection without an answer",
                        "look into its log; is this the right port?",
                    )
                rest = reader.take_head(data)
        except OSError as error:
            raise _NoStream(
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
        self, sock: socket.socket, reader: _Response, rest: bytes, deadline: float
    ) -> None:
        assert reader.head is not None
        self._text = _Text(reader.head, deadline)
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

    def _ended(self, reader: _Response) -> End | None:
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
        _NoStream: It cannot be had, or not before the deadline.
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
    raise _NoStream("connection", text, cure) from error


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
        raise _NoStream(
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
        raise _NoStream(
            "tls",
            f"the certificate is not trusted: {show(error.verify_message)}",
            "renew or correct it, with its whole chain; --insecure listens all the"
            " same, browsers will not",
        ) from error
    except TimeoutError as error:
        raise _NoStream(
            "tls", "TLS was not set up in time", "does this port speak TLS? Try http://"
        ) from error
    except (OSError, ValueError) as error:
        reason = _reason(error) if isinstance(error, OSError) else str(error)
        raise _NoStream(
            "tls",
            f"TLS cannot be set up: {show(reason)}",
            "does this port speak TLS? If not, try http://",
        ) from error


_HEAD_END = re.compile(rb"\r?\n\r?\n")
_STATUS_LINE = re.compile(r"HTTP/(1\.[01]) ([1-9][0-9]{2})(?: (.*))?", re.DOTALL)


class _Response:
    """An HTTP/1 response, taken piece by piece.

    Attributes:
        head: The head, ``None`` until it has come.
        is_whole: The body's end mark has come.
        has_begun: Something has come.
        ends_by_closing: The body has no other end than the connection's.
    """

    def __init__(self) -> None:
        self.head: Head | None = None
        self.is_whole = False
        self.has_begun = False
        self.ends_by_closing = False
        self._buffer = bytearray()
        self._size = 0  # of heads so far
        self._chunks: _Chunks | None = None
        self._left = 0

    def take_head(self, data: bytes) -> bytes | None:
        """Take bytes of the head; return those after it, ``None`` before its end.

        Raises:
            _NoStream: This is no response.
        """
        self.has_begun = True
        self._size += len(data)
        searched = max(len(self._buffer) - 3, 0)
        self._buffer += data
        while end := _HEAD_END.search(self._buffer, searched):
            head = _parse_head(bytes(self._buffer[: end.start()]))
            del self._buffer[: end.end()]
            searched = 0
            if head.status >= 200:  # else interim, such as 103 Early Hints
                self.head = head
                self._begin_body(head)
                return bytes(self._buffer)
        start = bytes(self._buffer[:5])
        if start != b"HTTP/"[: len(start)]:
            raise _not_http(bytes(self._buffer[:40]))
        if self._size > MAX_HEAD:
            raise _NoStream(
                "head",
                f"the head is larger than {MAX_HEAD // 1024} KiB",
                "send fewer headers and cookies; proxies take 4 to 16 KiB",
            )
        return None

    def feed(self, data: bytes) -> bytes:
        """Take what comes after the head; return the body's bytes in it.

        Raises:
            RemoteProtocolError: The body's framing is broken.
        """
        if self.is_whole:
            return b""
        if self._chunks is not None:
            data = self._chunks.feed(data)
            self.is_whole = self._chunks.is_whole
        elif not self.ends_by_closing:
            data = data[: self._left]
            self._left -= len(data)
            self.is_whole = not self._left
        return data

    def _begin_body(self, head: Head) -> None:
        lengths = {value.strip() for value in head.all("Content-Length")}
        length = lengths.pop() if len(lengths) == 1 else ""
        if "chunked" in head.words("Transfer-Encoding"):
            self._chunks = _Chunks()
        elif length.isascii() and length.isdecimal():
            self._left = int(length[:18])
            self.is_whole = not self._left
        else:
            self.ends_by_closing = True


def _not_http(start: bytes) -> _NoStream:
    if start[:1] == b"\x15":  # a TLS alert
        return _NoStream("tls", "this port speaks TLS", "ask for https:// instead")
    return _NoStream(
        "not-http",
        "the server does not speak HTTP/1: it began with"
        f' "{show(start.decode("latin-1"), 40)}"',
        "check the port; an HTTP/2-only server needs a proxy that takes HTTP/1.1",
    )


def _parse_head(data: bytes) -> Head:
    first, *lines = data.decode("latin-1").replace("\r\n", "\n").split("\n")
    match = _STATUS_LINE.fullmatch(first)
    if match is None:
        raise _not_http(data[:40])
    headers: list[tuple[str, str]] = []
    malformed = 0
    for line in lines:
        try:
            headers.append(parse_header(line))
        except ValueError:
            malformed += 1
    version, status, reason = match.groups()
    return Head(version, int(status), reason or "", tuple(headers), malformed)


class _Chunks:
    """The chunked coding (RFC 9112, 7.1), taken piece by piece."""

    def __init__(self) -> None:
        self.is_whole = False
        self._line = bytearray()
        self._state: Literal["size", "data", "end", "trailer"] = "size"
        self._left = 0  # bytes of data, or of trailers that are still taken

    def feed(self, data: bytes) -> bytes:
        """Return the data without its framing.

        Raises:
            RemoteProtocolError: The framing is broken.
        """
        pieces: list[bytes] = []
        at = 0
        while at < len(data) and not self.is_whole:
            if self._state == "data":
                piece = data[at : at + self._left]
                pieces.append(piece)
                at += len(piece)
                self._left -= len(piece)
                if not self._left:
                    self._state = "end"
                continue
            end = data.find(b"\n", at, at + MAX_LINE)
            stop = end + 1 if end >= 0 else min(len(data), at + MAX_LINE)
            self._line += data[at:stop]
            at = stop
            if len(self._line) > MAX_LINE:
                raise RemoteProtocolError("a line of the chunks' framing has no end")
            if end >= 0:
                line = bytes(self._line).rstrip(b"\r\n")
                self._line.clear()
                self._take_line(line)
        return b"".join(pieces)

    def _take_line(self, line: bytes) -> None:
        if self._state == "size":
            match = re.fullmatch(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;.*)?", line)
            if match is None:
                text = show(line.decode("latin-1"), 40)
                raise RemoteProtocolError(f'a chunk has the size "{text}"')
            self._left = int(match[1], 16)
            self._state = "data"
            if not self._left:
                self._state, self._left = "trailer", MAX_HEAD
        elif self._state == "end":
            if line:
                raise RemoteProtocolError("a chunk is longer than its size says")
            self._state = "size"
        else:
            self._left -= len(line) + 2
            if self._left < 0:
                raise RemoteProtocolError("the trailer has no end")
            self.is_whole = not line


_INFLATABLE = ("gzip", "x-gzip", "deflate")


def _inflater() -> Any:
    # 32: with the head of gzip or zlib, whichever comes.
    return zlib.decompressobj(32 + 15)


class _Text:
    """The body as text: what it holds, by the project's decoders and by looking.

    Attributes:
        is_torn: It stands within an event, or a line of NDJSON.
        is_bloated: One read held more, unpacked, than `MAX_INFLATED` or than could
            be looked at before the deadline.
    """

    def __init__(self, head: Head, deadline: float) -> None:
        self._deadline = deadline
        self._is_ndjson = _kind(head) == "ndjson"
        self._events = sse.Decoder()
        self._values = ndjson.Decoder()
        self._lines = _Lines()
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._is_utf8 = True
        self._is_ascii = True
        coding = _coding(head)
        self._is_unread = bool(coding) and coding not in _INFLATABLE
        self._inflate = _inflater() if coding in _INFLATABLE else None
        self.is_torn = False
        self.is_bloated = False

    def feed(self, data: bytes) -> tuple[int, int]:
        """Take the next bytes; return how many events and comments they complete.

        Raises:
            RemoteProtocolError, zlib.error: They cannot be read.
        """
        events = comments = size = 0
        for piece in self._unpack(data):
            new_events, new_comments = self._read(piece)
            events += new_events
            comments += new_comments
            size += len(piece)
            if size > MAX_INFLATED or time.monotonic() > self._deadline:
                self.is_bloated = True
                break
        return events, comments

    def _unpack(self, data: bytes) -> Iterator[bytes]:
        if self._is_unread:
            return
        if self._inflate is None:
            yield data
            return
        while True:
            piece = self._inflate.decompress(data, 65536)
            data = self._inflate.unconsumed_tail or self._inflate.unused_data
            if self._inflate.eof:  # each event may be a member of its own
                self._inflate = _inflater()
            yield piece
            if not data and len(piece) < 65536:
                return

    def _read(self, data: bytes) -> tuple[int, int]:
        self._check_encoding(data)
        if self._is_ndjson:
            if data:
                self.is_torn = not data.endswith(b"\n")
            return len(self._values.feed(data)), 0
        comments = self._lines.feed(data)
        self.is_torn = self._lines.is_torn
        return len(self._events.feed(data)), comments

    def close(self) -> None:
        if self._is_ndjson and not self._is_unread:
            self._values.close()

    def _check_encoding(self, data: bytes) -> None:
        self._is_ascii = self._is_ascii and data.isascii()
        if self._is_utf8:
            try:
                self._utf8.decode(data)
            except UnicodeDecodeError:
                self._is_utf8 = False

    def facts(self) -> dict[str, Any]:
        return {
            "retry": self._events.retry,
            "last_id": self._events.last_event_id,
            "stray": self._lines.stray,
            "sample": self._lines.sample,
            "dataless": self._lines.dataless,
            "is_utf8": self._is_utf8,
            "is_ascii": self._is_ascii,
        }


_FIELDS = frozenset((b"data", b"event", b"id", b"retry"))


@dataclass(slots=True)
class _Lines:
    """What a decoder of events does not tell: comments, and lines of no use.

    Only the beginning of each line is kept.
    """

    stray: int = 0
    sample: str = ""
    dataless: int = 0
    _line: bytes = b""
    _after_cr: bool = False
    _is_first: bool = True
    _fields: set[bytes] = field(default_factory=set)  # of the block so far

    def feed(self, data: bytes) -> int:
        """Take the next bytes; return how many comments they complete."""
        if self._after_cr and data:
            data = data.removeprefix(b"\n")
            self._after_cr = False
        if b"\r" in data:
            self._after_cr = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        comments = 0
        *lines, rest = data.split(b"\n")
        for line in lines:
            comments += self._take(self._line + line)
            self._line = b""
        self._line = (self._line + rest)[:200]
        return comments

    @property
    def is_torn(self) -> bool:
        return bool(self._line or self._fields)

    def _take(self, line: bytes) -> bool:
        """Take a line; tell whether it is a comment."""
        if self._is_first:
            self._is_first = False
            line = line.removeprefix(b"\xef\xbb\xbf")
        name = line.partition(b":")[0]
        if not line:
            self.dataless += b"event" in self._fields and b"data" not in self._fields
            self._fields.clear()
        elif name in _FIELDS:
            self._fields.add(name)
        elif name:
            self.stray += 1
            self.sample = self.sample or line[:80].decode(errors="replace")
        return line[:1] == b":"
