"""Ids ``<number>-<nonce>``, in hexadecimal digits, as most engines have them.

The number counts; the nonce is the event's own: a log that begins anew, or lost its
newest events, makes no id a second time. Redis has its own: those of its streams.
"""

from __future__ import annotations

import os
import re

__all__ = ["make_id", "make_nonce", "parse_id", "spell_id"]
# What any engine's integers take, with room to count on. Ids come from outside.
_ID = re.compile(r"([0-9a-f]{1,15})-([0-9a-f]{8})")


def spell_id(number: int, nonce: int) -> str:
    return f"{number:x}-{nonce:08x}"


def make_id(number: int) -> str:
    """Return an id with a new nonce; in half the time of spelling `make_nonce`'s."""
    return f"{number:x}-{os.urandom(4).hex()}"


def parse_id(id: str) -> tuple[int, int] | None:
    """Return its number and nonce; ``None``: it is none of ours."""
    found = _ID.fullmatch(id)
    return None if found is None else (int(found[1], 16), int(found[2], 16))


def make_nonce() -> int:
    # Not of `random`: an application that seeds it would have the same ids again.
    return int.from_bytes(os.urandom(4), "big")
