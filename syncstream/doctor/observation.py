"""An observed response: head, arrivals, end."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal
from urllib.parse import urlsplit

from ..protocol import ndjson

__all__ = [
    "Arrival",
    "Finding",
    "Head",
    "INFLATABLE",
    "NoStream",
    "Observation",
    "coding_of",
    "kind_of",
    "place",
    "show",
    "span",
]
MAX_REDIRECTS = 5
BURST = 3  # events at once, at least

Level = Literal["fault", "note"]
End = Literal["open", "whole", "closed", "cut", "reset", "broken", "enough"]


@dataclass(frozen=True, slots=True)
class Finding:
    """A fact about a stream, and its cure.

    Attributes:
        name: A short name that stays the same, such as ``content-type``.
        text: The fact.
        cure: The advice.
        level: A ``fault`` breaks the stream for some clients, a ``note`` does not.
    """

    name: str
    text: str
    cure: str
    level: Level = "fault"


class NoStream(Exception):
    """There is no response to listen to; the finding has the reason."""

    def __init__(self, name: str, text: str, cure: str) -> None:
        super().__init__(text)
        self.finding = Finding(name, text, cure)


@dataclass(frozen=True, slots=True)
class Head:
    """A response's head.

    Attributes:
        version: ``1.0`` or ``1.1``.
        headers: Names and values in their order, decoded as Latin-1.
        malformed: Number of lines that are no headers.
    """

    version: str
    status: int
    reason: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    malformed: int = 0

    def all(self, name: str) -> list[str]:
        """Return the values of all headers with this name."""
        return [value for n, value in self.headers if n.lower() == name.lower()]

    def get(self, name: str) -> str:
        """Return these values joined by commas, ``""`` without such a header."""
        return ", ".join(self.all(name))

    def words(self, name: str) -> set[str]:
        """Return these values' comma-separated words, lower case, without arguments."""
        parts = self.get(name).lower().split(",")
        return {word for part in parts if (word := part.partition("=")[0].strip())}


@dataclass(frozen=True, slots=True)
class Arrival:
    """The part of the body that one read from the connection returned.

    Attributes:
        at: Seconds after the request was sent.
        size: Bytes on the wire, without the framing of chunks.
        events: Number of events (or NDJSON lines) completed by it.
        comments: Number of comment lines completed by it.
        is_torn: The part ends within an event or a line.
    """

    at: float
    size: int
    events: int = 0
    comments: int = 0
    is_torn: bool = False

    def __add__(self, later: Arrival) -> Arrival:
        return Arrival(
            self.at,
            self.size + later.size,
            self.events + later.events,
            self.comments + later.comments,
            later.is_torn,
        )


@dataclass(frozen=True, slots=True)
class Observation:
    """Everything seen of one stream.

    Attributes:
        url: The address that answered, after redirects.
        redirects: Status and target of each redirect that was followed.
        has_dropped_headers: A redirect led to another origin, to which the user's
            headers were not sent.
        connected: Seconds until the connection was open, TLS included; ``None`` if
            there was none.
        failure: The reason why there was no response.
        head_at: Seconds from the request to the end of the head.
        listened: Seconds from the request to the end of listening.
        end: How the stream ended: ``open``: it had not ended when the time was up;
            ``whole``: with its end mark; ``closed``: the framing has no end mark;
            ``cut``: without its end mark; ``reset``: by a connection error;
            ``broken``: by bytes that break the format; ``enough``: at a limit.
        problem: The cause, for ``broken`` and ``reset``.
        stray: Number of lines that are neither fields nor comments; ``sample`` is the
            first of them.
        dataless: Number of blocks that name an event but have no data.
        is_posted: The request was a POST, which an EventSource never sends.
        probe: The observation of a second connection, which accepted gzip.
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
        return "other" if self.head is None else kind_of(self.head)

    @property
    def events(self) -> int:
        return sum(arrival.events for arrival in self.arrivals)

    @property
    def first_event(self) -> float | None:
        return next((a.at for a in self.arrivals if a.events), None)

    @property
    def longest_silence(self) -> float:
        """The longest time without a byte, in seconds."""
        times = [self.head_at, *(a.at for a in self.arrivals), self.listened]
        return max(after - before for before, after in pairwise(times))


def kind_of(head: Head) -> Literal["sse", "ndjson", "other"]:
    media_type = head.get("Content-Type").partition(";")[0].strip().lower()
    if media_type == "text/event-stream":
        return "sse"
    return "ndjson" if media_type in ndjson.MEDIA_TYPES else "other"


def show(text: str, length: int = 100) -> str:
    """Return text from outside as printable ASCII of a bounded length.

    An escape sequence could move the cursor and hide a finding.
    """
    short = text[:length]
    escaped = "".join(
        c if " " <= c <= "~" else c.encode("unicode_escape").decode() for c in short
    )
    return f"{escaped}..." if len(text) > length else escaped


def place(url: str, length: int = 100) -> str:
    """Return a URL for reports, without its query's values: they are often tokens."""
    parts = urlsplit(url)
    pairs = [part.partition("=") for part in parts.query.split("&")]
    query = "&".join(f"{name}=..." if equals else "..." for name, equals, _ in pairs)
    return show(parts._replace(query=query if parts.query else "").geturl(), length)


def span(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 0.9995 else f"{seconds:.2f} s"


def coding_of(head: Head) -> str:
    value = head.get("Content-Encoding").strip().lower()
    return "" if value == "identity" else value


INFLATABLE = ("gzip", "x-gzip", "deflate")
