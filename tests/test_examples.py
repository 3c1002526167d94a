"""Each example does, on a real server, what its docstring says."""

import ast
import contextlib
import json
import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from syncstream.protocol import sse
from tests import ROOT
from tests.support.live import LiveServer, free_port
from tests.support.programs import program
from tests.support.waits import TIMEOUT, await_true

FILES = sorted((ROOT / "examples").glob("*.py"))
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.py"))
FAST = {"INTERVAL": "0.02", "PYTHONUNBUFFERED": "1"}  # prints reach the log at once
EVENT_SOURCE = {"Accept": "text/event-stream", "Cache-Control": "no-cache"}


def docstring(name):
    text = (ROOT / "examples" / f"{name}.py").read_text()
    return ast.get_docstring(ast.parse(text))


def commands(name):
    """Return the lines of the server's and the client's command."""
    return re.findall(r"^    ((?:gunicorn|curl) .*)$", docstring(name), re.M)


def path_of(name):
    """Return the path that the client's command asks for."""
    _, client = commands(name)
    return re.search(r" http://127\.0\.0\.1:8000(/\S*)$", client)[1]


def serve(name, kind="gunicorn-gevent", *options, method="HEAD", **env):
    """Run an example, as its docstring names it."""
    app = commands(name)[0].split()[-1]
    ready = f"{method} {path_of(name)}"
    return LiveServer(kind, app, *options, env={**FAST, **env}, ready=ready)


def post(server, path):
    """Post nothing to a path, and return the answer's body."""
    with server.connect() as client:
        client.request("POST", path, headers={"Content-Length": "0"})
        body = client.rest()
        assert client.status in (200, 201)
        return body


def get_json(server, path):
    with server.get(path) as client:
        return json.loads(client.rest())


def events_of(body):
    return sse.Decoder().feed(body)


def one_event(client):
    """Read one block of a stream, and return its event."""
    (event,) = events_of(client.block())
    return event


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_example_is_short_and_names_its_commands(path):
    """At most 60 lines, and a docstring with the server's command, then curl's."""
    assert len(path.read_text().splitlines()) <= 60
    server, client = commands(path.stem)
    assert server.startswith("gunicorn -k gevent ")
    assert server.endswith(f" examples.{path.stem}:app")
    assert client.startswith("curl -N ")
    assert path_of(path.stem)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_described(path):
    """It is short, with its command; its page names it, and a test serves it."""
    longest = 240 if path.stem == "mcp_tools" else 160  # a whole protocol
    assert len(path.read_text().splitlines()) <= longest
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    # npm would remove what another recipe has installed in the same folder.
    assert "--no-save" not in docstring
    assert re.search(rf"^    .* examples\.recipes\.{path.stem}:app$", docstring, re.M)
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert f"(../examples/recipes/{path.name})" in page
    tests = (ROOT / "tests").rglob("*.py")
    assert any(f"recipes.{path.stem}" in test.read_text() for test in tests)


COPIES = """
import importlib, pathlib, sys
for folder in sorted(pathlib.Path("copies").iterdir()):
    sys.path.insert(0, str(folder))
    assert importlib.import_module(folder.name).app.url_map
    del sys.path[0], sys.modules[folder.name]
"""


