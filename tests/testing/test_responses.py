"""Reading what test clients return: `events`, `lines`, `chunks`, `reading`."""

import queue
import subprocess
import sys
import threading
import time

import django.test
import pytest
import webtest
import webtest.lint
import werkzeug.test

import syncstream
from syncstream.testing import chunks, events, lines, reading
from tests import ROOT
from tests.testing import apps


class OfFlask:
    get = staticmethod(apps.flask_app.test_client().get)


class OfWerkzeug:
    get = staticmethod(werkzeug.test.Client(apps.flask_app).get)


class OfWebTest:
    def get(self, path):
        # WebTest's TestApp reads a response to its end; its requests do not.
        return webtest.TestRequest.blank(path).get_response(
            webtest.lint.middleware(apps.flask_app)
        )


class OfDjango:
    def get(self, path):
        apps.configure_django()
        with django.test.override_settings(ROOT_URLCONF=apps, MIDDLEWARE=[]):
            return django.test.Client().get(path)


class OfNobody:
    def get(self, path):
        """Do without a test client: return the application's iterable."""
        environ = werkzeug.test.create_environ(path)
        return apps.flask_app(environ, lambda *head: lambda data: None)


CLIENTS = [OfFlask, OfWerkzeug, OfWebTest, OfDjango, OfNobody]


@pytest.fixture(params=CLIENTS, ids=lambda kind: kind.__name__)
def client(request):
    apps.ended = queue.Queue()
    return request.param()


@pytest.fixture
def flask_client():
    apps.ended = queue.Queue()
    return OfFlask()


def data(found):
    return [event.data for event in found]


@pytest.mark.parametrize("path", ["/three", "/plain/three"])
def test_all_of_a_stream_that_ends(client, path):
    """Without a number all events are read, up to the end."""
    assert data(events(client.get(path))) == ["a", "b", "c"]


@pytest.mark.parametrize("path", ["/ticks", "/plain/ticks"])
def test_some_of_an_endless_stream(client, path):
    """So many are read, then the source is closed: at its yield, in the test's thread.

    That is over when `events` returns.
    """
    assert data(events(client.get(path), 3)) == ["0", "1", "2"]
    assert apps.ended.get_nowait() == ("GeneratorExit", threading.get_ident())


def test_what_webtest_has_read():
    """A TestApp's response, which has been read to its end."""
    response = webtest.TestApp(apps.flask_app).get("/three")
    assert data(events(response, 3)) == ["a", "b", "c"]


def test_lines(client):
    """Lines are text, with comments and blank lines."""
    assert lines(client.get("/ticks"), 5) == [": ok", "", "data: 0", "", "data: 1"]


def test_chunks(client):
    """Chunks are what the application has sent."""
    assert chunks(client.get("/ticks"), 2) == [b": ok\n\n", b"data: 0\n\n"]


@pytest.mark.parametrize("path", ["/failing", "/plain/failing"])
def test_a_source_that_fails(client, path):
    """Its own exception is raised, with its own traceback."""
    with pytest.raises(LookupError, match="no such row") as raised:
        events(client.get(path), 2)
    assert raised.traceback[-1].name == "failing"
    assert data(events(client.get(path), 1)) == ["first"]


def test_a_stream_that_ends_early(client):
    """A stream with fewer events than expected fails the test, which shows them."""
    with pytest.raises(AssertionError, match=r"ended after 3 of 4 events: .*'c'"):
        events(client.get("/three"), 4)


def test_reading_in_steps(client):
    """A reader reads on where it has stopped, whatever it is asked for."""
    with reading(client.get("/ticks")) as stream:
        assert data(stream.events(2)) == ["0", "1"]
        assert stream.lines(2) == ["data: 2", ""]
        assert data(stream.events(1)) == ["3"]
        assert stream.chunks(1) == [b"data: 4\n\n"]
        assert data([next(iter(stream)) for _ in range(2)]) == ["5", "6"]
        assert next(stream.iter_lines()) == "data: 7"
    assert apps.ended.get_nowait()[0] == "GeneratorExit"
    with pytest.raises(ValueError, match="has been closed"):
        stream.events(1)


def test_a_subscription(client):
    """What is published between two reads is there for the next."""
    seen = apps.hub.publish("news", "old")
    apps.hub.publish("news", "first")
    with reading(client.get(f"/news?last_event_id={seen}")) as stream:
        assert data(stream.events(1)) == ["first"]
        with pytest.raises(AssertionError, match=r"sent 0 of 1 events within 0.05 s"):
            stream.events(1, timeout=0.05)
    with reading(client.get(f"/news?last_event_id={seen}")) as stream:
        assert data(stream.events(1)) == ["first"]
        newest = apps.hub.publish("news", "new")
        assert data(stream.events(1)) == ["new"]
        assert stream.last_event_id == newest


@pytest.mark.parametrize("kind", ["waits", "asleep", "sleeps"])
def test_a_source_that_waits_for_ever(client, kind):
    """A test fails after its time-out, and says what has come. Nothing hangs."""
    with reading(client.get(f"/{kind}")) as stream:
        assert data(stream.events(1)) == ["first"]
        began = time.monotonic()
        with pytest.raises(AssertionError, match=r"sent 0 of 2 events within 0.1 s"):
            stream.events(2, timeout=0.1)
        assert time.monotonic() - began < 5


