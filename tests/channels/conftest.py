"""What the tests of channels share: a hub, and where a test's function runs."""

import pytest

from syncstream import Hub
from tests.support.pairs import Greenlets, Threads


@pytest.fixture(params=["threads", "gevent"])
def place(request):
    if request.param == "threads":
        return Threads()
    pytest.importorskip("gevent")
    return Greenlets()


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.close()
