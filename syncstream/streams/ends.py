"""The reasons for an end, and the ``retry:`` that asks clients to come back."""

from __future__ import annotations

import random

from ..protocol.sse import Event

__all__ = ["OPENING", "come_back"]
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


REASONS = frozenset(("closed", "finished", "kicked", "denied", "shutdown"))
"""The reasons for which an application may stop a stream."""
OPENING = "ok"
