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
    return _passed(item, "str, bytes or None")


def encode_bytes(item: Any) -> bytes | None:
    """Pass a WSGI application's own chunk through; ``b""`` is a checkpoint.

    So is ``None``. Anything else but bytes is a ``TypeError``.
    """
    return _passed(item, "bytes")


def _passed(item: Any, expected: str) -> bytes | None:
    if type(item) is bytes:
        return item or None
    if item is None:
        return None
    if isinstance(item, (bytes, bytearray, memoryview)):
        return bytes(item) or None
    raise TypeError(f"a chunk must be {expected}, got {item!r}")
