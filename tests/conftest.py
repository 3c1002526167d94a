"""What holds for every test."""

import threading

import pytest


@pytest.fixture(autouse=True)
def _no_thread_is_left_behind():
    """A test that leaks a thread fails."""
    before = set(threading.enumerate())
    yield
    left = [
        thread
        for thread in set(threading.enumerate()) - before
        if not thread.daemon and thread.is_alive()
    ]
    assert left == []
