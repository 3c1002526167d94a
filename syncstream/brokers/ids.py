"""Ids ``<number>-<nonce>`` in hexadecimal digits, for all brokers but Redis.

The number counts events; the nonce is random for each event, so that a log
that begins anew, or has lost its newest events, never repeats an id. Redis uses the ids
of its streams.
"""

from __future__ import annotations

import os
import re

__all__ = ["make_id", "make_nonce", "parse_id", "spell_id"]
# Clients send ids: read no larger numbers than every engine's integers can hold.
_ID = re.compile(r"([0-9a-f]{1,15})-([0-9a-f]{8})")


def spell_id(number: int, nonce: int) -> str:
    return f"{number:x}-{nonce:08x}"


def make_id(number: int) -> str:
    """Return an id with a new nonce; twice as fast as `spell_id` with `make_nonce`."""
    return f"{number:x}-{os.urandom(4).hex()}"


def parse_id(id: str) -> tuple[int, int] | None:
    """Return an id's number and nonce; ``None`` if it is not of this form."""
    found = _ID.fullmatch(id)
    return None if found is None else (int(found[1], 16), int(found[2], 16))


def make_nonce() -> int:
    # Not from `random`: an application that seeds it would get the same ids again.
    return int.from_bytes(os.urandom(4), "big")
