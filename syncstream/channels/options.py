"""What `Hub.subscribe` may be told about how to read: validated once, shared."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

from ..brokers.names import check_name, is_pattern
from ..protocol.sse import Event
from . import limits

if TYPE_CHECKING:
    from .subscription import Subscription

__all__ = ["Apart", "Authorize", "Options", "check_channels", "read_apart"]

# Says whether a subscription may be read.
Authorize: TypeAlias = "Callable[[Subscription], bool]"


class Apart(Exception):
    """Those who are at one place do not go on together: each asks its application."""


def read_apart() -> Iterable[Any]:
    """Stand for the ``on_gap`` of others."""
    raise Apart


class Options:
    """How a subscription reads; not to be changed.

    Args, Raises: As for `Hub.subscribe`.

    Attributes:
        after, on_gap, conflate, throttle: As given.
        authorize: The function alone.
        recheck: Seconds after which it is called again; ``None``: never.
    """

    # No dataclass: a frozen one takes three times as long to make.
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
                f"on_gap must be 'replay', 'live' or a callable, got {on_gap!r}"
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
        """Refuse what cannot be had of these channels.

        Raises:
            ValueError: A pattern has no history to begin in.
        """
        if self.after != "now" and any(map(is_pattern, channels)):
            raise ValueError(
                f"after must be 'now' where a channel is a pattern, got {self.after!r}"
            )

    @property
    def kind(self) -> str:
        """What those have in common who may get the same bytes."""
        return "apart" if callable(self.on_gap) else self.on_gap

    @property
    def is_shareable(self) -> bool:
        """Others get the same bytes at the same time."""
        return self.conflate is None and self.throttle is None

    @property
    def has_user_code(self) -> bool:
        """To read may call what the application has given."""
        return self.conflate is not None or (
            callable(self.on_gap) and self.on_gap is not read_apart
        )

    def of_a_twin(self) -> Options:
        """Return those of one that reads for several at one place."""
        return Options(on_gap=read_apart if callable(self.on_gap) else self.on_gap)


def check_channels(channels: tuple[str, ...]) -> None:
    """Check what a subscription is to read.

    Raises:
        TypeError, ValueError: There are none, or too many, or one is no name.
    """
    if not channels:
        raise ValueError("channels must be given, at least one")
    for name in channels:
        if isinstance(name, str) and is_pattern(name):
            if name not in ("*", "#"):
                check_name(name[:-2])
        else:
            check_name(name)
    most = limits.MAX_CHANNELS
    if len(channels) > most and len(set(channels)) > most:
        raise ValueError(
            f"channels must be {most} at most, got {len(channels)}: use a pattern"
        )


def _asked_when(
    authorize: Authorize | tuple[Authorize, float],
) -> tuple[Authorize, float | None]:
    """Return whom to ask, and every how many seconds; ``None`` for only once."""
    if isinstance(authorize, tuple) and len(authorize) == 2:
        asked, recheck = authorize
        _check_seconds("authorize", recheck)
        if callable(asked):
            return asked, recheck
    elif callable(authorize):
        return authorize, None
    raise TypeError(
        f"authorize must be a function, or a function and seconds, got {authorize!r}"
    )


def _check_seconds(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must have seconds as a number, got {value!r}")
    if not 0 < value <= limits.LONGEST:
        raise ValueError(
            f"{name} must have seconds above 0, and {limits.LONGEST:.0f} at most, got"
            f" {value!r}"
        )
