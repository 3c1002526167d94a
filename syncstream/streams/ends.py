"""The reasons for an end, and what the client is told: to come back, or not to.

All sets of reasons are here. The ids by which a client is told not to come back are
`END_ID` and `REFUSED_ID` of ``protocol.sse``; `Output` sends them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..protocol.sse import Event, ends_blank, tail_after

__all__ = ["CUT", "GONE", "OPENING", "REASONS", "WHOLE", "End", "come_back"]

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


@dataclass(frozen=True, slots=True)
class End:
    """A stream's normal end, by the response's ``end=``.

    Attributes:
        stops: Whether browsers are told not to come back.
        event: The bytes of the application's last event, ``b""`` for none.
    """

    stops: bool
    event: bytes = b""

    @classmethod
    def of(cls, given: Any, encode: Callable[[Any], bytes | None]) -> End:
        """Return the end that an application has asked for.

        Args:
            given: "stop", "reconnect", or the last item.
            encode: The response's encoder.

        Raises:
            ValueError: It is another word, or is not an event.
            TypeError: It cannot be encoded.
        """
        if type(given) is str:
            if given in ("stop", "reconnect"):
                return _STOP if given == "stop" else _RECONNECT
            if given.isidentifier():  # more likely a slip than an event
                raise ValueError(
                    f"end must be 'stop', 'reconnect' or an event, got {given!r}: for"
                    f" an event of this text, use Event({given!r})"
                )
        if isinstance(given, bool):
            raise TypeError(
                f"end must be 'stop', 'reconnect' or an event, got {given!r}"
            )
        if isinstance(given, Event) and given.data is None:
            raise ValueError(
                "end must be an event with data: no client is told of one without,"
                f" got {given!r}"
            )
        event = encode(given)
        if not event:
            raise ValueError(
                f"end must be 'stop', 'reconnect' or an event, got {given!r}, for which"
                " nothing is sent"
            )
        if not ends_blank(tail_after(b"", event)):
            raise ValueError(
                "end must be a whole event with its blank line, which clients wait for,"
                f" got {given!r}"
            )
        return cls(stops=True, event=event)


_STOP, _RECONNECT = End(stops=True), End(stops=False)


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
