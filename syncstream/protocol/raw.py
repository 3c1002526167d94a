"""Raw streams: chunks of text or bytes, written as they are."""

from __future__ import annotations

from typing import Any

__all__ = ["encode", "encode_bytes"]


def encode(item: Any) -> bytes | None:
    """Turn a chunk into bytes: ``str`` as UTF-8, ``bytes`` as they are.

    ``None``, ``""`` and ``b""`` are checkpoints. Anything else is a ``TypeError``.
    """
    if isinstance(item, str):
        return item.encode() or None
    return encode_bytes(item)


def encode_bytes(item: Any) -> bytes | None:
    """Pass a WSGI application's own chunk through; ``b""`` is a checkpoint."""
    if type(item) is bytes:
        return item or None
    if item is None:
        return None
    if isinstance(item, (bytes, bytearray, memoryview)):
        return bytes(item) or None
    raise TypeError(f"a chunk must be str, bytes or None, got {item!r}")
