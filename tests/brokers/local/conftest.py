"""A folder for each test, and the brokers of its log."""

import contextlib
import tempfile

import pytest

from syncstream.brokers.local import LocalBroker
from tests.support.live import unique_key


@pytest.fixture
def folder():
    """A folder with a short name: sockets are in it."""
    with tempfile.TemporaryDirectory(prefix="ss-") as path:
        yield path


@pytest.fixture
def make(folder):
    """Make brokers of one log; they are closed."""
    with contextlib.ExitStack() as stack:

        def make(name="log", **options):
            broker = LocalBroker(f"local:{folder}/{name}", **options)
            stack.callback(broker.close)
            return broker

        yield make


@pytest.fixture
def channel():
    return unique_key()