def test_recipes_are_files_to_copy(tmp_path):
    """Each starts alone in its folder, where only packages can be imported."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "syncstream").symlink_to(ROOT / "syncstream")
    for path in RECIPES:
        copy = tmp_path / "copies" / path.stem / path.name
        copy.parent.mkdir(parents=True)
        copy.write_bytes(path.read_bytes())
    env = {**os.environ, "PYTHONPATH": "packages", "OPENAI_API_KEY": "-"}
    script = [sys.executable, "-c", COPIES]
    subprocess.run(script, cwd=tmp_path, env=env, timeout=3 * TIMEOUT, check=True)


@pytest.mark.parametrize("path", FILES + RECIPES, ids=lambda path: path.stem)
def test_pages_fit_small_screens_and_keep_unicode(path):
    """And no regular expression of a page takes U+2028 for the end of a line."""
    text = path.read_text()
    assert text.count("<!doctype html>") == text.count('<meta name="viewport"')
    for expression in re.findall(r"(?:split|match|test|exec)\(/(.*?)/(\w*)\)", text):
        assert "." not in expression[0] or "s" in expression[1], expression


def test_every_example_is_tested():
    """No example without a test that serves it."""
    tests = Path(__file__).parent
    files = ("test_examples.py", "test_channel_examples.py")
    text = "".join((tests / file).read_text() for file in files)
    served = set(re.findall(r'serve\(\s*"(\w+)"', text))
    served |= set(FRAMEWORKS)
    assert served == {path.stem for path in FILES}


def test_the_two_commands_work_as_they_are_written():
    """In a clone, with nothing else on the path, by a shell."""
    program("curl", "curl")
    server, client = commands("number_stream")
    port = free_port()
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    env["GUNICORN_CMD_ARGS"] = f"-b 127.0.0.1:{port} --no-control-socket"
    env["INTERVAL"] = "0.02"
    client = client.replace(":8000", f":{port}")
    process = subprocess.Popen(
        server.split(), env=env, cwd=ROOT, stderr=subprocess.DEVNULL
    )
    try:
        retry = ["--retry-connrefused", "--retry", "60", "--retry-delay", "1"]
        output = subprocess.run(
            [*client.split(), "--silent", "--noproxy", "*", *retry],
            stdout=subprocess.PIPE,
            timeout=3 * TIMEOUT,
            check=True,
        ).stdout
    finally:
        process.terminate()
        process.wait(TIMEOUT)
    assert output.startswith(b"Number: 0\nNumber: 1\n")


@pytest.mark.parametrize("kind", ["gunicorn-gevent", "gunicorn-gthread"])
def test_number_stream(kind):
    """Each line leaves alone, and the end of the response is marked."""
    with serve("number_stream", kind) as server:
        with server.get("/numbers") as client:
            lines = [client.chunk() for _ in range(6)]
        assert lines == [*(b"Number: %d\n" % i for i in range(5)), b""]
        assert client.is_whole
        assert client.headers["content-type"] == "text/plain; charset=utf-8"


def test_number_stream_does_not_wait():
    """The first line is there while the generator still sleeps."""
    with (
        serve("number_stream", INTERVAL=str(10 * TIMEOUT)) as server,
        server.get("/numbers") as client,
    ):
        assert client.chunk() == b"Number: 0\n"


def test_download(tmp_path):
    """The file comes whole, in pieces of 8 KiB, its end marked."""
    file = tmp_path / "file"
    file.write_bytes(os.urandom(3 * 8192 + 100))
    with (
        serve("download", "gunicorn-gthread", FILE=str(file)) as server,
        server.get("/download") as client,
    ):
        pieces = [client.chunk() for _ in range(5)]
        assert [len(piece) for piece in pieces] == [8192, 8192, 8192, 100, 0]
        assert b"".join(pieces) == file.read_bytes()
        assert client.is_whole
        assert client.headers["content-type"] == "application/octet-stream"


def test_download_closes_the_file_when_the_client_leaves(tmp_path):
    """Half way: whoever writes the file learns that its reader has closed it."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    left = threading.Event()
    closed = threading.Event()

    def write():
        with contextlib.suppress(BrokenPipeError), open(fifo, "wb", 0) as file:
            file.write(bytes(2 * 8192))
            left.wait(TIMEOUT)
            while True:
                file.write(bytes(8192))
        closed.set()

    writer = threading.Thread(target=write, daemon=True)
    with serve("download", "gunicorn-gthread", FILE=str(fifo)) as server:
        writer.start()
        with server.get("/download") as client:
            assert len(client.chunk()) == 8192
        left.set()
        assert closed.wait(TIMEOUT)
        assert "Traceback" not in server.log()
    writer.join(TIMEOUT)


def test_counter():
    """Ten unnamed events, then one with a name; a client that leaves is noticed."""
    with serve("counter") as server:
        with server.get("/events") as client:
            events = events_of(client.rest())
        assert [event.json() for event in events[:-1]] == [
            {"counter": i} for i in range(10)
        ]
        assert {event.event for event in events[:-1]} == {None}
        assert (events[-1].event, events[-1].data) == ("end", "bye")
        assert "Client disconnected!" not in server.log()
        with server.get("/events") as client:
            client.block()
        server.await_log("Client disconnected!")


