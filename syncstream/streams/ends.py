"""The reasons for an end, and the ``retry:`` that asks clients to come back.

All sets of reasons are here. The ids by which a client is told not to come back are
`END_ID` and `REFUSED_ID` of ``protocol.sse``; `Output` sends them.
"""

from __future__ import annotations

import random

from ..protocol.sse import Event

__all__ = ["CUT", "GONE", "OPENING", "REASONS", "WHOLE", "come_back"]

REASONS = frozenset(("closed", "finished", "kicked", "denied", "shutdown"))
"""The reasons for which an application may stop a stream."""
WHOLE = frozenset(("closed", "finished"))
"""The reasons of complete responses, which the application has chosen."""
CUT = frozenset(("shutdown", "max_duration", "kicked", "denied", "refused"))
"""The reasons that the source did not choose. A client that reconnects takes the end
for a break; for all others the response is cut, or it would look complete."""
GONE = frozenset(("disconnected", "send_timeout"))
"""The reasons for an end after which the client is no longer there."""
OPENING = "ok"
"""The text of the comment that opens an event stream."""
# Milliseconds by reason. A browser's own 3 to 5 s would hammer a broken view.
_COME_BACK = {
    "shutdown": 1000,
    "max_duration": 1000,
    "refused": 2000,
    "denied": 5000,
    "kicked": 5000,
    "error": 5000,
}


def come_back(reason: str, retry: int) -> bytes:
    """Return the ``retry:`` block for a stream's end; ``b""`` for a reason without one.

    The time has a random part, so that clients do not all return together. Unwanted
    clients (kicked, denied) come back, too, for ever, but only rarely.

    Args:
        reason: The reason for the end.
        retry: The minimum, in milliseconds.
    """
    least = _COME_BACK.get(reason)
    if least is None:
        return b""
    return Event(retry=round(max(retry, least) * random.uniform(1, 3))).encode()
