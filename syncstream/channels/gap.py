"""`Gap`, the event that reports missing events."""

from __future__ import annotations

import json

from ..protocol.sse import Event

__all__ = ["GAP_EVENT", "Gap", "gap"]

GAP_EVENT = "reset"


class Gap(Event):
    """The event that reports missing events: the client should fetch its data anew.

    ``event`` is "reset". ``data`` is JSON with the ``channel`` and the ``reason``:
    "lagged" if the reader was too slow, "unknown" if the id is not kept, or the event
    after it was removed. ``id`` is the id before the next event, so that nothing is
    lost if the connection ends in between.
    """

    __slots__ = ()


def gap(channel: str, reason: str, id: str) -> Gap:
    fields = {"channel": channel, "reason": reason}
    data = json.dumps(fields, separators=(",", ":"), ensure_ascii=False)
    return Gap(data, event=GAP_EVENT, id=id)