def test_event_kinds():
    """Text, mappings, objects, events and JSON become the bytes they should."""
    full = b"id: evt-1\nevent: custom_event\nretry: 3000\ndata: Full event data\n\n"
    with serve("event_kinds", "gunicorn-gthread") as server:
        with server.get("/kinds") as client:
            assert client.rest() == (
                b": ok\n\n"
                b"data: Simple message\n\n"
                b"data: Two\ndata: lines\n\n"
                b"id: 2\nevent: type2\ndata: Event 2\n\n"
                b"data: 3\n\n"
                b"event: alarm\ndata: The door is open\n\n"
                + full
                + b'retry: 1000\ndata: {"tick":5}\n\n'
                b'data: {"temperature":21.5}\n\n'
                + 'data: [1,null,"é"]\n\n'.encode()
                + b": clients ignore this\n\n"
            )
        with server.get("/list") as client:
            events = events_of(client.rest())
        assert [(event.event, event.data, event.id) for event in events] == [
            ("connect", "Connected!", None),
            ("message", "Hello World", "1"),
            ("close", "Goodbye", "2"),
        ]
        with server.get("/one") as client:
            assert client.rest() == (
                b": ok\n\nid: notif-1\nevent: notification\ndata: New!\n\n"
            )


@pytest.mark.parametrize("kind", ["gunicorn-gevent", "waitress"])
def test_pushed(kind):
    """A callback sends; so does a coroutine."""
    with serve("pushed", kind) as server:
        with server.get("/copy", headers=EVENT_SOURCE) as client:
            events = events_of(client.rest())
        assert [e.event for e in events[:6]] == ["progress"] * 5 + ["done"]
        assert events[1].json() == {"file": "2.txt", "part": 0.4}
        with server.get("/counter") as client:
            events = events_of(client.rest())
        assert [e.json()["counter"] for e in events] == [0, 1, 2, 3, 4]
        assert [e.id for e in events] == [*"01234"]
        assert server.tracebacks() == 0, server.log()


def test_live_sensor():
    """Readings have a name, ids that count, and JSON for data."""
    started = time.time()
    with (
        serve("live_sensor", INTERVAL="0.001") as server,
        server.get("/live-data") as client,
    ):
        events = events_of(client.rest())
        assert [event.id for event in events] == [str(i) for i in range(100)]
        assert {event.event for event in events} == {"sensor_reading"}
        readings = [event.json() for event in events]
        assert [reading["value"] for reading in readings] == [
            i * 1.5 for i in range(100)
        ]
        times = [reading["timestamp"] for reading in readings]
        assert started < times[0]
        assert times == sorted(times)
        # A hundred sleeps: the readings are made while the stream runs.
        assert times[-1] - times[0] >= 99 * 0.001


@pytest.fixture(scope="module")
def reconnection():
    with serve("reconnection", "gunicorn-gthread") as server:
        yield server


@pytest.mark.parametrize(
    ("presented", "first"),
    [
        (None, 1),
        ("5", 6),
        ("0", 1),
        ("", 1),
        ("five", 1),
        ("-3", 1),
        ("5.5", 1),
        ("²", 1),
        ("syncstream-end", 1),
        ("9" * 3000, 1),
    ],
)
@pytest.mark.parametrize("where", ["header", "query"])
def test_reconnection_goes_on_after_the_id(reconnection, presented, first, where):
    """After the id that was presented; from the start after what is no number."""
    path, headers = "/events", dict(EVENT_SOURCE)
    if presented is not None and where == "header":
        headers["Last-Event-ID"] = presented
    elif presented is not None:
        path += f"?lastEventId={presented}".replace("²", "%C2%B2")
    with reconnection.get(path, headers=headers) as client:
        events = events_of(client.rest())
    assert [event.id for event in events] == [str(first + n) for n in range(5)]
    assert events[0].data == f"Number {first}"
    assert "Traceback" not in reconnection.log()


