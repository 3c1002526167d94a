"""Tags: which subscribers an event is meant for."""

from __future__ import annotations

import json
from collections.abc import (
    Iterable,
)

__all__ = ["NO_TAGS", "check_tags", "tag_prefix"]


def check_tags(name: str, tags: Iterable[str]) -> list[str]:
    # The characters of a text are no tags.
    if isinstance(tags, (str, bytes)) or not isinstance(tags, Iterable):
        raise TypeError(f"{name} must be several strings, got {tags!r}")
    listed = list(tags)
    for tag in listed:
        if not isinstance(tag, str):
            raise TypeError(f"{name} must be strings, got {tag!r}")
    return listed


def tag_prefix(only: Iterable[str] | None, exclude: Iterable[str]) -> bytes:
    """Return what stands before an event that is not for everybody."""
    tags: dict[str, list[str]] = {}
    if only is not None:  # a computed list that is empty is nobody
        tags["only"] = check_tags("only", only)
    excluded = check_tags("exclude", exclude)
    if excluded:
        tags["exclude"] = excluded
    return b"\0%b\n" % json.dumps(tags).encode() if tags else b""


NO_TAGS: frozenset[str] = frozenset()
