"""Tools for tests of applications and brokers."""

from .brokers import check_broker
from .reader import Reader
from .responses import chunks, events, lines, reading

__all__ = ["Reader", "check_broker", "chunks", "events", "lines", "reading"]