def test_reconnection_misses_nothing(reconnection):
    """A client that always comes back with the last id sees every number once."""
    decoder = sse.Decoder()
    numbers = []
    for _ in range(3):
        headers = dict(EVENT_SOURCE)
        if decoder.last_event_id is not None:
            headers["Last-Event-ID"] = decoder.last_event_id
        with reconnection.get("/events", headers=headers) as client:
            numbers += [int(event.id) for event in decoder.feed(client.rest())]
        assert decoder.retry == 1000
    assert numbers == list(range(1, 16))


def test_reconnection_has_a_page(reconnection):
    """The page opens an EventSource."""
    with reconnection.get("/") as client:
        assert b'new EventSource("/events")' in client.rest()


@pytest.mark.parametrize("kind", ["gunicorn-gevent", "gunicorn-gthread"])
def test_keepalive_only_when_idle(kind):
    """A comment comes when there was nothing to send for so long, not earlier."""
    idle = 0.5
    with serve("keepalive", kind, IDLE=str(idle)) as server, server.connect() as client:
        asked = time.monotonic()
        client.request("GET", "/events")
        assert client.block() == b": ok\n\n"

        def read():
            """Return the next message; check each keepalive before it."""
            while (block := client.block()) == b": keepalive\n\n":
                assert time.monotonic() - said >= idle
            (event,) = events_of(block)
            assert event.event == "update"
            return event.json()["text"]

        said = asked
        assert client.block() == b": keepalive\n\n"
        assert time.monotonic() - asked >= idle
        # A clock that only keepalives set would now run out, several times.
        n = 0
        while time.monotonic() - asked < 4 * idle:
            now = time.monotonic()
            post(server, f"/say/{n}")
            assert read() == str(n)
            said = now
            n += 1
        assert client.block() == b": keepalive\n\n"
        assert time.monotonic() - said >= idle


def test_keepalive_finds_out_who_has_left():
    """A silent client that leaves is forgotten after the next comment."""
    with serve("keepalive", IDLE="0.05") as server:
        with server.get("/events") as client:
            assert client.block() == b": ok\n\n"
            assert client.block() == b": keepalive\n\n"
            assert json.loads(post(server, "/say/x")) == {"told": 1}
        await_true(lambda: json.loads(post(server, "/say/x")) == {"told": 0})


@pytest.mark.parametrize("kind", ["gunicorn-gevent", "gunicorn-gthread"])
def test_streaming_views(kind):
    """Each line leaves alone; a client that leaves ends both kinds of body."""
    with serve("streaming_views", kind) as server:
        with server.get("/numbers") as client:
            lines = [client.chunk() for _ in range(6)]
        assert lines == [*(b"Number: %d\n" % i for i in range(5)), b""]
        assert client.is_whole
        assert client.headers["content-type"] == "text/html; charset=utf-8"
        ends = {"/events": "Client disconnected", "/ticks": "Last tick"}
        for path, last_words in ends.items():
            with server.get(path) as client:
                assert client.block() == b": ok\n\n"
                assert client.headers["content-type"] == "text/event-stream"
                assert client.block().startswith(b"data: ")
                assert last_words not in server.log()
            server.await_log(last_words)
            assert server.log().count(last_words) == 1
        assert "Traceback" not in server.log()


@pytest.mark.parametrize("kind", ["gunicorn-gevent", "gunicorn-gthread"])
def test_disconnect_counts_down(kind):
    """Each client that leaves runs its generator's finally: the count goes down."""
    with serve("disconnect", kind) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.get("/events")) for _ in range(3)]
        for client in clients:
            assert client.block() == b": ok\n\n"
            assert isinstance(one_event(client).json()["timestamp"], float)
        assert get_json(server, "/clients") == {"clients": 3}
        server.await_log("Client connected. Total: 3")
        for left, client in zip((2, 1, 0), clients, strict=True):
            client.close()
            server.await_log(f"Cleanup complete. Remaining: {left}")
            assert get_json(server, "/clients") == {"clients": left}
        assert server.log().count("Cleanup complete") == 3
        assert "Traceback" not in server.log()


