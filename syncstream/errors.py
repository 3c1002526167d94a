"""Every exception of the package.

::

    SyncStreamError
    └── ProtocolError
        └── RemoteProtocolError      the peer sent what its format forbids

    GeneratorExit
    └── ClientDisconnected           raised by the waits inside a stream's generator

``ClientDisconnected`` stands outside the tree on purpose: it is a
``GeneratorExit``, so ``finally`` and ``except GeneratorExit`` see it and
``except Exception`` does not, exactly as if the generator had been closed.
Wrong arguments stay ``TypeError`` and ``ValueError``.
"""

from __future__ import annotations

__all__ = [
    "ClientDisconnected",
    "ProtocolError",
    "RemoteProtocolError",
    "SyncStreamError",
]


class SyncStreamError(Exception):
    """Anything that this package raises on its own account."""


class ProtocolError(SyncStreamError):
    """Bytes and a format do not agree."""


class RemoteProtocolError(ProtocolError):
    """The peer sent what its format forbids, or more of it than allowed."""


class ClientDisconnected(GeneratorExit):
    """The client of the stream whose generator is waiting has gone."""
