"""`Hub`: publish to channels, subscribe to them, resume.

A `Hub` keeps a window, a `Log`, of each channel that has subscribers; a broker stores
events and announces new ones. A `Subscription` is a position in one or more logs: a
slow reader has a lower position, and resuming means to begin after an id. Events that
have left the window are read from the broker. Events that the broker has dropped too
are reported as a `Gap`.

The one promise: after the id that a client presents it gets every later event, once
and in order, or a reset first.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import Any

from ..brokers import open_broker, shown
from ..brokers.contract import Broker, check_bounds
from ..brokers.names import NAME, check_name
from ..errors import BrokerError, Unavailable, Uncertain
from ..protocol.json import Dumps
from ..protocol.sse import Event
from ..runtime.living import Living
from ..runtime.process import process
from ..runtime.waiting import say
from . import limits
from .control import Kick, attempt
from .ids import composite
from .options import DEFAULTS, Authorize, Options
from .payloads import Payloads
from .sink import HubSink
from .subscribers import Subscribers
from .subscription import Subscription
from .tags import check_tags, tag_prefix
from .windows import Windows

__all__ = ["Hub"]

log = logging.getLogger("syncstream.hub")


class _NotGiven:
    """The default of arguments that may be left out; ``help`` shows it."""

    def __repr__(self) -> str:
        return "<not given>"


_NOT_GIVEN: Any = _NotGiven()


class Hub:
    """Channels, to publish and to subscribe to.

    One hub is enough for an application; its first use starts it. All methods may be
    called from any thread or greenlet. A hub that is dropped without `close` is freed,
    and so is the broker that it made of its URL.

    Args:
        url: The place where events are kept: ``memory:``, this process; ``local:``,
            ``local:NAME`` or ``local:/PATH``, shared by the processes of this machine;
            ``redis://HOST`` or ``postgresql://USER@HOST/DATABASE``, shared by all
            processes that reach the server. See `brokers.open_broker` and
            docs/brokers.md.
        broker: A broker, in place of ``url``, ``capacity`` and ``max_age``, which
            belong to it; see `syncstream.brokers`.
        capacity: The maximum of kept events of each channel, 1000 by default; fewer if
            they are large (``memory:`` has 256 MiB for all channels and an eighth of
            it for each, see `brokers.memory.MemoryBroker`).
        max_age: Seconds for which events are kept, an hour by default; ``None`` for no
            limit.
        max_payload: The maximum of bytes of an encoded event, 1 MiB by default.
        dumps: The JSON encoder for data that is not text, as in `SSEResponse`.

    Attributes:
        broker: The broker, which stores the events.
        sink: The side that the broker calls; for tests of brokers.
        windows, subscribers, payloads: Its parts, which are not public API.

    Raises:
        TypeError, ValueError: An argument has a wrong type or value.
        ImportError, OSError: As from `brokers.open_broker`.
    """

    def __init__(
        self,
        url: str = _NOT_GIVEN,
        *,
        broker: Broker | None = None,
        capacity: int = _NOT_GIVEN,
        max_age: float | None = _NOT_GIVEN,
        max_payload: int = 1 << 20,
        dumps: Dumps | None = None,
    ) -> None:
        if broker is not None:
            for name, given in (("url", url), ("capacity", capacity)):
                if given is not _NOT_GIVEN:
                    raise ValueError(
                        f"{name} must not be given with broker: pass it to the broker"
                    )
            if max_age is not _NOT_GIVEN:
                raise ValueError(
                    "max_age must not be given with broker: pass it to the broker"
                )
        url = "memory:" if url is _NOT_GIVEN else url
        capacity = 1000 if capacity is _NOT_GIVEN else capacity
        max_age = 3600.0 if max_age is _NOT_GIVEN else max_age
        check_bounds(capacity, max_age)
        if not isinstance(max_payload, int) or isinstance(max_payload, bool):
            raise TypeError(f"max_payload must be int, got {max_payload!r}")
        if not 1 <= max_payload <= limits.MOST_PAYLOAD:
            raise ValueError(
                f"max_payload must be 1 to {limits.MOST_PAYLOAD}, got {max_payload!r}"
            )
        if not isinstance(url, str):
            raise TypeError(f"url must be str, got {type(url).__name__}")
        if broker is not None and not callable(getattr(broker, "attach", None)):
            # Do not show the value: it may be a URL in the wrong argument.
            raise TypeError(f"broker must be a Broker, got {type(broker).__name__}")
        self._url = url if broker is None else None
        if broker is None:
            broker = open_broker(url, capacity=capacity, max_age=max_age)
        self.broker = broker
        self.payloads = Payloads(dumps, max_payload)
        self.windows = Windows(broker, math.inf if max_age is None else max_age)
        self.subscribers = Subscribers(self.windows, self.payloads)
        self.sink = HubSink(self.subscribers)
        _hubs.add(self)
        self._warn_of_many()
        broker.attach(self.sink)

    def _warn_of_many(self) -> None:
        """Warn once of many hubs, perhaps one for each call."""
        if self._url is None:
            return
        count = sum(hub._url == self._url for hub in _hubs.all())
        if count > limits.MANY:
            process().warn_once(
                log,
                f"more than {limits.MANY} hubs of one {shown(self._url)} are in use,"
                " each with connections and threads: make one for the application",
            )

    # Publishing.

    def publish(
        self,
        channel: str,
        data: Any,
        *,
        event: str | None = None,
        retry: int | None = None,
        only: Iterable[str] | None = None,
        exclude: Iterable[str] = (),
        connection: Any = None,
    ) -> str | None:
        """Publish an event to the present and later subscribers of a channel.

        It blocks until the event is stored, not until it is delivered.

        Args:
            channel: The channel's name: levels separated by ``:``, without white space.
            data: The event's data: text, or any other value, which is sent as JSON; or
                an `Event` without an id.
            event: The event's name, as in `Event`; not "reset".
            retry: As in `Event`.
            only: Tags: only subscriptions with one of them get the event, and with an
                empty list none. ``None``, the default: all get it.
            exclude: Tags: subscriptions with one of them do not get the event.
            connection: A database connection: the event is stored if its transaction
                commits. For ``postgresql:``; ``memory:`` accepts it for tests, and
                follows Django's transactions. Other brokers raise ``ValueError``.

        Returns:
            The event's id; ``None`` with a ``connection``, and from a finalizer or a
            signal handler that interrupts another call of a ``memory:`` hub.

        Raises:
            Unavailable: Nothing was stored.
            Uncertain: The event may have been stored.
            PayloadTooLarge: The event is larger than ``max_payload``.
            TypeError, ValueError: An argument has a wrong type or value, or the hub is
                closed.
        """
        if isinstance(data, Event):
            if event is not None or retry is not None:
                raise ValueError("event and retry must be None with an Event as data")
            item = data
        else:
            item = self.payloads.event(data, event, retry)
        return self.publish_many(
            channel, [item], only=only, exclude=exclude, connection=connection
        )[0]

    def publish_many(
        self,
        channel: str,
        items: Iterable[Any],
        *,
        only: Iterable[str] | None = None,
        exclude: Iterable[str] = (),
        connection: Any = None,
    ) -> list[str | None]:
        """Publish several events to a channel in one call, in this order.

        Args:
            channel, only, exclude, connection: As for `publish`.
            items: The data of each event, or an `Event`, as for `publish`.

        Returns:
            The events' ids, in the same order.

        Raises:
            Unavailable, Uncertain, PayloadTooLarge, TypeError, ValueError: As from
                `publish`, about all of the events.
        """
        self._check_open("publish")
        check_name(channel)
        prefix = tag_prefix(only, exclude)
        encoded = self.payloads.encoded
        batch = [(channel, prefix + encoded(item)) for item in items]
        for _, payload in batch:
            self.payloads.check_size(payload)
        self.subscribers.clear()
        ids = self.broker.publish(batch, connection=connection) if batch else []
        count, windows = len(ids), self.windows
        with windows.lock:
            windows.published += count
        return ids

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self.windows.is_closed

    def _check_open(self, what: str) -> None:
        if self.windows.is_closed:
            raise ValueError(f"{what}() must not be called after close()")

    # Subscribing.

    def subscribe(
        self,
        *channels: str,
        after: str | int = "now",
        on_gap: str | Callable[[], Iterable[Any]] = "replay",
        conflate: Callable[[Event], Hashable] | None = None,
        throttle: float | None = None,
        tags: Iterable[str] = (),
        who: Any = None,
        announce: bool = False,
        authorize: Authorize | tuple[Authorize, float] | None = None,
    ) -> Subscription:
        """Return a subscription: the events of these channels from a position on.

        Args:
            channels: Names, or patterns: ``chat:*`` for one more level, ``logs:#`` for
                all levels. An untrusted name may be a pattern: make it with `channel`.
                A client that reconnects to a pattern gets a reset, then new events: no
                broker knows which channels there were meanwhile.
            after: The position at which a first connection begins: "now", "start" (the
                oldest kept event), an id, or a number: that many of the newest events
                of each channel. With a pattern only "now". A client that reconnects
                with a Last-Event-ID begins there instead.
            on_gap: The events after a reset, which is sent if the id is not kept any
                more or the reader has fallen behind: "replay", all kept events;
                "live", new events; or a function that returns events which make the
                client complete again (a snapshot, without ids), followed by the events
                since it was called. A client that is cut off during a snapshot gets
                another one. The function is called for each channel that has a gap.
            conflate: A function that returns an event's key, for example the symbol of
                a price. Of the events that wait when the subscription is read, only the
                newest of each key is delivered. ``None`` delivers all. If it raises,
                `read` raises that, and the next `read` begins at the same event.
            throttle: The minimum of seconds between two deliveries; ``None`` for no
                limit.
            tags: Tags by which `publish` and `kick` select the subscription.
            who: The name that `presence` shows and `kick` takes, such as a user's.
            announce: Announce the subscription to its channels, except patterns, with
                "join" and "leave" events that contain ``who``. These are not kept, and
                have the id of the event before them.
            authorize: A function of the subscription, called when it is first read; or
                ``(function, 60)``, to call it again every 60 seconds. If it returns
                false, or has not answered within 5 seconds, the stream ends ("denied"),
                and a late answer changes nothing. If it raises, `read` raises that, and
                nothing is read. It must be a plain function: a result that has to be
                awaited, iterated or called is an error.

        Raises:
            TypeError, ValueError: An argument has a wrong type or value, or the hub is
                closed.
        """
        self._check_open("subscribe")
        if (
            after == "now"
            and on_gap == "replay"
            and conflate is None
            and throttle is None
            and authorize is None
        ):
            options = DEFAULTS
        else:
            options = Options(
                after=after,
                on_gap=on_gap,
                conflate=conflate,
                throttle=throttle,
                authorize=authorize,
            )
        return Subscription(
            self.subscribers, channels, options, tags=tags, who=who, announce=announce
        )

    @staticmethod
    def channel(*levels: str | int) -> str:
        """Return a channel's name, built from levels that may be untrusted.

        ``hub.channel("user", name)`` is the channel of one user, whatever the name.
        ``f"user:{name}"`` would be a pattern for ``*``, and another channel for
        ``ann:mail``.

        Args:
            levels: The text of each level.

        Raises:
            ValueError: A level is empty, or has a colon, ``*``, ``#`` or white space;
                or the name is too long.
            TypeError: A level is neither ``str`` nor ``int``.
        """
        for level in levels:
            if isinstance(level, bool) or not isinstance(level, (str, int)):
                raise TypeError(f"a channel's level must be str or int, got {level!r}")
            if not NAME.fullmatch(str(level)) or ":" in str(level):
                raise ValueError(
                    "a channel's level must be text without white space, :, * and #,"
                    f" got {level!r}"
                )
        name = ":".join(map(str, levels))
        check_name(name)
        return name

    def head(self, *channels: str) -> str:
        """Return the id of a channel's newest event; one id for several channels.

        It is for a page that is rendered before its stream opens: with ``after=`` that
        id, or ``?lastEventId=``, no event in between is missed.

        Args:
            channels: The same names as for `subscribe`, without patterns: the id of two
                channels is not an id of the first alone.

        Raises:
            Unavailable: The broker does not answer.
            Denied: The engine denies access to a channel.
            TypeError, ValueError: A name is wrong, or the hub is closed.
        """
        self._check_open("head")
        names = tuple(dict.fromkeys(channels))
        if not names:
            raise ValueError("channels must be at least one, got none")
        for name in names:
            check_name(name)
        heads = [self.broker.read(name, None).head for name in names]
        return heads[0] if len(names) == 1 else composite(names, heads)

    # Presence and kicks.

    def presence(self, channel: str) -> list[Any]:
        """Return the ``who`` of each of this process's subscriptions to a channel."""
        self.subscribers.clear()
        present = [s for s in self.subscribers.all() if not s.is_closed]
        return [s.who for s in present if s.hears(channel)]

    def kick(
        self,
        predicate: Callable[[Subscription], bool] | None = None,
        *,
        who: Any = _NOT_GIVEN,
        tags: Iterable[str] | None = None,
    ) -> int:
        """End subscriptions, by name in all processes, or by a function in this one.

        ``kick(who="ann")`` ends the subscriptions whose ``who`` is the same JSON, and
        ``kick(tags=["user:7"])`` those with one of the tags, in every process of the
        hub; with both arguments, those that match both. A subscription that is just
        being opened may be missed: give it an ``authorize``.

        Args:
            predicate: A function of a subscription, in place of a name: those of this
                process for which it returns true are ended. If it raises, the others
                are asked all the same, and then ``kick`` raises that.
            who: As given to `subscribe`; not ``None``.
            tags: A list of tags; an empty list ends none.

        Returns:
            The number of subscriptions ended in this process.

        Raises:
            Unavailable, Uncertain: Those of this process were ended, but the other
                processes were not reached, or perhaps not. Call it again.
            Denied: Those of this process were ended, but the engine denies it to tell
                the other processes, or to receive kicks; then the others may not
                receive them either.
            PayloadTooLarge, TypeError, ValueError: An argument has a wrong type or
                value, or the hub is closed; none was ended.
        """
        self._check_open("kick")
        if predicate is not None:
            if who is not _NOT_GIVEN or tags is not None:
                raise ValueError("predicate must not be given with who or tags")
            if not callable(predicate):
                raise TypeError(f"predicate must be callable, got {predicate!r}")
            return self.subscribers.end_where(predicate)
        if who is None or (who is _NOT_GIVEN and tags is None):
            raise ValueError("who, tags or predicate must be given")
        kick = Kick(
            None if who is _NOT_GIVEN else self.payloads.name_of(who),
            None if tags is None else check_tags("tags", tags),
        )
        if kick.who == "null":  # it would match all subscriptions without a name
            raise ValueError(f"who must not be null in JSON, got {who!r}")
        if kick.tags == []:
            return 0
        self.payloads.check_size(kick.encoded(""))
        try:
            count = self.subscribers.end(kick)
        except BaseException:
            told = self._tell(kick)  # the others, even if this process failed
            if told is not None:
                text = "a kick may not have reached the other processes: %s"
                say(log, logging.ERROR, text, told)
            raise
        told = self._tell(kick)
        if told is not None:
            kind = type(told) if isinstance(told, Unavailable) else Uncertain
            raise kind(
                f"streams ended in this process: {count}; those of other processes may"
                f" go on, so call kick() again: {told}"
            ) from told
        return count

    def _tell(self, kick: Kick) -> BrokerError | None:
        """Tell the other processes of a kick; return what prevented that."""
        try:
            self.subscribers.control.tell(kick)
        except BrokerError as error:
            return error
        return None

    def stats(self) -> dict[str, Any]:
        """Return the hub's numbers in this process.

        Returns:
            ``{"subscribers": 12, "channels": 3, "entries": 120, "bytes": 40320,
            "published": 1000, "delivered": 12000, "up": True}``. Channels, entries and
            bytes are those of the windows in memory; published (with joins and leaves)
            and delivered are events since the hub was made, or its process forked; up
            is ``False`` while the broker is down.
        """
        self.subscribers.clear()
        windows = self.windows
        with windows.lock:
            logs = [channel.log for channel in windows.channels.values()]
            return {
                "subscribers": len(windows.open),
                "channels": len(logs),
                "entries": sum(len(log) for log in logs),
                "bytes": windows.budget.size,
                "published": windows.published,
                "delivered": windows.delivered,
                "up": windows.is_up,
            }

    def close(self) -> None:
        """End all subscriptions, and close the broker; a second call does nothing.

        The ends are not announced by "leave" events, which would have to wait for a
        broker that may be down. If an end raises, the others and the broker are closed
        all the same, and then ``close`` raises that.
        """
        if self.windows.is_closed:
            return
        self.windows.is_closed = True
        try:
            attempt(partial(s.close, "closed") for s in self.subscribers.all())
        finally:
            self.broker.close()


_hubs: Living[Hub] = Living()