@pytest.mark.parametrize("kind", ["gunicorn-gevent", "gunicorn-gthread"])
def test_backpressure_skips_to_the_newest(kind):
    """A throttled reader skips, never goes back, and the source keeps 100."""
    with (
        serve("backpressure", kind, PRODUCE="0.001", THROTTLE="0.05") as server,
        server.get("/events") as client,
    ):
        client.block()
        last = held = skipped = 0
        while held < 100 or not skipped:
            event = one_event(client)
            data = event.json()
            assert int(event.id) == data["id"] > last
            if last:
                skipped += data["skipped"]
                assert data["skipped"] == data["id"] - last - 1
            last, held = data["id"], data["held"]
            assert held <= 100
            assert data["data"] == f"event {last}"
        while last < 300:
            event = one_event(client).json()
            last = event["id"]
            assert event["held"] == 100


@pytest.mark.parametrize("kind", ["gunicorn-gevent", "gunicorn-gthread"])
def test_error_recovery(kind):
    """Three failures in a row, 2 and 4 units apart, then an error event, the end."""
    unit = 0.6  # the source must be up again before the third failure, 6 units later
    failed = "Error fetching data: the source is down"
    with serve("error_recovery", kind, BACKOFF=str(unit)) as server:
        with server.get("/events", headers=EVENT_SOURCE) as client:
            assert client.block() == b": ok\n"
            block = client.block()
            assert block.startswith(b"event: update\nretry: 1000\ndata: {")
            # It mends itself, and the count starts again.
            post(server, "/source/down")
            server.await_log(failed)
            post(server, "/source/up")
            up = time.time()
            event = one_event(client)
            while event.json()["timestamp"] < up:
                event = one_event(client)
            assert event.event == "update"
            before = server.log().count(failed)
            down = time.monotonic()
            post(server, "/source/down")
            event = one_event(client)
            while event.event == "update":
                event = one_event(client)
            assert time.monotonic() - down >= (2 + 4) * unit
            assert event.event == "error"
            assert event.json() == {"error": "Service temporarily unavailable"}
            # The end: marked, and not for good.
            assert client.rest() == b""
            assert client.is_whole
        assert server.log().count(failed) == before + 3
        post(server, "/source/up")
        with server.get("/events", headers=EVENT_SOURCE) as client:
            client.block()
            assert one_event(client).event == "update"


@pytest.fixture
def database(tmp_path):
    return tmp_path / "events.sqlite3"


def next_event(client):
    """Return the next event, whatever comments come before it."""
    while not (events := events_of(client.block())):
        pass
    return events[0]


CHANGING = [
    path.stem for path in FILES if re.search(r"^@app\.post", path.read_text(), re.M)
]


@pytest.mark.parametrize("name", CHANGING)
def test_what_changes_something_is_not_for_other_sites(name):
    """Each example that takes a POST refuses foreign Origin and Host headers."""
    text = (ROOT / "examples" / f"{name}.py").read_text()
    assert "app = Flask(__name__)\napp.before_request(same_site_only)\n" in text


SITES = [
    ({}, 201),
    ({"Origin": "http://localhost"}, 201),
    ({"Origin": "https://evil.example"}, 403),
    ({"Origin": "null"}, 403),
    ({"Host": "evil.example"}, 403),
    ({"Host": "evil.example", "Origin": "http://evil.example"}, 403),
    ({"Host": "good.example", "Origin": "http://good.example"}, 201),
    ({"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:8000"}, 201),
]


def test_other_sites_and_control_characters(database):
    """A POST of another site is refused, and a header is escaped in the log."""
    with serve("production", DATABASE=str(database), HOSTS="good.example") as server:
        for headers, status in SITES:
            lines = {"Host": "localhost", **headers, "Content-Length": "0"}
            with server.connect() as client:
                client.send("POST /events/a HTTP/1.1\r\n")
                client.send("".join(f"{k}: {v}\r\n" for k, v in lines.items()) + "\r\n")
                client.read_head()
                assert client.status == status, headers
        with server.connect() as client:
            client.socket.sendall(
                b"GET /events HTTP/1.1\r\nHost: x\r\nX-Client-ID: \x9b31mred\r\n\r\n"
            )
            client.block()
        server.await_log(r"Client \x9b31mred connected")
        server.await_log(r"Client \x9b31mred: disconnected")


