"""Join and leave announcements, which take no place in a channel's history.

The "join" and "leave" events of all channels are stored under one name of the hub's
own, so that they displace no event of a channel, however many connections come and go.
Each process of a hub watches that name, and sets each announcement aside in the window
of its channel (`Log.set_aside`): present subscribers get it, later ones do not.
"""

from __future__ import annotations

import json

from ..brokers.log import Entry

__all__ = ["PRESENCE", "decoded", "encoded"]

PRESENCE = "syncstream presence"  # with a space: no application and no pattern has it
_BEGINNINGS = b"event: join\n", b"event: leave\n"


def encoded(channel: str, fields: bytes) -> bytes:
    """Return the payload of an announcement; ``fields`` are the event's, without id."""
    # Workers of a version without announcements deliver it to nobody, even through "#".
    return b"\0%b\n%b" % (json.dumps({"only": [], "in": [channel]}).encode(), fields)


def decoded(entry: Entry) -> tuple[str, bytes]:
    """Return the channel and the fields of an announcement that `log.flaw` has passed.

    Raises:
        ValueError: It is not an announcement.
    """
    found = json.loads(entry.tags or b"{}").get("in", ())
    if len(found) != 1 or not entry.fields.startswith(_BEGINNINGS):
        raise ValueError("it is neither a join nor a leave")
    return found[0], entry.fields
