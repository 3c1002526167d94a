"""The reasons for an end, and the last bytes that a client gets."""

from __future__ import annotations

import random

from ..protocol.sse import Event

__all__ = ["OPENING", "come_back"]
_COME_BACK = {  # milliseconds; browsers' own 3 to 5 s would hammer a broken view
    "shutdown": 1000,
    "max_duration": 1000,
    "refused": 2000,
    "denied": 5000,
    "kicked": 5000,
    "error": 5000,
}


def come_back(reason: str, retry: int) -> bytes:
    """Return what asks a client to come back, after an end in good order or not.

    Jittered, or all the clients that were here return together. Those that are not
    wanted come back, too, for ever: let it be seldom, at least.

    Args:
        reason: Why the stream has ended.
        retry: Milliseconds, at least.
    """
    least = _COME_BACK.get(reason)
    if least is None:
        return b""
    return Event(retry=round(max(retry, least) * random.uniform(1, 3))).encode()


REASONS = frozenset(("closed", "finished", "kicked", "denied", "shutdown"))
"""Why an application may stop a stream."""
OPENING = "ok"
