"""Reads back what a server has written: a head, and an opening in its framing.

Spec: https://www.rfc-editor.org/rfc/rfc9112. The framing (chunked or raw) is learned
from the bytes of the server, not assumed.
"""

from __future__ import annotations

import functools
import re

__all__ = ["read_back"]

_HEAD = re.compile(
    rb"HTTP/1\.[01] (?!204|205|304)[2-5][0-9][0-9](?: [^\r\n\0]*)?"
    rb"(?:\r\n[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\0]*)*"
)
# With these headers the body is transformed, or ends elsewhere.
_FOREIGN = re.compile(
    rb"\r\n(?:content-length|content-encoding|upgrade|trailer):", re.IGNORECASE
)
_CODING = re.compile(rb"\r\ntransfer-encoding:([^\r\n]*)", re.IGNORECASE)
_HOP_BY_HOP = re.compile(
    rb"\r\n(?:connection|keep-alive|proxy-connection|transfer-encoding):[^\r\n]*",
    re.IGNORECASE,
)
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})\r\n")


def read_back(
    written: bytes, opening: bytes, *, is_http_1_0: bool
) -> tuple[bytes, bool] | None:
    """Return a server's head and opening, rewritten for the new owner.

    Args:
        written: All bytes that the server wrote.
        opening: The bytes that it was given for the body, not empty.
        is_http_1_0: The client speaks HTTP/1.0, which has no chunks.

    Returns:
        The head and the framed opening, and whether the framing is chunked. The head
        now says that the connection closes: a proxy that kept it in its pool would
        lose a request. ``None`` unless the server wrote exactly one HTTP/1 head and
        the opening, raw or as one chunk.
    """
    head, blank, body = written.partition(b"\r\n\r\n")
    if not blank or not opening:
        return None
    read = _read_head(head)
    if read is None:
        return None
    kept, has_chunks = read
    if (_unchunked(body) if has_chunks else body) != opening:
        return None
    # Werkzeug sends chunks to HTTP/1.0 clients, too (3.1).
    is_chunked = has_chunks and not is_http_1_0
    ours = b"\r\nConnection: close\r\n\r\n"
    if is_chunked:
        ours = b"\r\nTransfer-Encoding: chunked" + ours
    framed = body if is_chunked else opening
    return kept + ours + framed, is_chunked


@functools.lru_cache(maxsize=16)  # those who come in the same second have the same head
def _read_head(head: bytes) -> tuple[bytes, bool] | None:
    """Return a head without what concerns its server's connection, and its framing.

    Returns:
        The head, and whether the body is chunked; ``None`` if it is no head of a body
        that goes on until the connection closes, or is transformed.
    """
    if not _HEAD.fullmatch(head) or _FOREIGN.search(head):
        return None
    codings = [value.strip(b" \t").lower() for value in _CODING.findall(head)]
    if codings not in ([], [b"chunked"]):
        return None
    return _HOP_BY_HOP.sub(b"", head), bool(codings)


def _unchunked(body: bytes) -> bytes | None:
    """Return the data of a body that is one chunk, else ``None``."""
    size = _CHUNK.match(body)
    if size is None:
        return None
    data = body[size.end() : -2]
    is_whole = body.endswith(b"\r\n") and len(data) == int(size[1], 16)
    return data if is_whole else None
