"""pytest's plugin, in runs of pytest of its own."""

import pytest

from tests import ROOT

pytest_plugins = ["pytester"]

APP = """
import flask
import pytest
import syncstream
from syncstream.testing import reading

@pytest.fixture
def app(stream_hub):
    app = flask.Flask("app")

    @app.get("/ticks")
    def ticks():
        return syncstream.SSEResponse(iter(range(10**9)))

    @app.get("/news")
    def news():
        return syncstream.SSEResponse(stream_hub.subscribe("news"))

    return app
"""


@pytest.fixture
def run(pytester, monkeypatch):
    """Run tests with the plugin, as where syncstream is installed."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(tests, conftest=APP):
        pytester.makeconftest(conftest)
        pytester.makepyfile(test_app=tests)
        return pytester.runpytest_subprocess(
            # By its module, whether it is installed or not.
            *("-p", "no:syncstream", "-p", "_syncstream_pytestplugin"),
            *("-p", "no:cacheprovider"),
        )

    return run


def test_fixtures_and_leaks(run):
    """A leak fails the test that has it, by path and line, and no other.

    What a fixture has opened is the fixture's affair, until it is closed.
    """
    done = run(
        """
import pytest
import syncstream.testing

kept = []

def test_good(stream_client, stream_hub):
    with stream_client.stream("GET", "/news") as stream:
        stream_hub.publish("news", "hello")
        assert stream.events(1)[0].data == "hello"

def test_hub_is_new(stream_client, stream_hub):
    assert stream_hub.head("news").startswith("0-")

def open_one(client):
    kept.append(client.stream("GET", "/ticks"))

def test_leak_of_ours(stream_client):
    open_one(stream_client)

def test_leak_of_flask(app):
    kept.append(app.test_client().get("/ticks"))  # here

def test_dropped(app):
    app.test_client().get("/ticks")

@pytest.fixture(scope="module")
def wide():
    stream = syncstream.SSEResponse(iter("abc"))
    chunks = iter(stream.response)
    next(chunks)
    yield
    stream.close()

def test_of_a_fixture(wide):
    pass
"""
    )
    done.assert_outcomes(passed=6, errors=2)
    text = done.stdout.str()
    ours, theirs = text.split("_ ERROR at teardown of test_leak_of_flask")
    assert "GET '/ticks', opened at " in ours
    assert "test_app.py, line 18, in test_leak_of_ours" in ours
    assert "GET '/ticks', opened at " in theirs
    assert "test_app.py, line 21, in test_leak_of_flask" in theirs


def test_assert_no_open_streams(run):
    """A test may ask by itself, in the middle."""
    done = run(
        """
import pytest
from syncstream.testing import assert_no_open_streams

def test_asking(stream_client):
    assert_no_open_streams()
    with stream_client.stream("GET", "/news"):
        with pytest.raises(AssertionError, match="1 open stream: .*") as raised:
            assert_no_open_streams(timeout=0.05)
    assert "GET '/news', opened at" in str(raised.value)
    assert_no_open_streams()
"""
    )
    done.assert_outcomes(passed=1)


def test_without_an_application(run):
    """The message says which fixture to write."""
    done = run("def test_it(stream_client): pass", conftest="")
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines(["*stream_client needs a fixture named app*"])


def test_unused(run):
    """The plugin imports nothing of the package where no test does."""
    done = run(
        """
import sys

def test_it():
    pass

def test_that():
    assert not [name for name in sys.modules if name.partition(".")[0] == "syncstream"]
""",
        conftest="",
    )
    done.assert_outcomes(passed=2)
