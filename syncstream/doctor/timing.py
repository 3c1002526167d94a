"""Checks of time, such as for buffering: findings from when bytes and events came."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from .cures import proxy_cure
from .observation import (
    BURST,
    INFLATABLE,
    Arrival,
    Finding,
    Head,
    Level,
    Observation,
    coding_of,
    show,
    span,
)

__all__ = ["buffering", "encoding", "keepalive", "opening"]

SLOW = 1.0  # seconds; a head or first byte that takes longer was held back
SILENCE = 1.0  # seconds without a byte; events after it may be a burst
TOGETHER = 0.05  # seconds; reads this close to each other were one send
KEEPALIVE = 15.0  # seconds; the interval that the standard recommends (§9.2.7)
LATE = 3.0  # seconds; how late a keepalive of that interval may come
IDLE = 60.0  # seconds; the timeout of nginx (proxy_read_timeout) and AWS's ALB


def opening(seen: Observation, head: Head) -> Iterator[Finding]:
    if not seen.arrivals:
        if seen.end == "open":
            yield Finding(
                "silent",
                f"nothing followed the head for {span(seen.listened)}: either there"
                " were no events, or something held them back",
                "send an opening comment and keepalives, as SSEResponse does;"
                f" {proxy_cure(head)}",
                "fault" if seen.kind == "sse" else "note",
            )
        return
    first = seen.arrivals[0].at
    level: Level = "fault" if seen.kind == "sse" else "note"
    if seen.head_at >= SLOW and first - seen.head_at < TOGETHER:
        yield Finding(
            "head-withheld",
            f"the head came after {span(seen.head_at)}, together with the first"
            " bytes: it was held back until there were events to send",
            "send an opening comment at once, as SSEResponse does; wrap applications"
            f" with their own generators in StreamMiddleware; {proxy_cure(head)}",
            level,
        )
    elif seen.head_at >= SLOW:
        yield Finding(
            "slow",
            f"the head took {span(seen.head_at)}",
            "do slow work in the generator, after the first yield; make sure that a"
            " worker is free: each stream occupies one of its threads",
            "note",
        )
    elif seen.kind == "sse" and first - seen.head_at >= SLOW:
        yield Finding(
            "no-opening",
            f"the first byte came {span(first - seen.head_at)} after the head: some"
            " proxies hold the head back until the body begins",
            "send an opening comment at once, as SSEResponse does",
            "note",
        )


@dataclass(frozen=True, slots=True)
class _Cluster:
    """Reads that came close together."""

    silence: float  # seconds without a byte before it
    at: float
    size: int
    events: int
    is_torn: bool
    pause: float  # seconds without a byte after it


def _clusters(seen: Observation) -> list[_Cluster]:
    clusters: list[list[Arrival]] = []
    for arrival in seen.arrivals:
        if not clusters or arrival.at - clusters[-1][0].at > TOGETHER:
            clusters.append([])
        clusters[-1].append(arrival)
    starts = [*(cluster[0].at for cluster in clusters[1:]), seen.listened]
    ends = [0.0, *(cluster[-1].at for cluster in clusters)]
    return [
        _Cluster(
            silence=cluster[0].at - before,
            at=cluster[0].at,
            size=sum(a.size for a in cluster),
            events=sum(a.events for a in cluster),
            is_torn=cluster[-1].is_torn,
            pause=after - cluster[-1].at,
        )
        for cluster, before, after in zip(clusters, ends, starts, strict=False)
    ]


def buffering(seen: Observation, head: Head) -> Iterator[Finding]:
    clusters = _clusters(seen)
    # An application yields whole events. A pause within one means a buffer that
    # counts bytes, unless the event is still being generated, word by word.
    torn = [
        c
        for c in clusters
        if c.is_torn and c.pause >= SILENCE and (c.events > 1 or c.size >= 1024)
    ]
    bursts = [c for c in clusters if c.silence >= SILENCE and c.events >= BURST]
    inside = sum(c.events for c in bursts)
    cure = f"switch buffering off: {proxy_cure(head)}"
    if torn:
        size = f"{statistics.median_low(c.size for c in torn)} bytes"
        yield Finding(
            "buffering",
            f"{len(torn)} pauses of up to {span(max(c.pause for c in torn))} began in"
            f" the middle of an event (after {size}): a proxy or middleware collects"
            " bytes and sends them when its buffer is full",
            cure,
        )
    elif bursts and bursts[0] is clusters[0] and inside == seen.events:
        yield Finding(
            "buffering",
            f"nothing came for {span(clusters[0].at)}, then {clusters[0].events} events"
            " at once: a proxy or middleware collects them",
            cure,
        )
    elif bursts and inside * 2 >= seen.events:
        yield Finding(
            "bursts",
            f"{inside} of {seen.events} events came in {len(bursts)} bursts, after"
            f" silences of up to {span(max(c.silence for c in bursts))}",
            f"if the application did not send them together, {cure}",
            "note",
        )


def keepalive(seen: Observation, head: Head) -> Iterator[Finding]:
    silence = seen.longest_silence
    if seen.kind != "sse" or not seen.arrivals or silence < KEEPALIVE + LATE:
        return
    yield Finding(
        "keepalive",
        f"up to {span(silence)} passed without a byte: proxies close silent"
        " connections (nginx and AWS after 60 s), and servers do not notice that a"
        " client has left",
        "send a comment when there was no event for 15 s, as SSEResponse does"
        ' (keepalive=15.0); by hand: yield Event(comment="keepalive")',
        "fault" if silence >= IDLE else "note",
    )


def encoding(seen: Observation, head: Head) -> Iterator[Finding]:
    if value := coding_of(head):
        yield Finding(
            "compressed",
            f"Content-Encoding is {show(value, 40)}, but the request accepted none",
            "exclude the stream from compression in middleware and proxies",
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
        f"a second connection, opened right after the first was closed: {text}",
        "a worker may still serve the first connection: yield more often, and give"
        " the server more threads than streams",
        "note",
    )


def _compressed(seen: Observation, probe: Observation, coding: str) -> Finding:
    cure = (
        "send Cache-Control: no-transform, and exclude text/event-stream from"
        " compression in middleware and proxies (nginx: gzip_types; Django:"
        " GZipMiddleware)"
    )
    plain, packed = seen.first_event, probe.first_event
    what = f"a client that accepts gzip, as browsers do, gets {coding}"
    if plain is None or coding not in INFLATABLE:
        text = f"{what}; it is unknown whether that delays events"
        return Finding("gzip", text, cure, "note")
    if packed is None:
        if probe.end == "open" and plain + SLOW > probe.listened:
            text = f"{what}; no event came while listening"
            return Finding("gzip", text, cure, "note")
        delay = f"none in {span(probe.listened)}"
    elif packed > plain + SLOW:
        delay = f"the first came after {span(packed)}"
    else:
        return Finding("gzip", f"{what}; events still come in time", cure, "note")
    text = f"{what}, and events are held back: {delay}, against {span(plain)} without"
    return Finding("gzip", f"{text} gzip", cure)
