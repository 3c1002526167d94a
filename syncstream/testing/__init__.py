"""Tools for tests of applications and brokers."""

from .brokers import check_broker
from .client import EVENT_SOURCE, Client, ClientStream
from .clock import advance
from .leaks import assert_no_open_streams
from .live import LiveServer
from .reader import Reader
from .responses import chunks, events, lines, reading

__all__ = [
    "EVENT_SOURCE",
    "Client",
    "ClientStream",
    "LiveServer",
    "Reader",
    "advance",
    "assert_no_open_streams",
    "check_broker",
    "chunks",
    "events",
    "lines",
    "reading",
]
