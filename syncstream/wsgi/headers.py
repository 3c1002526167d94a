"""Headers of a stream: our defaults, and the user's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import Any

from ..servers.connection import Connection

__all__ = [
    "CONTROLS",
    "EVENT_HEADERS",
    "HOP_BY_HOP",
    "LIVE",
    "NDJSON_HEADERS",
    "answering",
    "ends_line",
]

# The connection of the request that the middleware's application is answering here.
answering: ContextVar[Callable[[], Any] | None] = ContextVar(
    "syncstream_answering", default=None
)

LIVE = {
    # no-transform keeps proxies from compressing, and so from buffering; nginx needs
    # its own header.
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",
}
EVENT_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", **LIVE}
NDJSON_HEADERS = {"Content-Type": "application/x-ndjson", **LIVE}
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
HOP_BY_HOP = frozenset(  # of RFC 2616 §13.5.1, as PEP 3333 refers to it
    [
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization"),
        *("te", "trailers", "transfer-encoding", "upgrade"),
    ]
)
CONTROLS = re.compile(r"[\r\n\0]")

HeaderSource = (
    Mapping[str, "str | int | None"] | Iterable[tuple[str, "str | int | None"]]
)
"""Header names and values; the value ``None`` removes a default."""


BODILESS = frozenset((204, 205, 304))


def has_body(connection: Connection, status: int) -> bool:
    """Tell whether a response has a body (RFC 9110 §6.4.1)."""
    return not (connection.is_head or status < 200 or status in BODILESS)


def merge_headers(
    defaults: Mapping[str, str], given: HeaderSource | None
) -> list[tuple[str, str]]:
    """Return the default headers, overridden by the given ones.

    Hop-by-hop headers are left out, as they belong to the server (PEP 3333): on
    wsgiref, waitress and Django's runserver such a header causes a 500.

    Raises:
        TypeError, ValueError: A header cannot be sent.
    """
    if given is None:
        return [*defaults.items()]
    # Werkzeug's Headers are a multidict: items() repeats a name.
    items = given.items() if hasattr(given, "items") else given
    pairs = [_checked_header(item) for item in items]
    names = {name.lower() for name, _ in pairs}
    merged = [(n, v) for n, v in defaults.items() if n.lower() not in names]
    merged += [(name, str(value)) for name, value in pairs if value is not None]
    return without_hop_by_hop(merged)


def _checked_header(item: Any) -> tuple[str, str | int | None]:
    """Return a header if it can be sent (RFC 9110 §5), else raise."""
    if not isinstance(item, tuple) or len(item) != 2:
        raise TypeError(
            f"headers must be a mapping or pairs of name and value, got {item!r}"
        )
    name, value = item
    if not isinstance(name, str) or not _TOKEN.fullmatch(name):
        raise ValueError(
            f"headers must have HTTP tokens as names (RFC 9110 §5.6.2), got {name!r}"
        )
    if value is not None and not isinstance(value, (str, int)):
        raise TypeError(f"headers must have values of str, int or None, got {item!r}")
    if isinstance(value, str) and CONTROLS.search(value):
        raise ValueError(f"headers must not contain CR, LF or NUL, got {item!r}")
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode("latin-1")
        except UnicodeEncodeError:
            raise ValueError(
                f"headers must have values in Latin-1 (PEP 3333), got {item!r}"
            ) from None
    return name, value


def without_hop_by_hop(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in headers if name.lower() not in HOP_BY_HOP]


def ends_line(tail: bytes) -> bool:
    return tail[-1:] in (b"", b"\n")
