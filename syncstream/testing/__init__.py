"""Tools for tests of applications and brokers."""

from .brokers import check_broker
from .client import EVENT_SOURCE, Client, ClientStream
from .reader import Reader
from .responses import chunks, events, lines, reading

__all__ = [
    "EVENT_SOURCE",
    "Client",
    "ClientStream",
    "Reader",
    "check_broker",
    "chunks",
    "events",
    "lines",
    "reading",
]
