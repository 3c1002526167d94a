"""The options of `Hub.subscribe` that say how to read: validated once, then shared."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

from ..brokers.names import check_name, is_pattern
from ..errors import Unavailable
from ..protocol.sse import Event
from . import limits

if TYPE_CHECKING:
    from .subscription import Subscription

__all__ = [
    "DEFAULTS",
    "Authorize",
    "Failed",
    "NotShared",
    "ONE_READER",
    "Options",
    "check_channels",
    "refuse_to_share",
]

# Tells whether a subscription may be read.
Authorize: TypeAlias = "Callable[[Subscription], bool]"


ONE_READER = "a subscription has one reader: call hub.subscribe() for each response"


class Failed(Exception):
    """Carries an `Unavailable` of the application's code past those of the broker.

    The broker's are met by trying again; the application's are raised.

    Attributes:
        error: What the application has raised.
    """

    def __init__(self, error: Unavailable) -> None:
        super().__init__(str(error))
        self.error = error


class NotShared(Exception):
    """A group has met a gap: each of its members must call its own ``on_gap``."""


def refuse_to_share() -> Iterable[Any]:
    """Serve as ``on_gap`` of a group's subscription, in place of the members' own.

    Raises:
        NotShared: Always.
    """
    raise NotShared


class Options:
    """How a subscription reads; do not change it.

    Args, Raises: As for `Hub.subscribe`.

    Attributes:
        after, on_gap, conflate, throttle: As given.
        authorize: The function, without its interval.
        recheck: The seconds after which ``authorize`` is called again, ``None`` for
            never.
    """

    # Not a dataclass: creating a frozen one takes 2.2 times as long on Python 3.13, 2.9
    # times on 3.10, and each subscription creates one.
    __slots__ = ("after", "authorize", "conflate", "on_gap", "recheck", "throttle")

    def __init__(
        self,
        *,
        after: str | int = "now",
        on_gap: str | Callable[[], Iterable[Any]] = "replay",
        conflate: Callable[[Event], Hashable] | None = None,
        throttle: float | None = None,
        authorize: Authorize | tuple[Authorize, float] | None = None,
    ) -> None:
        if isinstance(after, bool) or not isinstance(after, (str, int)):
            raise TypeError(f"after must be str or int, got {after!r}")
        if isinstance(after, int) and after < 1:
            raise ValueError(f"after must be 1 or more events, got {after!r}")
        if on_gap not in ("replay", "live") and not callable(on_gap):
            raise ValueError(
                f"on_gap must be 'replay', 'live' or a function, got {on_gap!r}"
            )
        if conflate is not None and not callable(conflate):
            raise TypeError(
                "conflate must be a function of an event that returns its key, got"
                f" {conflate!r}"
            )
        if throttle is not None:
            _check_seconds("throttle", throttle)
        self.after = after
        self.on_gap = on_gap
        self.conflate = conflate
        self.throttle = throttle
        self.authorize: Authorize | None = None
        self.recheck: float | None = None
        if authorize is not None:
            self.authorize, self.recheck = _asked_when(authorize)

    def check_fit(self, channels: Iterable[str]) -> None:
        """Check that the options fit the channels.

        Raises:
            ValueError: ``after`` is given with a pattern, which has no history.
        """
        if self.after != "now" and any(map(is_pattern, channels)):
            raise ValueError(
                f"after must be 'now' if a channel is a pattern, got {self.after!r}"
            )

    @property
    def kind(self) -> str:
        """The part of a group's key: readers of one kind may get the same bytes."""
        return "function" if callable(self.on_gap) else self.on_gap

    @property
    def is_shareable(self) -> bool:
        """Whether other subscriptions get the same bytes at the same time."""
        return self.conflate is None and self.throttle is None

    @property
    def has_user_code(self) -> bool:
        """Whether reading may call a function of the application."""
        return self.conflate is not None or (
            callable(self.on_gap) and self.on_gap is not refuse_to_share
        )

    def for_group(self) -> Options:
        """Return the options of a subscription that reads for a group."""
        return Options(on_gap=refuse_to_share if callable(self.on_gap) else self.on_gap)


DEFAULTS = Options()
"""Shared by all subscriptions that have no options, to save memory."""


def check_channels(channels: tuple[str, ...]) -> None:
    """Check the channels of a subscription.

    Raises:
        TypeError: A channel is not a ``str``.
        ValueError: There are none, or too many, or one is neither a name nor a pattern.
    """
    if not channels:
        raise ValueError("channels must be at least one, got none")
    for name in channels:
        if isinstance(name, str) and is_pattern(name):
            if name not in ("*", "#"):
                check_name(name[:-2])
        else:
            check_name(name)
    most = limits.MAX_CHANNELS
    if len(channels) > most and len(set(channels)) > most:
        raise ValueError(
            f"channels must be {most} at most, got {len(channels)}: use a pattern, or"
            " several streams"
        )


def _asked_when(
    authorize: Authorize | tuple[Authorize, float],
) -> tuple[Authorize, float | None]:
    """Return the function, and its interval in seconds; ``None``: it is called once."""
    if isinstance(authorize, tuple) and len(authorize) == 2:
        asked, recheck = authorize
        _check_seconds("authorize", recheck)
        if callable(asked):
            return asked, recheck
    elif callable(authorize):
        return authorize, None
    raise TypeError(
        "authorize must be a function, or a pair of a function and seconds, got"
        f" {authorize!r}"
    )


def _check_seconds(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must have a number of seconds, got {value!r}")
    if not 0 < value <= limits.LONGEST:
        raise ValueError(
            f"{name} must have seconds above 0, and {limits.LONGEST:.0f} at most, got"
            f" {value!r}"
        )