@pytest.mark.parametrize(
    ("kind", "workers"), [("gunicorn-gevent", "2"), ("gunicorn-gthread", "1")]
)
def test_production_resumes(database, kind, workers):
    """What was missed comes first, then what is new; every worker has it all."""
    with serve("production", kind, "-w", workers, DATABASE=str(database)) as server:
        for word in ("one", "two", "three"):
            post(server, f"/events/{word}")
        for presented, expected in [("1", "2"), ("x", "1"), (None, "1")]:
            headers = {"X-Client-ID": f"after-{presented}"}
            if presented is not None:
                headers["Last-Event-ID"] = presented
            with server.get("/events", headers=headers) as client:
                assert client.block() == b": ok\n\n"
                assert next_event(client).id == expected
            server.await_log(f"Client after-{presented}: disconnected")
        with server.get("/events?last_event_id=2") as client:
            client.block()
            event = next_event(client)
            assert (event.id, event.event, event.data) == ("3", "update", "three")
            post(server, "/events/four")
            event = next_event(client)
            assert (event.id, event.event, event.data) == ("4", "update", "four")
        assert "Traceback" not in server.log()


def test_production_keeps_alive_when_idle(database):
    """A comment comes when no event has been sent for so long, not earlier."""
    idle = 0.3
    with (
        serve("production", DATABASE=str(database), KEEPALIVE=str(idle)) as server,
        server.connect() as client,
    ):
        wrote = asked = time.monotonic()
        client.request("GET", "/events")
        client.block()
        while time.monotonic() - asked < 4 * idle:
            now = time.monotonic()
            post(server, "/events/x")
            while (block := client.block()) == b": keepalive\n\n":
                assert time.monotonic() - wrote >= idle
            assert b"data: x" in block
            wrote = now
        assert client.block() == b": keepalive\n\n"
        assert time.monotonic() - wrote >= idle


def test_production_survives_its_source(database):
    """While the table is gone clients are told; afterwards nothing is missing."""
    with (
        serve("production", "gunicorn-gthread", DATABASE=str(database)) as server,
        server.get("/events") as client,
        contextlib.closing(sqlite3.connect(database)) as db,
    ):
        post(server, "/events/before")
        assert next_event(client).data == "before"
        db.execute("ALTER TABLE events RENAME TO elsewhere")
        event = next_event(client)
        assert event.event == "error"
        assert event.json() == {"error": "Temporary error, retrying"}
        server.await_log("Error fetching data: no such table: events")
        with db:
            db.execute("INSERT INTO elsewhere (data) VALUES ('after')")
        db.execute("ALTER TABLE elsewhere RENAME TO events")
        while event.event == "error":
            event = next_event(client)
        assert (event.id, event.data) == ("2", "after")


def test_sse_numbers():
    """1 to 5, the end; a browser that comes back gets 204 and stays away."""
    with serve("sse_numbers") as server:
        numbers = b": ok\n\n" + b"".join(b"data: %d\n\n" % i for i in range(1, 6))
        with server.get("/") as client:
            assert client.rest() == numbers
            assert client.is_whole
        headers = dict(EVENT_SOURCE)
        with server.get("/", headers=headers) as client:
            assert client.rest() == (
                numbers.replace(b": ok\n\n", b": ok\n") + b"id: syncstream-end\n\n"
            )
        headers["Last-Event-ID"] = "syncstream-end"
        with server.get("/", headers=headers) as client:
            client.read_head()
            assert client.status == 204


@pytest.mark.parametrize("kind", ["gunicorn-gevent", "gunicorn-gthread"])
def test_endless(kind):
    """It counts until the client leaves, and then no longer."""
    with serve("endless", kind) as server:
        with server.get("/endless") as client:
            client.block()
            for i in range(1, 8):
                assert client.block() == b"data: %d\n\n" % i
        server.await_log("Client 127.0.0.1: disconnected after ")
        assert "Traceback" not in server.log()


