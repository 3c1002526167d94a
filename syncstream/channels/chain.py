"""The chain rule: where something is missing between the entries of a channel.

Each entry names the id before it (see `brokers.log`). Nothing is missing between an id
and an entry if and only if the entry names that id. The rule holds however the entries
have come, and a break is never passed over:

- told live (`Windows.deliver`): the window begins anew after the id that the entry
  names. Its readers find themselves outside of it, and ask the store.
- read from the store (`Pages`): a reset stands where the break is.
- kicks (`Control`): all whom a missing one may have named are kicked.
"""

from __future__ import annotations

from ..brokers.log import Entry, Page

__all__ = ["follows", "is_whole"]


def follows(entry: Entry, last: str | None) -> bool:
    """Tell whether nothing is missing between an id and an entry.

    Args:
        last: ``None``: something is missing for certain.
    """
    return entry.prev == last


def is_whole(page: Page, last: str) -> bool:
    """Tell whether nothing is missing between the id that was asked for and a page's
    end."""
    entries = page.entries
    if not page.complete and not (entries and follows(entries[0], last)):
        return False
    return all(follows(entry, entries[n].id) for n, entry in enumerate(entries[1:]))
