"""Every exception of the package.

::

    SyncStreamError
    ├── ProtocolError
    │   └── RemoteProtocolError      the peer sent what its format forbids
    ├── Closed                       a subscription has ended; its `reason` says why
    └── BrokerError                  what stores events could not do it
        ├── Unavailable              nothing was stored: it may be tried again
        │   └── Denied               the engine does not allow this name to us
        ├── Uncertain                it may be stored, or not: again, it may be twice
        └── PayloadTooLarge          an event is larger than the hub takes

    GeneratorExit
    └── ClientDisconnected           raised by the waits inside a stream's generator

``ClientDisconnected`` stands outside the tree on purpose: it is a
``GeneratorExit``, so ``finally`` and ``except GeneratorExit`` see it and
``except Exception`` does not, exactly as if the generator had been closed.
Wrong arguments stay ``TypeError`` and ``ValueError``.
"""

from __future__ import annotations

__all__ = [
    "BrokerError",
    "ClientDisconnected",
    "Closed",
    "Denied",
    "PayloadTooLarge",
    "ProtocolError",
    "RemoteProtocolError",
    "SyncStreamError",
    "Unavailable",
    "Uncertain",
]


class SyncStreamError(Exception):
    """Anything that this package raises on its own account."""


class ProtocolError(SyncStreamError):
    """Bytes and a format do not agree."""


class RemoteProtocolError(ProtocolError):
    """The peer sent what its format forbids, or more of it than allowed."""


class Closed(SyncStreamError):
    """A subscription has ended, and not because there is nothing more to come.

    Attributes:
        reason: "closed" (by the hub, or by `Subscription.close`), "kicked" or
            "denied"; or the text that `Subscription.close` was given.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"the subscription has ended: {reason}")
        self.reason = reason


class BrokerError(SyncStreamError):
    """What stores events could not do what it was asked."""


class Unavailable(BrokerError):
    """It cannot be reached. Nothing was stored: the same may be tried again."""


class Denied(Unavailable):
    """The engine does not allow this name to us; that will not pass by itself.

    Nothing was stored.
    """


class Uncertain(BrokerError):
    """The answer was lost: the events may be stored. Again, they may be twice."""


class PayloadTooLarge(BrokerError, ValueError):
    """An event is larger than ``max_payload``; nothing was stored."""


class ClientDisconnected(GeneratorExit):
    """The client of the stream whose generator is waiting has gone."""
