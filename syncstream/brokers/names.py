"""Channel names and patterns: one set of rules for every broker."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

__all__ = [
    "NAME",
    "check_name",
    "includes",
    "is_name",
    "is_pattern",
    "matches",
    "patterns_of",
]


def is_pattern(name: str) -> bool:
    """Tell a pattern from a channel: its last level is ``*`` or ``#``."""
    return name.rpartition(":")[2] in ("*", "#")


def includes(name: str, channel: str) -> bool:
    """Tell whether a name or a pattern stands for a channel."""
    return matches(name, channel) if is_pattern(name) else name == channel


def matches(pattern: str, channel: str) -> bool:
    """Tell whether a pattern matches a channel.

    ``chat:*`` matches exactly one more level (``chat:7``); ``logs:#`` matches any
    number of further levels, including none (``logs``, ``logs:a``, ``logs:a:b``). The
    same holds for ``*`` and ``#`` alone: all names of one level, and all names.
    """
    prefix, _, last = pattern.rpartition(":")
    if last == "#":
        return not prefix or channel == prefix or channel.startswith(f"{prefix}:")
    parent, _, _ = channel.rpartition(":")
    return parent == prefix


def patterns_of(channel: str) -> Iterator[str]:
    """Yield all patterns that match a channel: two more than it has levels."""
    yield "#"
    place = channel.find(":")
    while place >= 0:
        yield f"{channel[:place]}:#"
        place = channel.find(":", place + 1)
    yield f"{channel}:#"
    parent, _, _ = channel.rpartition(":")
    yield f"{parent}:*" if parent else "*"


_MAX_NAME = 200  # characters of a channel's name
NAME = re.compile(r"[^\s\x00-\x1f\x7f*#\ud800-\udfff]+")  # no UTF-8 has surrogates


def check_name(name: Any) -> None:
    """Check the name of a channel.

    Raises:
        TypeError: It is not a ``str``.
        ValueError: It is empty, too long, or has a character that names cannot have.
    """
    if not isinstance(name, str):
        raise TypeError(f"channel must be str, got {name!r}")
    if not is_name(name):
        raise ValueError(
            f"channel must be 1 to {_MAX_NAME} characters, without white space, control"
            f" characters, * and #, got {name!r}"
        )


def is_name(name: str) -> bool:
    return len(name) <= _MAX_NAME and NAME.fullmatch(name) is not None
