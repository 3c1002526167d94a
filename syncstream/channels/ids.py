"""Last-Event-IDs: of one channel, and one that stands for several."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

__all__ = ["MAX_ID", "NOWHERE", "composite", "is_id", "parts_of"]

MAX_ID = 4096  # characters of an id that are looked at
NOWHERE = "-"  # an id that no broker has
_ID = re.compile(r"[0-9a-f]+(-[0-9a-f]+)?")


def is_id(id: str) -> bool:
    """Tell whether a broker may have given this id."""
    return len(id) <= 40 and _ID.fullmatch(id) is not None


def composite(names: Iterable[str], ids: Iterable[str | None]) -> str:
    """Return one id for several channels; `parts_of` takes it apart.

    Args:
        names: The channels.
        ids: Of each channel, in the same order; ``None`` where none is known.
    """
    pairs = zip(names, ids, strict=True)
    return ",".join(f"{_hash_of(name)}.{id or ''}" for name, id in pairs)


def parts_of(id: str, channels: tuple[str, ...]) -> dict[str, str]:
    """Return the id of each of these channels that is in a Last-Event-ID.

    Whatever it says, it comes from outside: each part may be any text.
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
    # So long that no two names have the same one, not even if someone looks for them.
    return hashlib.blake2b(name.encode(), digest_size=10).hexdigest()
