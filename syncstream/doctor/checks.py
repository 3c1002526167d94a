"""Checks: findings drawn from an observation."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..protocol import sse
from .cures import STATUS, TIMEOUTS, proxies_of, proxy_cure
from .observation import (
    BURST,
    INFLATABLE,
    MAX_REDIRECTS,
    Arrival,
    Finding,
    Head,
    Level,
    Observation,
    coding_of,
    place,
    show,
    span,
)

__all__ = ["exit_status", "judge", "longest_silence"]

SLOW = 1.0  # seconds; a head or a first byte that takes longer was held back
SILENCE = 1.0  # seconds without a byte before what may be a burst
TOGETHER = 0.05  # seconds; what comes within them was sent at once
KEEPALIVE = 15.0  # seconds; the interval that the standard recommends (§9.2.7)
LATE = 3.0  # seconds by which a keepalive of that interval may come later
IDLE = 60.0  # seconds; nginx's proxy_read_timeout and AWS's load balancers


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
    targets = ", then ".join(f"{n} to {place(url)}" for n, url in seen.redirects)
    dropped = "; your --header and --data were not sent to the other origin"
    yield Finding(
        "redirect",
        f"the address redirects: {targets}{dropped * seen.has_dropped_headers}",
        "give clients the last address: each reconnection takes the detour again",
        "note",
    )


def _status(seen: Observation, head: Head) -> Iterator[Finding]:
    status = head.status
    if status in STATUS:
        text, cure = STATUS[status]
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
    if "nginx" in (name for name, _ in proxies_of(head)):
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
    if value := coding_of(head):
        yield Finding(
            "compressed",
            f"Content-Encoding is {show(value, 40)}, though none was accepted",
            "take the stream out of the compressing middleware or proxy",
        )
    probe = seen.probe
    if probe is None:
        return
    if probe.head is not None and probe.head.status == 200:
        if value := coding_of(probe.head):
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
    is_read = coding in INFLATABLE
    what = f"with gzip accepted, as browsers do, the stream is compressed ({coding})"
    if plain is None or not is_read:
        return Finding("gzip", f"{what}; whether in time, is open", cure, "note")
    if packed is None:
        if probe.end == "open" and plain + SLOW > probe.listened:
            return Finding("gzip", f"{what}; no event came in time", cure, "note")
        text = f"{what} and held back: no event in {span(probe.listened)}, against"
        return Finding("gzip", f"{text} {span(plain)} without", cure)
    if packed > plain + SLOW:
        text = f"{what} and held back: first event after {span(packed)}, against"
        return Finding("gzip", f"{text} {span(plain)} without", cure)
    return Finding("gzip", f"{what}, and its events come in time", cure, "note")


def _opening(seen: Observation, head: Head) -> Iterator[Finding]:
    if not seen.arrivals:
        if seen.end == "open":
            yield Finding(
                "silent",
                f"the head came, and then nothing for {span(seen.listened)}:"
                " either there are no events, or something holds them back",
                "send an opening comment and keepalives (SSEResponse sends the"
                f" first); {proxy_cure(head)}",
                "fault" if seen.kind == "sse" else "note",
            )
        return
    first = seen.arrivals[0].at
    level: Level = "fault" if seen.kind == "sse" else "note"
    if seen.head_at >= SLOW and first - seen.head_at < TOGETHER:
        yield Finding(
            "head-withheld",
            f"the head came after {span(seen.head_at)}, together with the first"
            " bytes: it was held back until there was something to send",
            "send an opening comment at once, as SSEResponse does; for hand-written"
            f" generators there is StreamMiddleware; {proxy_cure(head)}",
            level,
        )
    elif seen.head_at >= SLOW:
        yield Finding(
            "slow",
            f"the head took {span(seen.head_at)}",
            "do slow work in the generator, after the first yield; see that a worker"
            " is free: each stream holds one of its threads",
            "note",
        )
    elif seen.kind == "sse" and first - seen.head_at >= SLOW:
        yield Finding(
            "no-opening",
            f"the first byte came {span(first - seen.head_at)} after the head: some"
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
    cure = f"switch buffering off: {proxy_cure(head)}"
    if torn:
        size = f"{statistics.median_low(g.size for g in torn)} bytes"
        yield Finding(
            "buffering",
            f"{len(torn)} times a pause of up to {span(max(g.pause for g in torn))}"
            f" began in the middle of an event (after {size}): something on the way"
            " collects bytes and sends them when its buffer is full",
            cure,
        )
    elif bursts and bursts[0] is groups[0] and inside == seen.events:
        yield Finding(
            "buffering",
            f"nothing came for {span(groups[0].at)}, then {groups[0].events} events"
            " at once: something on the way collects them",
            cure,
        )
    elif bursts and inside * 2 >= seen.events:
        yield Finding(
            "bursts",
            f"{inside} of {seen.events} events came in {len(bursts)} bursts, after"
            f" silences of up to {span(max(g.silence for g in bursts))}",
            f"if the application does not send them together, {cure}",
            "note",
        )


def _keepalive(seen: Observation, head: Head) -> Iterator[Finding]:
    silence = longest_silence(seen)
    if seen.kind != "sse" or not seen.arrivals or silence < KEEPALIVE + LATE:
        return
    yield Finding(
        "keepalive",
        f"up to {span(silence)} without a byte: proxies end what is silent for"
        " long (nginx and AWS after 60 s), and a client that has left is not noticed",
        "send a comment every 15 s when there is no event: SSEResponse does"
        ' (keepalive=15.0); by hand yield Event(comment="keepalive")',
        "fault" if silence >= IDLE else "note",
    )


def longest_silence(seen: Observation) -> float:
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


def _ending(seen: Observation, head: Head) -> Iterator[Finding]:
    is_torn = bool(seen.arrivals) and seen.arrivals[-1].is_torn
    if seen.end in ("cut", "reset"):
        how = "without its end mark"
        if seen.end == "reset":
            how = f"by an error of the connection ({show(seen.problem, 80)})"
        yield Finding(
            "cut",
            f"the stream ended after {span(seen.listened)} {how}: it is cut,"
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
            f"the stream ended after {span(seen.listened)}: browsers come back and"
            " start it again, for ever",
            'a finished stream should answer 204 to them, as SSEResponse(end="stop")'
            " lets it; or let the client close at a last event",
            "note",
        )


def _suspect(seen: Observation) -> str:
    last = seen.arrivals[-1].at if seen.arrivals else 0.0
    spans = {"life": seen.listened, "silence": seen.listened - last}
    for seconds, what, who in TIMEOUTS:
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