@pytest.mark.parametrize("kind", ["gunicorn-gevent", "gunicorn-gthread"])
def test_ndjson_rows(kind):
    """Each row leaves alone; a bad one is told by the last line."""
    first = b'{"time":"9:00","celsius":21.5}\n'
    with serve("ndjson_rows", kind) as server, server.get("/rows") as client:
        assert client.chunk() == first
        assert client.chunk() == b'{"time":"9:05","celsius":21.75}\n'
        last = json.loads(client.rest())
        assert last == {"error": "could not convert string to float: 'n/a'"}
        assert client.is_whole
        assert client.headers["content-type"] == "application/x-ndjson"
        server.await_log("the source of GET '/rows' failed")
    good = "time,celsius\n9:00,21.5"
    with (
        serve("ndjson_rows", kind, READINGS=good) as server,
        server.get("/rows") as client,
    ):
        assert client.rest() == first
        assert client.is_whole


def test_handwritten_is_opened():
    """The head and a comment are there while the old view still sleeps."""
    with (
        serve("handwritten", INTERVAL=str(10 * TIMEOUT)) as server,
        server.get("/events") as client,
    ):
        assert client.block() == b": ok\n\n"
        assert client.headers["x-accel-buffering"] == "no"
        assert client.headers["cache-control"] == "no-cache, no-transform"


def test_handwritten_is_closed():
    """Its events pass as they are; it is closed when the client has left."""
    with serve("handwritten", "gunicorn-gthread") as server:
        with server.get("/events") as client:
            client.block()
            assert client.block() == b'id: 0\ndata: {"n": 0}\n\n'
            assert client.block() == b'id: 1\ndata: {"n": 1}\n\n'
        server.await_log("The old view is closed")
        assert "Traceback" not in server.log()


@pytest.mark.parametrize("kind", ["gunicorn-gevent", "gunicorn-gthread"])
def test_database(tmp_path, kind):
    """Ten streams, a pool of two, and none of its connections in use meanwhile."""
    url = f"sqlite:///{tmp_path / 'rows'}"
    threads = ["--threads", "16"] if kind == "gunicorn-gthread" else []
    with (
        serve("database", kind, *threads, URL=url) as server,
        contextlib.ExitStack() as stack,
    ):
        clients = [stack.enter_context(server.get("/events")) for _ in range(10)]
        assert [client.block() for client in clients] == [b": ok\n\n"] * 10
        for n in range(1, 4):
            post(server, f"/events/row{n}")
            expected = b"id: %d\ndata: row%d\n\n" % (n, n)
            assert [client.block() for client in clients] == [expected] * 10
            await_true(lambda: get_json(server, "/pool") == {"checked_out": 0})
        with server.get("/events", headers={"Last-Event-ID": "2"}) as client:
            assert client.block() == b": ok\n\n"
            assert client.block() == b"id: 3\ndata: row3\n\n"
        assert "Traceback" not in server.log()


FRAMEWORKS = ("bottle_app", "django_app", "falcon_app", "pyramid_app")


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_frameworks(name):
    """Five ticks, each with a name and an id, and the end of the response."""
    # Falcon has no HEAD unless it is asked for.
    method = "GET" if name == "falcon_app" else "HEAD"
    with serve(name, method=method) as server:
        with server.get(path_of(name)) as client:
            assert client.block() == b": ok\n\n"
            if name == "django_app":
                assert client.block() == b'data: {"path":"/events"}\n\n'
            for n in range(5):
                assert client.block() == (
                    b"id: %d\nevent: tick\ndata: tick %d\n\n" % (n, n)
                )
            assert client.rest() == b""
            assert client.is_whole
        if name == "django_app":
            with server.get("/countdown/3") as client:
                events = events_of(client.rest())
                assert [event.data for event in events] == ["3", "2", "1", "0"]
                assert client.headers["x-start"] == "3"
        if name == "bottle_app":
            with server.get("/rows") as client:
                assert client.rest() == b'{"row":0}\n{"row":1}\n{"row":2}\n'
