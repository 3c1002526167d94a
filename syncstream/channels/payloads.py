"""Encodes events for the broker: their fields, within a maximum size."""

from __future__ import annotations

import json
from typing import Any

from ..errors import PayloadTooLarge
from ..protocol.json import Dumps, dumps_or_default
from ..protocol.sse import Decoder, Event
from .gap import GAP_EVENT

__all__ = ["Payloads", "decoder_of"]


class Payloads:
    """Makes events of the application's data, and encodes them.

    Args:
        dumps: The JSON encoder for data that is not text; ``None`` for the default.
        max_size: The maximum of bytes of an encoded event.
    """

    __slots__ = ("_dumps", "max_size")

    def __init__(self, dumps: Dumps | None, max_size: int) -> None:
        self._dumps = dumps_or_default(dumps)
        self.max_size = max_size

    def event(self, data: Any, event: str | None, retry: int | None) -> Event:
        """Return an event; data that is not text becomes JSON."""
        if data is not None and not isinstance(data, (str, bytes, bytearray)):
            text = self._dumps(data)
            data = text if isinstance(text, str) else text.decode()
        return Event(data, event=event, retry=retry)

    def encoded(self, item: Any) -> bytes:
        """Return the encoded fields of an `Event`, or of an event's data.

        Raises:
            ValueError: The event has an id, no data, or the reserved name "reset".
        """
        event = item if isinstance(item, Event) else self.event(item, None, None)
        if event.id is not None:
            raise ValueError(
                f"id must be None, as the broker creates ids, got {event.id!r}"
            )
        if event.event == GAP_EVENT:
            raise ValueError(
                f"event must not be {GAP_EVENT!r}: that name is reserved for gaps"
            )
        if event.data is None:
            # Readers would never see it: browsers dispatch nothing without data.
            raise ValueError("data must be given: without it nothing is dispatched")
        return event.encode(self._dumps)

    def check_size(self, payload: bytes) -> None:
        """Check the size of an encoded event.

        Raises:
            PayloadTooLarge: It exceeds the maximum.
        """
        if len(payload) > self.max_size:
            raise PayloadTooLarge(
                f"an event must have {self.max_size} bytes at most, encoded,"
                f" got {len(payload)}: raise max_payload, or publish where the data is"
            )

    def announcement(self, who: Any) -> str:
        """Return the data of a subscription's "join" and "leave" events.

        It is encoded once, in `Hub.subscribe`, which raises any error. Later it would
        be raised in the code that ends the subscription.
        """
        event = self.event({"who": who}, "leave", None)
        self.check_size(event.encode())
        return str(event.data)

    def name_of(self, who: Any) -> str:
        """Return the JSON of a ``who`` in one normal form, for comparisons."""
        if not isinstance(who, (str, int)):
            who = json.loads(self._dumps(who))
        return json.dumps(who, sort_keys=True)

    def snapshot(self, item: Any) -> Event:
        """Return an event of an item that ``on_gap`` has returned.

        Raises:
            ValueError: The item has an id, or no data.
        """
        event = item if isinstance(item, Event) else self.event(item, None, None)
        if event.id is not None:
            raise ValueError(f"on_gap must return events without id, got {event.id!r}")
        if event.data is None:
            raise ValueError("on_gap must return events with data")
        data = event.data  # it becomes text, like the data of stored events
        if isinstance(data, (bytes, bytearray)):
            data = data.decode()
        return self.event(data, event.event, event.retry)


def decoder_of() -> Decoder:
    """Return one for an event of the broker's, which may be as large as it takes."""
    return Decoder(max_line=None, max_event=None)
