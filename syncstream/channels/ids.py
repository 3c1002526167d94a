"""Last-Event-IDs, of one channel and of several."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

__all__ = ["MAX_ID", "NOWHERE", "composite", "is_id", "parts_of"]

MAX_ID = 4096  # the characters of an id that are read
NOWHERE = "-"  # an id that no broker has
_ID = re.compile(r"[0-9a-f]+(-[0-9a-f]+)?")


def is_id(id: str) -> bool:
    """Tell whether a broker may have created this id."""
    return len(id) <= 40 and _ID.fullmatch(id) is not None


def composite(names: Iterable[str], ids: Iterable[str | None]) -> str:
    """Return one id for several channels; `parts_of` takes it apart.

    Args:
        names: The channels.
        ids: The id of each channel, in the same order; ``None`` if it is unknown.
    """
    pairs = zip(names, ids, strict=True)
    return ",".join(f"{_hash_of(name)}.{id or ''}" for name, id in pairs)


def parts_of(id: str, channels: tuple[str, ...]) -> dict[str, str]:
    """Return the ids of these channels that a Last-Event-ID contains.

    The client chooses it: each id may be any text.
    """
    if len(channels) == 1 and "." not in id:
        return {channels[0]: id}
    hashes = {_hash_of(name): name for name in channels}
    parts = {}
    for part in id[:MAX_ID].split(","):
        short, _, own = part.partition(".")
        if short in hashes:
            parts[hashes[short]] = own
    return parts


def _hash_of(name: str) -> str:
    # Long enough that nobody can find two names with the same hash.
    return hashlib.blake2b(name.encode(), digest_size=10).hexdigest()
