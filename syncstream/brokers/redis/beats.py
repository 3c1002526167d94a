"""Messages to oneself, which show that what is told comes, and that nothing was lost.

Every `BEAT` seconds a listener sends one, by another connection than the one that it is
told by: what does not come back shows a connection that is dead, or leads elsewhere.
With each it asks for some channels' heads. All that was told of before these were read
has come when the message comes back: a head that is another one shows a loss.
"""

from __future__ import annotations

import secrets
from typing import Any, NamedTuple

from redis.exceptions import ResponseError

from ...errors import BrokerError
from ...runtime.clock import time
from ..tail import jitter
from .scripts import HEADS
from .server import OF_NAME, RIGHTS, Server, socket_of
from .watches import Check, Watch, Watches

__all__ = ["Beats", "Compared"]

BEAT = 2.0  # seconds between two messages to oneself
DEAF = 5.0  # seconds without them, and the connection is given up
ROUND = 30.0  # seconds in which the heads of all channels are compared
KEYS = 100  # of one request for heads


class Compared(NamedTuple):
    """What the heads of a beat have shown.

    Attributes:
        lost: The names of which something may be lost.
        denied: The names that the server refuses, and why.
        refusal: Why it tells no heads, whatever the name; empty: it does.
        was_asked: It was asked for some.
        since: When it began, as `Health.moment`.
    """

    lost: list[str]
    denied: list[tuple[Watch, str]]
    refusal: str
    was_asked: bool
    since: int


class Beats:
    """Those of one listener, by its thread.

    Attributes:
        own: The Pub/Sub channel of the messages.
        fresh: When the one began that has come back last, as `Health.moment`: what
            comes after it was published since then.
    """

    def __init__(self, server: Server, watches: Watches, ttl: bytes) -> None:
        self._server = server
        self._watches = watches
        self._ttl = ttl
        self.own = server.own()
        self.fresh = 0
        self._connection: Any = None  # by which the one that is out was sent
        self._sent_at: float | None = None  # when that was
        self._began = 0
        self._next = 0.0
        self._has_come = False  # one of this connection
        self._token = b""
        self._checked: list[list[Check]] = []  # a request for heads each
        self._answers: list[Any] = []
        self._replies: list[Any] | None = None  # `None`: they have not come
        self._is_echoed = False

    def begin(self) -> None:
        """Begin, on a connection that was made just now."""
        self._sent_at = None
        self._next = time.monotonic() + BEAT
        self._has_come = False

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.disconnect()

    @property
    def sockets(self) -> list[Any]:
        """Where replies are waited for."""
        return [] if self._connection is None else [socket_of(self._connection)]

    def left(self) -> float:
        """Return the seconds until the next one, or until that which is out is late."""
        ends = self._next if self._sent_at is None else self._deaf_at()
        return max(0.0, ends - time.monotonic())

    @property
    def are_late(self) -> bool:
        return self._sent_at is not None and time.monotonic() > self._deaf_at()

    def _deaf_at(self) -> float:
        assert self._sent_at is not None
        return self._sent_at + DEAF - BEAT

    def go_on(self) -> None:
        """Send one, if it is time; at once if something may be lost."""
        now = time.monotonic()
        if self._sent_at is None and (
            now >= self._next
            or (
                self._watches.is_answered
                and (self._watches.are_doubtful or not self._has_come)
            )
        ):
            self._send(now)

    def _send(self, now: float) -> None:
        """Ask for heads, then send a message to ourselves."""
        checks = self._watches.due(BEAT / ROUND)
        named = [check for check in checks if not check.watch.is_pattern]
        apart = [[check] for check in named if check.watch.is_apart]
        named = [check for check in named if not check.watch.is_apart]
        self._checked = [
            [check for check in checks if check.watch.is_pattern],
            *(named[start : start + KEYS] for start in range(0, len(named), KEYS)),
            *apart,
        ]
        commands: list[tuple[bytes, ...]] = []
        for some in self._checked[1:]:
            keys = [self._server.key(check.watch.name) for check in some]
            keys.append(self._server.marks)
            number = b"%d" % len(keys)
            commands.append((b"EVAL", HEADS.text, number, *keys, self._ttl))
        self._began = self._server.moment()
        self._token = b"%x" % secrets.randbits(64)
        commands.append((b"PUBLISH", self.own, self._token))
        self._connection = self._server.take(now + DEAF)
        self._replies = None
        self._answers = []
        self._is_echoed = False
        packed = self._connection.pack_commands(commands)
        self._connection.send_packed_command(packed, check_health=False)
        self._sent_at = now
        # All of one moment would ask at one moment, ever after.
        self._next = now + BEAT * jitter(0.9, 1.1)

    def echo(self, data: bytes) -> None:
        """Take a message that has come in `own`; anybody may send others there."""
        if data == self._token:
            self._is_echoed = True
            self.fresh = self._began

    def take(self) -> Compared | None:
        """Take the replies, as far as they have come; compare the heads once all have.

        Raises:
            BrokerError: The server does not let us hear ourselves.
        """
        while (
            self._connection is not None
            and self._replies is None
            and self._connection.can_read(timeout=0)
        ):
            try:
                reply = self._connection.read_response(disconnect_on_error=False)
            except ResponseError as error:
                reply = error
            self._answers.append(reply)
            # The message's own is the last; the patterns have none.
            if len(self._answers) < len(self._checked):
                continue
            if isinstance(reply, Exception):
                raise BrokerError(
                    f"{self._server.name} does not let us hear ourselves:"
                    f" {reply}; {RIGHTS}"
                )
            self._replies = self._answers[:-1]
        if not self._is_echoed or self._replies is None:
            return None
        return self._compare(self._replies)

    def _compare(self, replies: list[Any]) -> Compared:
        """Compare the heads: all that was told of before has come."""
        self._server.give_back(self._connection)
        self._connection = None
        patterns, *named = self._checked
        # Nobody can say which channels it would have brought.
        lost = [check.watch.name for check in patterns if check.is_doubtful]
        denied: list[tuple[Watch, str]] = []
        refusal = ""
        for checks, reply in zip(named, replies, strict=True):
            if isinstance(reply, list) and len(reply) == len(checks):
                for check, head in zip(checks, reply, strict=True):
                    check.watch.is_apart = False
                    lost += _lost(check, head)
            elif not OF_NAME.search(str(reply)):
                refusal = refusal or str(reply)
                for check in checks:
                    lost += _lost(check, None)
            elif len(checks) > 1:
                self._watches.look_again(checks)
            else:
                denied.append((checks[0].watch, str(reply)))
        self._checked = []
        self._replies = None
        self._sent_at = None
        self._has_come = True
        return Compared(lost, denied, refusal, bool(named), self._began)


def _lost(check: Check, reply: Any) -> list[str]:
    """Compare a head; return the name if something may be lost."""
    watch, last, is_doubtful = check
    head = reply.decode(errors="replace") if isinstance(reply, bytes) else None
    # What has come meanwhile names what it follows.
    if watch.last != last:
        return []
    watch.last = head
    if is_doubtful if last is None or head is None else head != last:
        return [watch.name]
    return []
