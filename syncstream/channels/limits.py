"""Limits of a hub and its subscriptions, with their units."""

from __future__ import annotations

from ..brokers.contract import LONGEST_KEPT as LONGEST
from ..brokers.contract import MOST_KEPT

__all__ = [
    "ANSWER",
    "BUDGET",
    "CROWD",
    "IDLE",
    "LONGEST",
    "MANY",
    "MAX_CHANNELS",
    "MOST_IDLE",
    "MOST_KEPT",
    "MOST_PAYLOAD",
    "MOST_SAID",
    "READ",
    "RETRY",
    "SAID",
    "WINDOW",
    "WINDOW_SIZE",
]

READ = 500  # entries that are read at once
WINDOW = 256  # entries of a channel that are kept for its subscribers
WINDOW_SIZE = 1 << 20  # bytes of them, but for a single one
BUDGET = 64 << 20  # bytes of all windows of a hub
IDLE = 60.0  # seconds that a window without subscribers is kept
MOST_IDLE = 10_000  # how many of them, roughly: names of channels may come from clients
MANY = 24  # hubs of one URL that are alive: one is enough
CROWD = 1000  # new ones after which they are counted
ANSWER = 5.0  # seconds in which an `authorize` must have answered
SAID = 3600.0  # seconds for which what was said of a name is not said again
MOST_SAID = 100  # names of which something is said in that time: clients choose names
RETRY = 1.0  # seconds, roughly, until a broker that did not answer is asked again
MAX_CHANNELS = 32  # of one subscription, by name: their ids fit into one
MOST_PAYLOAD = 512 << 20  # bytes: what Redis has for one value
