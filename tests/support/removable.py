"""A broker whose events can be removed, and which can be kept from telling."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from syncstream import Hub
from syncstream.brokers.log import START, Entry, Page, first_part
from syncstream.brokers.memory import MemoryBroker


class Removable(MemoryBroker):
    """One from which events can be removed, as an operator may from a database."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._removed: set[str] = set()
        self._trimmed: dict[str, str] = {}  # the newest id, of each channel

    def remove(self, channel: str, *ids: str) -> None:
        """Remove events of a channel, wherever they are."""
        self._removed.update(ids)

    def trim(self, channel: str, count: int) -> None:
        """Drop the oldest events of a channel, but for so many."""
        kept = self.kept(channel)
        if len(kept) > count:
            self._trimmed[channel] = kept[len(kept) - count - 1].id

    def kept(self, channel: str) -> list[Entry]:
        """Return the events of a channel, oldest first."""
        return self._kept(channel)[1]

    def _kept(self, channel: str) -> tuple[str, list[Entry]]:
        """Return the id before the oldest that was not trimmed, and what there is."""
        stored: list[Entry] = []
        page = super().read(channel, START)
        while page.entries:
            stored += page.entries
            page = super().read(channel, stored[-1].id)
        base = stored[0].prev if stored else page.head
        ids = [entry.id for entry in stored]
        trimmed = self._trimmed.get(channel)
        if trimmed in ids:
            base, stored = trimmed, stored[ids.index(trimmed) + 1 :]
        return base, [entry for entry in stored if entry.id not in self._removed]

    def read(self, channel: str, after: str | None, limit: int = 1000) -> Page:
        head = super().read(channel, None).head
        if after is None:
            return Page((), True, head)
        base, kept = self._kept(channel)
        places = {entry.id: place for place, entry in enumerate(kept, 1)}
        place = 0 if after == base else places.get(after)
        entries = first_part(kept[place or 0 :][:limit])
        follows = entries[0].prev if entries else head
        return Page(entries, place is not None and follows == after, head)

    def newest(self, channel: str, count: int) -> tuple[str, str]:
        head = super().read(channel, None).head
        kept = self.kept(channel)[-count:]
        return kept[0].prev if kept else head, head


class _Nobody:
    """A sink that hears nothing."""

    def deliver(self, channel: str, entry: Entry) -> None: ...

    def resync(self, channels: Any) -> None: ...

    def state(self, is_up: bool, reason: str) -> None: ...

    def deny(self, name: str, reason: str) -> None: ...


@contextmanager
def untold(hub: Hub) -> Iterator[None]:
    """Have a hub's broker, which is in memory, tell of nothing that is published."""
    hub.broker.attach(_Nobody())
    yield
    hub.broker.attach(hub.sink)
