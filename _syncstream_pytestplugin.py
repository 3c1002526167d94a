"""pytest's plugin: fixtures for tests of streams, and a check for those left open.

pytest imports it wherever syncstream is installed. It stands outside of the package, to
import nothing of that before a test uses it (as `_hypothesis_pytestplugin` does).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from syncstream import Hub
    from syncstream.testing import Client

_BEFORE = pytest.StashKey[set[int]]()


def _leaks() -> Any:
    """Return ``syncstream.testing.leaks`` once the tests have imported syncstream."""
    if "syncstream.runtime.process" not in sys.modules:
        return None
    from syncstream.testing import leaks

    return leaks


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Note which streams are open when a test begins: those of its fixtures."""
    leaks = _leaks()
    if leaks is not None:
        leaks.remember_places()
        item.stash[_BEFORE] = set(leaks.open_streams())


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Fail a test that has left streams open, once its fixtures are closed."""
    leaks, complaint = _leaks(), ""
    if leaks is not None:
        try:
            leaks.assert_none_is_left(item.stash.get(_BEFORE, set()))
        except AssertionError as error:
            complaint = str(error)
    if complaint:
        pytest.fail(complaint, pytrace=False)


@pytest.fixture
def stream_hub() -> Iterator[Hub]:
    """A `syncstream.Hub("memory:")` of the test's own."""
    from syncstream import Hub

    hub = Hub("memory:")
    yield hub
    hub.close()


@pytest.fixture
def stream_client(request: pytest.FixtureRequest) -> Client:
    """A `syncstream.testing.Client` of the WSGI application in your fixture ``app``."""
    from syncstream.testing import Client

    try:
        app = request.getfixturevalue("app")
    except pytest.FixtureLookupError:
        pytest.fail(
            "stream_client needs a fixture named app that returns your WSGI"
            " application: define it in conftest.py",
            pytrace=False,
        )
    return Client(app)
