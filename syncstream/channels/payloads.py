"""What a hub stores of an event: its fields, encoded, within a size."""

from __future__ import annotations

import json
from typing import Any

from ..errors import PayloadTooLarge
from ..protocol.json import Dumps, dumps_or_default
from ..protocol.sse import Decoder, Event
from .gap import GAP_EVENT

__all__ = ["Payloads", "decoder_of"]


class Payloads:
    """Makes events of what an application has given.

    Args:
        dumps: Encodes what is not text; ``None`` for the default.
        max_size: Bytes an event may have, encoded.
    """

    __slots__ = ("_dumps", "max_size")

    def __init__(self, dumps: Dumps | None, max_size: int) -> None:
        self._dumps = dumps_or_default(dumps)
        self.max_size = max_size

    def event(self, data: Any, event: str | None, retry: int | None) -> Event:
        """Return an event of text, or of what becomes JSON."""
        if data is not None and not isinstance(data, (str, bytes, bytearray)):
            text = self._dumps(data)
            data = text if isinstance(text, str) else text.decode()
        return Event(data, event=event, retry=retry)

    def encoded(self, item: Any) -> bytes:
        """Return the fields of an event, or of its data.

        Raises:
            ValueError: It has an id, no data, or a name that is the hub's own.
        """
        event = item if isinstance(item, Event) else self.event(item, None, None)
        if event.id is not None:
            raise ValueError(f"id must be the broker's own, got {event.id!r}")
        if event.event == GAP_EVENT:
            raise ValueError(
                f"event must not be {GAP_EVENT!r}: it says that events are missing"
            )
        if event.data is None:
            # Readers would never see it: nothing is dispatched without data.
            raise ValueError("data must be given: an event without is not dispatched")
        return event.encode(self._dumps)

    def check_size(self, payload: bytes) -> None:
        """Refuse what is larger than an event may be, encoded.

        Raises:
            PayloadTooLarge: It is.
        """
        if len(payload) > self.max_size:
            raise PayloadTooLarge(
                f"an event must have {self.max_size} bytes at most, encoded,"
                f" got {len(payload)}"
            )

    def announcement(self, who: Any) -> str:
        """Return the data of the events that tell who comes and goes.

        Made once, by whoever subscribes: an error is theirs, and not that of whoever
        kicks them, or finds that they have gone.
        """
        event = self.event({"who": who}, "leave", None)
        self.check_size(event.encode())
        return str(event.data)

    def name_of(self, who: Any) -> str:
        """Return the JSON of a ``who``, in one form."""
        if not isinstance(who, (str, int)):
            who = json.loads(self._dumps(who))
        return json.dumps(who, sort_keys=True)

    def snapshot(self, item: Any) -> Event:
        """Return an event of what ``on_gap`` has returned.

        Raises:
            ValueError: It has an id, or no data.
        """
        event = item if isinstance(item, Event) else self.event(item, None, None)
        if event.id is not None:
            raise ValueError("a snapshot's events must have no id")
        if event.data is None:
            raise ValueError("a snapshot's events must have data")
        data = event.data  # text, in the end, as what a broker has
        if isinstance(data, (bytes, bytearray)):
            data = data.decode()
        return self.event(data, event.event, event.retry)


def decoder_of() -> Decoder:
    """Return one for an event of the broker's, which may be as large as it takes."""
    return Decoder(max_line=None, max_event=None)
