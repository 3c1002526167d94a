"""`Meeting`: makes groups of the clients at the same place of a channel."""

from __future__ import annotations

from collections.abc import Hashable

from ..streams.async_feed import AsyncFeed
from .client import Client
from .contract import Loop, subscription_of
from .group import Group

__all__ = ["Meeting"]


class Meeting:
    """The groups that clients may join, and the ways in and out.

    Attributes:
        groups: Groups by place, form and lanes: a shared group, or the group of a
            client that is alone at its place.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self.groups: dict[Hashable, Group] = {}

    def join(self, group: Group) -> None:
        """Have the only client of a group join the others at its place.

        The first client at a place only registers its group. The second one makes a
        shared group: a client that is alone at its place needs no leader.
        """
        (client,) = group.clients.values()
        if isinstance(client.feed, AsyncFeed):
            return
        mine = client.feed
        if not mine.is_plain or client.rest is not None:
            return
        terms = client.terms
        form = (client.is_chunked, terms.keepalive, terms.comment)
        key = (*mine.kind, *form, id(terms.lanes))
        found = self.groups.get(key)
        if found is not None and found.is_empty:
            self.forget(found)  # left by a failure, at a place that is never reached
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
        # Otherwise it has not had its turn yet: try again with the next event.
        if found.is_at(mine):
            self._move(group, found)

    def _share(self, first: Group, key: Hashable) -> Group:
        """Make a shared group at the place of a client, with that client."""
        (client,) = first.clients.values()
        leader = subscription_of(client.feed).twin()
        shared = Group(self._loop, leader, client, key)
        leader.detach(shared)
        self.groups[key] = shared
        self._move(first, shared)
        try:
            shared.turn()
        except BaseException as error:  # it concerns all clients of the group
            self._loop.cut(shared, error)
        return shared

    def _move(self, group: Group, shared: Group) -> None:
        """Move the only client of a group to a shared one."""
        (client,) = group.clients.values()
        try:
            group.remove(client)
            mine = subscription_of(client.feed)
            mine.lean_on(subscription_of(shared.leader))
            shared.add(client)
        except BaseException as error:  # the client may be in neither group
            self._loop.cut(client, error)
            if not shared.clients:
                self.forget(shared)

    def forget(self, group: Group) -> None:
        """Forget an empty group."""
        if self.groups.get(group.key) is group:
            del self.groups[group.key]
        self._loop.wheel.remove(group)
        if not group.is_asking:
            group.let_go()

    def part(self, client: Client) -> Group:
        """Move a client of a shared group into its own group, at the same place."""
        group = client.group
        assert group is not None
        mine = subscription_of(client.feed)
        mine.go_where(subscription_of(group.leader))
        group.remove(client)
        alone = Group(self._loop, mine, client)
        alone.add(client)
        return alone
