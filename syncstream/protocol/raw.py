"""Raw streams: chunks of text or bytes, written unchanged."""

from __future__ import annotations

from typing import Any

__all__ = ["as_bytes", "encode", "encode_bytes"]


def encode(item: Any) -> bytes | None:
    """Turn a chunk into bytes: ``str`` as UTF-8, ``bytes`` unchanged.

    ``None``, ``""`` and ``b""`` are checkpoints. Anything else is a ``TypeError``.
    """
    if isinstance(item, str):
        return item.encode() or None
    return _passed(
        item,
        "str, bytes or None",
        ": yield its text, or return an NDJSONResponse, which sends JSON",
    )


def encode_bytes(item: Any) -> bytes | None:
    """Pass a WSGI application's chunk through; ``b""`` and ``None`` are checkpoints.

    Anything else but bytes is a ``TypeError``.
    """
    return _passed(item, "bytes")


def _passed(item: Any, expected: str, cure: str = "") -> bytes | None:
    if type(item) is bytes:
        return item or None
    if item is None:
        return None
    if isinstance(item, (bytes, bytearray, memoryview)):
        return as_bytes(item) or None
    # A lazy string of Django's looks like text, but for its type.
    kind = type(item).__qualname__
    raise TypeError(f"a chunk must be {expected}, got {item!r} ({kind}){cure}")


def as_bytes(item: bytes | bytearray | memoryview) -> bytes:
    """Return bytes as ``bytes``.

    Raises:
        TypeError: It is a memoryview of other items, such as numbers: a client cannot
            read their memory.
    """
    if isinstance(item, memoryview) and (item.format, item.ndim) != ("B", 1):
        raise TypeError(
            "a memoryview must be a row of bytes (format 'B'), got format"
            f" {item.format!r} in {item.ndim} dimensions: yield its tolist() instead"
        )
    return bytes(item)
