"""What holds for every test."""

import threading

import pytest
from hypothesis import settings

# A machine that is busy makes no example wrong.
settings.register_profile("untimed", settings(), deadline=None)
settings.load_profile("untimed")


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
