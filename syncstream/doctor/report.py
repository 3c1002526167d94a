"""The report: findings in plain words."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterator, Sequence
from itertools import pairwise

from .cures import proxies_of
from .observation import End, Finding, Head, Observation, coding_of, place, show, span

__all__ = ["report"]


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
    yield "address", place(seen.url, 400)
    if seen.connected is not None:
        yield "connected", f"in {span(seen.connected)}"
    head = seen.head
    if head is None:
        return
    words = f"HTTP/{head.version} {head.status} {show(head.reason, 40)}".rstrip()
    yield "head", f"{words}, after {span(seen.head_at)}"
    yield "type", show(head.get("Content-Type")) or "none"
    yield "server", show(_server(head))
    if head.status != 200:
        return
    if seen.arrivals:
        yield "first byte", f"after {span(seen.arrivals[0].at)}"
    else:
        yield "first byte", f"none in {span(seen.listened)}"
    yield "events", _spacing(seen)
    if seen.kind != "ndjson":
        yield "comments", _cadence(seen)
        retry = "none" if seen.retry is None else f"{seen.retry} ms"
        ids = f'yes, the last is "{show(seen.last_id, 40)}"' if seen.last_id else "none"
        yield "retry", retry
        yield "ids", ids
    yield "silence", f"{span(seen.longest_silence)} at most"
    if seen.probe is not None and seen.probe.head is not None:
        coding = coding_of(seen.probe.head)
        yield "compression", show(coding, 40) if coding else "none (gzip accepted)"
    yield "end", f"{_ENDS[seen.end]}, after {span(seen.listened)}"


_ENDS: dict[End, str] = {
    "open": "still open when listening stopped",
    "whole": "finished, with its end mark",
    "closed": "closed without HTTP's end mark: finished or cut",
    "cut": "cut, without its end mark",
    "reset": "cut by a connection error",
    "broken": "unreadable: gave up",
    "enough": "closed by the doctor: enough data",
}


def _server(head: Head) -> str:
    via, server = head.get("Via"), head.get("Server")
    proxies = ", ".join(dict.fromkeys(name for name, _ in proxies_of(head)))
    text = server or "unknown"
    if via:
        text += f", via {via}"
    return f"{text} (proxy: {proxies})" if proxies else text


def _spacing(seen: Observation) -> str:
    count = seen.events
    if not count:
        return "none"
    times = [a.at for a in seen.arrivals for _ in range(a.events)]
    text = f"{count}, the first after {span(times[0])}"
    if count < 2:
        return text
    gaps = [after - before for before, after in pairwise(times)]
    low, middle, high = min(gaps), statistics.median(gaps), max(gaps)
    return f"{text}; apart {span(low)} / {span(middle)} / {span(high)} (min/med/max)"


def _cadence(seen: Observation) -> str:
    times = [a.at for a in seen.arrivals if a.comments]
    count = sum(a.comments for a in seen.arrivals)
    if len(times) < 3:  # an opening comment and one more show no interval
        return str(count) if count else "none"
    gaps = [after - before for before, after in pairwise(times)]
    return f"{count}, {span(statistics.median(gaps))} apart (median)"
