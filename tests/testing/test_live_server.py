"""`LiveServer`: an application on a real server."""

import urllib.error
import urllib.request

import pytest

from syncstream.protocol.sse import Decoder
from syncstream.testing import LiveServer

pytestmark = pytest.mark.matrix  # about servers, not about Python


@pytest.mark.parametrize(
    ("server", "worker"), [("gunicorn", "gevent"), ("werkzeug", "gthread")]
)
def test_a_server(server, worker):
    """It serves streams over a real socket, until it is closed."""
    app = "tests.testing.apps:flask_app"
    with LiveServer(app, server=server, worker=worker, env={"A": "b"}) as live:
        with urllib.request.urlopen(f"{live.url}/ticks", timeout=10) as response:
            assert response.headers["Content-Type"].startswith("text/event-stream")
            events = Decoder().feed(b"".join(response.readline() for _ in range(6)))
            assert [event.data for event in events] == ["0", "1"]
        assert "Traceback" not in live.log()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{live.url}/ticks", timeout=10)
    live.close()


def test_a_server_that_does_not_start():
    """The message has its log."""
    with pytest.raises(RuntimeError, match=r"No module named 'tests.nothing'"):
        LiveServer("tests.nothing:app", server="werkzeug")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"app": "tests"}, "got 'tests'"),
        ({"app": "a:b", "server": "nginx"}, "got 'nginx'"),
        ({"app": "a:b", "worker": "gaiohttp"}, "got 'gaiohttp'"),
        ({"app": "a:b", "timeout": None}, "got None"),
    ],
)
def test_wrong_arguments(words, match):
    """They are named."""
    with pytest.raises(ValueError, match=match):
        LiveServer(**words)