def test_what_has_come():
    """The message shows it."""
    with pytest.raises(AssertionError, match=r"1 of 2 events within 0.5 s: .*'first'"):
        events(syncstream.SSEResponse(apps.SOURCES["waits"]()), 2, timeout=0.5)


@pytest.mark.parametrize("name", ["sleeps", "blocks", "locks", "loops"])
@pytest.mark.parametrize("plain", ["/", "/plain/"])
def test_a_source_that_nothing_wakes(flask_client, plain, name):
    """Neither in a call that blocks nor in a loop, and the message names its place."""
    with pytest.raises(
        AssertionError, match=r"sent 1 of 2 .*; its source is at .*apps"
    ):
        events(flask_client.get(plain + name), 2, timeout=0.1)


def test_an_endless_stream_read_to_its_end(flask_client):
    """The message says what to do instead."""
    with pytest.raises(AssertionError, match=r"has not ended .*, as in events\(3\)"):
        events(flask_client.get("/waits"), timeout=0.1)


def test_a_source_that_swallows_the_end(flask_client):
    """It is interrupted again and again until it goes."""
    left = []

    def stubborn():
        while len(left) < 2:
            try:
                time.sleep(60)
            except BaseException:
                left.append("told")
        yield "late"

    with pytest.raises(AssertionError, match="sent 0 of 1 events"):
        events(syncstream.SSEResponse(stubborn()), 1, timeout=0.1)
    assert left == ["told"] * 2


def test_a_clean_up_that_hangs(monkeypatch):
    """Closing is limited, too: the message names the place."""
    monkeypatch.setattr("syncstream.testing.reader.TIMEOUT", 0.1)

    def untidy():
        try:
            yield b"x"
        finally:
            time.sleep(60)

    with pytest.raises(AssertionError, match=r"of its close; its source .* in untidy"):
        chunks(untidy(), 1)


def test_the_response_of_a_view():
    """What a view has returned can be read without any client."""
    assert data(events(syncstream.SSEResponse(apps.ticks()), 2)) == ["0", "1"]


def test_in_a_thread():
    """In another thread than the main one the package's own waits end in time."""
    told = queue.Queue()

    def read():
        try:
            events(syncstream.SSEResponse(apps.SOURCES["waits"]()), 2, timeout=0.1)
        except BaseException as error:
            told.put(error)

    thread = threading.Thread(target=read)
    thread.start()
    thread.join(10)
    assert isinstance(told.get(timeout=5), AssertionError)


GEVENT = """
import gevent.monkey; {patch}
import gevent, threading
import pytest
from syncstream.testing import events, reading
from tests.testing import apps
import syncstream

def read():
    for name in ("waits", "sleeps"):
        wait = syncstream.sleep if name == "waits" else gevent.sleep
        for make in (syncstream.SSEResponse, apps.framed):
            source = apps.then(lambda: wait(60))
            with reading(make(source)) as stream:
                stream.events(1)
                with pytest.raises(AssertionError, match="0 of 1 .*; its source is"):
                    stream.events(1, timeout=0.1)
    assert len(events(syncstream.SSEResponse(apps.ticks()), 3)) == 3

{run}
"""


@pytest.mark.parametrize(
    ("patch", "run"),
    [("gevent.monkey.patch_all()", "read()"), ("", "gevent.spawn(read).get()")],
    ids=["patched", "greenlet"],
)
def test_under_gevent(patch, run):
    """In a greenlet a source is interrupted by its hub."""
    script = GEVENT.format(patch=patch, run=run)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, timeout=60, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr.decode()


def test_django_with_a_database():
    """In a TestCase the source sees the test's transaction; a TransactionTestCase, too.

    The connection is still open after a stream has been left.
    """
    command = [sys.executable, "-X", "dev", "-m", "tests.testing.django_project"]
    done = subprocess.run(command, capture_output=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr.decode()
    assert b"Ran 4 tests" in done.stderr


def test_an_asynchronous_body():
    """Django's Client cannot read one: the message says what can."""
    with pytest.raises(TypeError, match="AsyncClient"):
        events(OfDjango().get("/asynchronous"), 1)


@pytest.mark.parametrize(
    ("words", "error", "match"),
    [
        ((b"data: 1\n\n", 1), TypeError, "got b'data"),
        ((7, 1), TypeError, "got 7"),
        ((["data: 1\n\n"], 1), TypeError, "must yield bytes, got 'data"),
        (([b""], 0), ValueError, "from 1 on, or None, got 0"),
        (([b""], True), ValueError, "got True"),
        (([b""], 1, None), ValueError, "timeout must be .*got None"),
        (([b""], 1, 0), ValueError, "timeout must be .*got 0"),
    ],
)
def test_wrong_arguments(words, error, match):
    """They are named, before anything is read."""
    with pytest.raises(error, match=match):
        events(*words)
