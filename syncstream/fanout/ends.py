"""The end of the loop's clients: once, in steps that run even if others fail."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any

from ..errors import Closed
from ..runtime.journal import journal
from ..runtime.sockets import has_timed_out
from .client import Client
from .connection import close, say_goodbye
from .lanes import say_failed
from .meeting import Meeting
from .wheel import Wheel

__all__ = ["Ends"]

_UNKNOWN = memoryview(b"?")  # of a chunk of which an unknown part was sent


class Ends:
    """Ends clients; in the loop's thread, or under a lock once that thread has ended.

    Args:
        clients: The loop's clients, by descriptor.
        lagging: Those of them that lag.
        epoll: The epoll object with their descriptors.
        wheel: Their timers.
        meeting: Their groups.
    """

    def __init__(
        self,
        clients: dict[int, Client],
        lagging: dict[int, Client],
        epoll: Any,
        wheel: Wheel,
        meeting: Meeting,
    ) -> None:
        self._clients, self._lagging = clients, lagging
        self._epoll, self._wheel, self._meeting = epoll, wheel, meeting
        self._steps = (
            self._forget,
            self._leave_group,
            say_goodbye,
            self._close,
            self._depart,
        )

    def hung_up(self, client: Client, *, is_error: bool = True) -> None:
        """End a client that has gone, or that the kernel has given up.

        Args:
            is_error: Whether the socket may have an error that tells why.
        """
        timed_out = is_error and has_timed_out(client.fd)
        self.end(client, "send_timeout" if timed_out else "disconnected")

    def fail(self, client: Client, error: BaseException) -> None:
        """End a client whose subscription has ended, or whose source has failed."""
        if client.reason is not None:
            return
        if isinstance(error, Closed):
            known = error.reason in client.terms.reasons
            self.end(client, error.reason if known else "closed")
            return
        self.end(client, "error")
        text = "the source of %s failed"
        client.terms.lanes.say(logging.ERROR, text, client.label, error=error)

    def end(self, client: Client, reason: str) -> None:
        """End a client, once; a lane calls the application's callbacks."""
        if client.reason is not None:
            return
        if client.group is None:
            # It is on its way to the loop, where `_add` ends it.
            client.early = client.early or reason
            return
        self._end(client, reason)

    def cut(self, client: Client) -> None:
        """End a client that has received an unknown part of its bytes."""
        if client.reason is not None:
            return
        if client.group is None and client not in client.terms.served.parked:
            client.early = "error"  # its descriptor is not ours yet
            return
        client.rest = _UNKNOWN
        self._end(client, "error")

    def _end(self, client: Client, reason: str) -> None:
        client.reason = reason
        fd, group = client.fd, client.group
        # Plain statements, which cannot fail: from here on nothing is sent to this
        # descriptor, whose number another client may get soon.
        if group is not None and fd in group.clients:
            del group.clients[fd]
        if fd in self._clients and self._clients[fd] is client:
            del self._clients[fd]
        if fd in self._lagging and self._lagging[fd] is client:
            del self._lagging[fd]
        for step in self._steps:
            try:
                step(client)
            except BaseException as error:
                say_failed("the end of %s failed", error, client.label)

    def _forget(self, client: Client) -> None:
        with suppress(OSError):
            self._epoll.unregister(client.fd)
        self._wheel.remove(client)

    def _leave_group(self, client: Client) -> None:
        group = client.group
        if group is None:
            return
        try:
            group.left(client)
        except BaseException:
            if not group.clients:  # try again: nothing else would forget it
                self._meeting.forget(group)
            raise

    def _close(self, client: Client) -> None:
        client.rest = None
        close(client.fd)  # one that writes no more may still read

    def _depart(self, client: Client) -> None:
        # If it fails, try again, and elsewhere: its place must not stay taken.
        try:
            client.leave()
        except BaseException:
            journal().do(client.leave)
            raise
