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

READ = 500  # entries read from the broker at once
WINDOW = 256  # entries of a channel kept in memory for its subscribers
WINDOW_SIZE = 1 << 20  # bytes of a window; a single entry may be larger
BUDGET = 64 << 20  # bytes of all windows of a hub
IDLE = 60.0  # seconds for which a window without subscribers is kept
MOST_IDLE = 10_000  # the maximum of such windows, roughly: clients may choose names
MANY = 24  # living hubs of one URL before a warning: an application needs one
CROWD = 1000  # new windows between two searches for idle ones
ANSWER = 5.0  # seconds in which ``authorize`` must answer
SAID = 3600.0  # seconds before the same line about the same name is logged again
MOST_SAID = 100  # names with a line in that time: clients may choose names
RETRY = 1.0  # seconds, roughly, until a broker that did not answer is asked again
MAX_CHANNELS = 32  # channels of a subscription: one id must hold all their positions
MOST_PAYLOAD = 512 << 20  # bytes: the maximum of a value in Redis
