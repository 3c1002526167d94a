"""Tags: which subscribers an event is meant for."""

from __future__ import annotations

import json
from collections.abc import Iterable

__all__ = ["NO_TAGS", "check_tags", "tag_prefix"]


def check_tags(name: str, tags: Iterable[str]) -> list[str]:
    """Return tags as a list.

    Raises:
        TypeError: They are not an iterable of ``str``, or a single ``str``.
    """
    # A string is an iterable, too, but its characters are not meant as tags.
    # Test for the usual types first: a test for an ABC takes ten times as long.
    is_usual = isinstance(tags, (list, tuple, set, frozenset))
    if not is_usual and (
        isinstance(tags, (str, bytes)) or not isinstance(tags, Iterable)
    ):
        raise TypeError(f"{name} must be a list of strings, got {tags!r}")
    listed = list(tags)
    for tag in listed:
        if not isinstance(tag, str):
            raise TypeError(f"{name} must be a list of strings, got {tag!r} in it")
    return listed


def tag_prefix(only: Iterable[str] | None, exclude: Iterable[str]) -> bytes:
    """Return the line of tags before an event's fields, ``b""`` for all subscribers."""
    if only is None and type(exclude) is tuple and not exclude:
        return b""  # the defaults: most events are for all
    tags: dict[str, list[str]] = {}
    if only is not None:  # an empty list, often a computed one, selects nobody
        tags["only"] = check_tags("only", only)
    excluded = check_tags("exclude", exclude)
    if excluded:
        tags["exclude"] = excluded
    return b"\0%b\n" % json.dumps(tags).encode() if tags else b""


NO_TAGS: frozenset[str] = frozenset()
