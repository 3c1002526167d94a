"""What holds for every test."""

import gc
import signal
import threading

import pytest
from hypothesis import settings

# Their assertions are shown as those of tests are.
for _room in ("support", "live", "fanout", "runtime"):
    pytest.register_assert_rewrite(f"tests.{_room}")

from syncstream.runtime import process as process_module  # noqa: E402
from syncstream.runtime.forks import process_key  # noqa: E402
from syncstream.runtime.journal import journal  # noqa: E402
from tests.support.live import TABLE  # noqa: E402

# A machine that is busy makes no example wrong.
settings.register_profile("untimed", settings(), deadline=None)
settings.load_profile("untimed")


# A shell ignores it for what it runs in the background; our servers would, too.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark as `matrix` what is less about Python than about servers and browsers.

    That is each test with one of `live.TABLE` for a parameter, or a fixture's, and
    with a browser, `driver`. Others of deployments say it by ``pytest.mark.matrix``.
    See tests/run.
    """
    for item in items:
        if " at 0x" in item.nodeid:  # xdist's processes must agree on the names
            raise pytest.UsageError(
                f"an address is part of a test's name: {item.nodeid}"
            )
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        names = [value for value in values if isinstance(value, str)]
        has_server = any(name.startswith(TABLE) for name in names)
        if has_server or "driver" in item.fixturenames:
            item.add_marker("matrix")


def pytest_collection_finish():
    """Spare the tests' own collections the thousands of tests that there are.

    Each took 0.2 s of CPU time; some tests, and a fixture, make several.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def own_record(monkeypatch):
    """A process that has had no streams, and has warned of nothing."""
    record = process_module.Process()
    monkeypatch.setattr(process_module, "processes", {process_key(): record})
    return record


@pytest.fixture
def caplog(caplog):
    """pytest's, without what earlier tests have said and the journal logs later."""
    journal().flush()
    caplog.clear()
    return caplog


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
