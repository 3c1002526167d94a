"""Where clients meet: those who are at one place of a channel become a group."""

from __future__ import annotations

from collections.abc import Hashable

from .client import Client
from .contract import Loop
from .group import Group

__all__ = ["Meeting"]


class Meeting:
    """The groups that others may join, and how clients go into them and out.

    Attributes:
        groups: By place, form and lanes: a shared group, or a client that is by itself
            there.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self.groups: dict[Hashable, Group] = {}

    def join(self, group: Group) -> None:
        """Have the only client of a group join the others who are where it is.

        The first one only leaves word where it is. The second makes a shared group, so
        a client alone at its place needs no leader.
        """
        (client,) = group.clients.values()
        mine = client.subscription
        if not mine.is_plain or client.rest is not None:
            return
        terms = client.terms
        form = (client.is_chunked, terms.keepalive, terms.comment)
        key = (*mine.kind, *form, id(terms.lanes))
        found = self.groups.get(key)
        if found is not None and found.is_empty:
            self.forget(found)  # a failure has left it, at a place where nobody comes
            found = None
        if (
            found is None
            or found is group
            or not (found.is_shared or found.is_at(mine))
        ):
            self.groups[key], group.key = group, key
            return
        if not found.is_shared:
            found = self._share(found, key)
        # Or it has not had its turn since: we come again with the next event.
        if found.is_at(mine):
            self._move(group, found)

    def _share(self, first: Group, key: Hashable) -> Group:
        """Make a group for several where a client is that is by itself, with it."""
        (client,) = first.clients.values()
        leader = client.subscription.twin()
        shared = Group(self._loop, leader, client, key)
        leader.detach(shared)
        self.groups[key] = shared
        self._move(first, shared)
        try:
            shared.turn()
        except BaseException as error:  # not only of whom this turn is
            self._loop.cut(shared, error)
        return shared

    def _move(self, group: Group, shared: Group) -> None:
        """Move the only client of a group to a shared one."""
        (client,) = group.clients.values()
        try:
            group.remove(client)
            client.subscription.lean_on(shared.leader)
            shared.add(client)
        except BaseException as error:  # it may be in neither
            self._loop.cut(client, error)
            if not shared.clients:
                self.forget(shared)

    def forget(self, group: Group) -> None:
        """Forget a group that is empty."""
        if self.groups.get(group.key) is group:
            del self.groups[group.key]
        self._loop.wheel.remove(group)
        if not group.is_asking:
            group.let_go()

    def part(self, client: Client) -> Group:
        """Have a client of a shared group be by itself, where that is."""
        group = client.group
        assert group is not None
        client.subscription.go_where(group.leader)
        group.remove(client)
        alone = Group(self._loop, client.subscription, client)
        alone.add(client)
        return alone
