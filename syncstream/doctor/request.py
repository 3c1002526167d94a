"""The request: a URL, headers and a body, checked before they are sent.

Spec: https://html.spec.whatwg.org/multipage/server-sent-events.html (the headers of
an EventSource).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from urllib.parse import SplitResult, quote, urlsplit

from .. import __version__
from ..brokers import shown

__all__ = ["Request", "is_sendable", "parse_header", "parse_url", "type_of"]


def parse_url(text: str) -> str:
    """Return the URL in the form in which it is sent.

    Raises:
        ValueError: The text is no http or https URL, or holds a password.
    """
    # A wrong URL may hold a password or a token: errors show only its scheme.
    if "://" not in text:
        raise ValueError(f"must start with http:// or https://, got {shown(text)}")
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
        if host and not host.isascii():
            host = host.encode("idna").decode()
    except ValueError:  # its message quotes them
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
        ValueError: The text is no valid header (RFC 9110, 5).
    """
    name, colon, value = text.partition(":")
    if not colon or not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
        raise ValueError("must be 'Name: value'; a wrong one is not shown")
    if not is_sendable(value):
        raise ValueError(f"must be one line of text, which {name} is not")
    return name, value.strip()


def is_sendable(text: str) -> bool:
    return not re.search("[\0-\x08\x0a-\x1f\x7f\ud800-\udfff]", text)


@dataclass(frozen=True, slots=True)
class Request:
    url: str
    headers: tuple[tuple[str, str], ...]
    insecure: bool
    data: bytes | None = None

    def encode(self, coding: str) -> bytes:
        """Return the request as an EventSource would send it, but with this coding."""
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
            fields["Content-Type"] = type_of(self.data)
            fields["Content-Length"] = str(len(self.data))
        own = {name.lower() for name, _ in self.headers}
        pairs = [(n, v) for n, v in fields.items() if n.lower() not in own]
        lines = [f"{name}: {value}" for name, value in (*pairs, *self.headers)]
        method = "GET" if self.data is None else "POST"
        head = "\r\n".join([f"{method} {target} HTTP/1.1", *lines, "", ""])
        return head.encode() + (self.data or b"")

    def redirected(self, url: str, status: int) -> Request:
        """Return the request for another URL; another origin gets no secrets."""
        # Like browsers (https://fetch.spec.whatwg.org/#http-redirect-fetch).
        data = self.data if status in (307, 308) else None
        if urlsplit(url)[:2] == urlsplit(self.url)[:2]:
            return replace(self, url=url, data=data)
        return replace(self, url=url, headers=(), data=None)


def type_of(data: bytes) -> str:
    """Return the media type of a body: that of JSON, or else of a form's fields."""
    try:
        json.loads(data)
    except RecursionError:  # only JSON nests
        return "application/json"
    except ValueError:
        return "application/x-www-form-urlencoded"
    return "application/json"
