"""What holds for every test."""

import threading

import pytest
from hypothesis import settings

from live import SERVERS

# A machine that is busy makes no example wrong.
settings.register_profile("untimed", settings(), deadline=None)
settings.load_profile("untimed")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark as `matrix` each test that has one of `live.SERVERS` for a parameter.

    Its own fixtures' parameters count, too. A test of deployments that has none says
    it by ``pytest.mark.matrix``. See tests/run.
    """
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        names = [value for value in values if isinstance(value, str)]
        if any(name.startswith(SERVERS) for name in names):
            item.add_marker("matrix")


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
