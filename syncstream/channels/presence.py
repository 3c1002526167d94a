"""Join and leave announcements, which take no place in a channel's history.

The "join" and "leave" events of all channels are stored under one name of the hub's
own, so that however many connections there are, they evict no event of a channel. Each
process of a hub watches it, and sets what it is told aside in the window of the channel
(`Log.set_aside`): whoever is there gets it, and nobody who comes later.
"""

from __future__ import annotations

import json

from ..brokers.log import Entry

__all__ = ["PRESENCE", "decoded", "encoded"]

PRESENCE = "syncstream presence"  # a space: no application's, no pattern's
_BEGINNINGS = b"event: join\n", b"event: leave\n"


def encoded(channel: str, fields: bytes) -> bytes:
    """Return what is stored of an event; ``fields`` are its, without an id."""
    # Workers of a version without this deliver it to nobody, though they have "#".
    return b"\0%b\n%b" % (json.dumps({"only": [], "in": [channel]}).encode(), fields)


def decoded(entry: Entry) -> tuple[str, bytes]:
    """Return the channel and the fields of an event in which `log.flaw` found none.

    Raises:
        ValueError: It tells of nobody.
    """
    found = json.loads(entry.tags or b"{}").get("in", ())
    if len(found) != 1 or not entry.fields.startswith(_BEGINNINGS):
        raise ValueError("it tells of nobody")
    return found[0], entry.fields
