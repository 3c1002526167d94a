"""The chain rule, which shows where entries of a channel are missing.

Each entry names its predecessor's id (see `brokers.log`). Nothing is missing between an
id and an entry if and only if the entry names that id. The rule holds for entries from
every source, and no break is ignored:

- Announced entries (`Windows.deliver`): the window restarts after the id that the entry
  names. Its readers are outside of it then, and read the store.
- Stored entries (`Pages`): a reset takes the place of the break.
- Kicks (`Control`): all subscriptions that a missing kick may have named are kicked.
"""

from __future__ import annotations

from ..brokers.log import Entry, Page

__all__ = ["follows", "is_whole"]


def follows(entry: Entry, last: str | None) -> bool:
    """Tell whether nothing is missing between an id and an entry.

    Args:
        entry: The entry.
        last: The id; ``None`` if entries are missing for certain.
    """
    return entry.prev == last


def is_whole(page: Page, last: str) -> bool:
    """Tell whether nothing is missing between the requested id and a page's end."""
    entries = page.entries
    if not page.complete and not (entries and follows(entries[0], last)):
        return False
    return all(follows(entry, entries[n].id) for n, entry in enumerate(entries[1:]))
