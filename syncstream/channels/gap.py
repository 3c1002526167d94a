"""`Gap`, the event that reports missing events."""

from __future__ import annotations

import json

from ..protocol.sse import Event

__all__ = ["Gap", "gap"]

GAP_EVENT = "reset"


class Gap(Event):
    """Events are missing: what a client has, it should fetch anew.

    An event as others: ``event`` is "reset", ``data`` is JSON with the ``channel``
    and the ``reason`` ("lagged": the reader was too slow; "unknown": the id is not one
    that is kept, or what followed was removed), and ``id`` the one before what follows,
    so that nothing is lost if the connection ends in between.
    """

    __slots__ = ()


def gap(channel: str, reason: str, id: str) -> Gap:
    fields = {"channel": channel, "reason": reason}
    data = json.dumps(fields, separators=(",", ":"), ensure_ascii=False)
    return Gap(data, event=GAP_EVENT, id=id)
