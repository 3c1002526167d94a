"""Every exception of the package.

::

    SyncStreamError
    ├── ProtocolError
    │   └── RemoteProtocolError      the peer violated its format, or sent too much
    ├── Closed                       a subscription has ended; `reason` says why
    ├── ConnectError                 a client has no event stream to read
    └── BrokerError                  the broker failed
        ├── Unavailable              nothing was stored: retry
        │   └── Denied               the engine denies access to a channel: do not retry
        ├── Uncertain                perhaps stored: a retry may store it twice
        └── PayloadTooLarge          an event is larger than the hub's max_payload

    GeneratorExit
    └── ClientDisconnected           raised by the waits inside a stream's generator

``ClientDisconnected`` is outside the tree on purpose: it is a ``GeneratorExit``, so
``finally`` and ``except GeneratorExit`` catch it and ``except Exception`` does not,
exactly as when a generator is closed. Wrong arguments raise ``TypeError`` and
``ValueError``.
"""

from __future__ import annotations

__all__ = [
    "BrokerError",
    "ClientDisconnected",
    "Closed",
    "ConnectError",
    "Denied",
    "PayloadTooLarge",
    "ProtocolError",
    "RemoteProtocolError",
    "SyncStreamError",
    "Unavailable",
    "Uncertain",
]


class SyncStreamError(Exception):
    """The base of the package's own exceptions."""


class ProtocolError(SyncStreamError):
    """Received bytes violate their format."""


class RemoteProtocolError(ProtocolError):
    """The peer sent bytes that its format forbids, or more than the limit allows."""


class Closed(SyncStreamError):
    """A subscription was ended although more events may come.

    Attributes:
        reason: "closed" (by the hub, or by `Subscription.close`), "kicked" or
            "denied"; or the reason given to `Subscription.close`.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"the subscription has ended: {reason}")
        self.reason = reason


class ConnectError(SyncStreamError):
    """A client gets no event stream, or no more of it.

    Attributes:
        status: The HTTP status of the answer, if that is the reason; else ``None``.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class BrokerError(SyncStreamError):
    """The broker, which stores the events, could not do its job."""


class Unavailable(BrokerError):
    """The broker cannot be reached. Nothing was stored, so the call may be repeated."""


class Denied(Unavailable):
    """The engine (Redis, PostgreSQL) denies access to a channel. Nothing was stored.

    Repeating the call does not help: change the rights of the engine's user.
    """


class Uncertain(BrokerError):
    """The broker's answer was lost: the events may be stored or not.

    Repeating the call may store them twice.
    """


class PayloadTooLarge(BrokerError, ValueError):
    """An event is larger than the hub's ``max_payload``. Nothing was stored."""


class ClientDisconnected(GeneratorExit):
    """The stream's client has gone; raised by a wait in the stream's generator."""
