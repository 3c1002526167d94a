"""The forms in which a subscription gives items out: events, frames, lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..protocol.json import Dumps
from ..protocol.sse import Event
from .cursor import Cursor, Item
from .gap import Gap
from .payloads import decoder_of

__all__ = ["decoded", "framed", "lined"]

Ids = Callable[[Cursor, str], str] | None
"""Returns the id for a reader of several channels, see `Reading.id_at`; ``None`` for a
reader of one channel, who gets the events' own ids."""


def framed(item: Item, ids: Ids) -> bytes:
    """Return an item as the bytes of an event stream."""
    cursor, entry = item
    if isinstance(entry, Event):
        return decoded(item, ids).encode()
    if ids is None:
        return entry.wire
    return b"id: %b\n%b" % (ids(cursor, entry.id).encode(), entry.fields)


def decoded(item: Item, ids: Ids) -> Event:
    """Return an item as an event, with the id for its reader."""
    cursor, entry = item
    if isinstance(entry, Event):  # a gap, or a snapshot's
        if ids is None or entry.id is None:
            return entry
        kind = Gap if isinstance(entry, Gap) else Event
        id = ids(cursor, str(entry.id))
        return kind(entry.data, event=entry.event, retry=entry.retry, id=id)
    decoder = decoder_of()
    (event,) = decoder.feed(entry.wire if ids is None else framed(item, ids))
    if decoder.retry is None:
        return event
    return Event(event.data, event=event.event, id=event.id, retry=decoder.retry)


def lined(item: Item, ids: Ids, dumps: Dumps) -> bytes:
    """Return an item as a line of NDJSON."""
    event = decoded(item, ids)
    fields: Mapping[str, Any] = {
        **({} if ids is None else {"channel": item[0].name}),
        "id": event.id,
        **({"event": event.event} if event.event else {}),
        "data": event.data,
    }
    text = dumps(fields)
    return (text.encode() if isinstance(text, str) else text) + b"\n"
