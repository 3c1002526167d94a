"""The demo, as its visitor sees it, and the command that serves it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

import syncstream
from syncstream.__main__ import main
from tests import ROOT
from tests.support.browser import await_page, chrome, evaluate, prefer, resize
from tests.support.live import EVENT_SOURCE, Client, free_port
from tests.support.waits import TIMEOUT, await_true

COMMAND = (sys.executable, "-m", "syncstream")
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}


class Demo:
    """The real command, in a process group of its own."""

    def __init__(self, log):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/"
        self._log = log
        self.start()

    def start(self, port=None):
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [*COMMAND, "demo", "--port", str(port or self.port)],
                stdout=log,
                stderr=log,
                env=ENV,
                start_new_session=True,
            )
        await_true(lambda: self.is_ready() or self.process.poll() is not None, self.log)

    def is_ready(self):
        try:
            with self.get("/health") as client:
                return b"200" in client.read_until(b"\r\n")
        except OSError:
            return False

    def get(self, path, method="GET", **options):
        client = Client(socket.create_connection(("127.0.0.1", self.port), TIMEOUT))
        client.request(method, path, **options)
        return client

    def log(self):
        return self._log.read_text()

    def send(self, number):
        os.killpg(self.process.pid, number)

    def close(self):
        self.stop()

    def stop(self, number=signal.SIGTERM):
        """End it, as one does; return its exit status."""
        with contextlib.suppress(ProcessLookupError):
            self.send(number)
        try:
            return self.process.wait(TIMEOUT)
        finally:
            with contextlib.suppress(ProcessLookupError):
                self.send(signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    with contextlib.closing(Demo(tmp_path_factory.mktemp("demo") / "log")) as demo:
        yield demo


@pytest.fixture(scope="module")
def driver():
    with chrome() as driver:
        yield driver


@pytest.fixture
def page(demo, driver):
    """The demo's page, in a window like a desktop's, live."""
    resize(driver, (1280, 800))
    driver.get(demo.url)
    driver.get_log("browser")  # what came before
    await_page(driver, "demo.state === 'live' && demo.points > 1", "demo")
    yield driver
    driver.get("about:blank")


OTHER_SITES = [
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:1"},
    {"Host": "evil.example"},
    {"Host": "evil.example:8000", "Origin": "http://evil.example:8000"},
    {"Host": "127.0.0.1.evil.example"},
]


def wave(demo, headers):
    """Wave as a page does; return the status."""
    lines = [f"{name}: {value}" for name, value in headers.items()]
    client = Client(socket.create_connection(("127.0.0.1", demo.port), TIMEOUT))
    with client:
        client.send("\r\n".join(["POST /wave HTTP/1.1", *lines, "", ""]))
        client.read_head()
        return client.status


@pytest.mark.parametrize("headers", OTHER_SITES, ids=str)
def test_other_sites_do_not_reach_it(demo, headers):
    """Not by their Origin, nor by a name that they have resolve to this machine."""
    assert wave(demo, {"Host": f"127.0.0.1:{demo.port}", **headers}) == 403


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "a.localhost"])
def test_its_own_page_reaches_it(demo, host):
    """By any address of this machine; a program says no Origin."""
    host = f"{host}:{demo.port}"
    assert wave(demo, {"Host": host, "Origin": f"http://{host}"}) == 204
    assert wave(demo, {"Host": host}) == 204


COLOURS = """
const { width, height } = canvas, found = {};
const dots = pen.getImageData(0, 0, width, height).data;
const keys = {};
for (const name of ["cpu", "memory", "walk"]) {
  found[name] = 0;
  keys[parseInt(colours[name].slice(1), 16)] = name;
}
for (let i = 0; i < dots.length; i += 4) {
  const name = keys[(dots[i] << 16) | (dots[i + 1] << 8) | dots[i + 2]];
  if (name && dots[i + 3] === 255) found[name] += 1;
}
return found;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_chart_is_drawn(page, tmp_path, scheme):
    """The page draws each series in its colour, in light and in dark."""
    prefer(page, scheme)
    await_page(page, "demo.points > 12", "demo")

    def is_drawn():
        drawn = page.execute_script(COLOURS)
        return {"cpu", "walk"} <= drawn.keys() and all(n > 40 for n in drawn.values())

    await_true(is_drawn, lambda: page.execute_script(COLOURS))
    picture = tmp_path / f"{scheme}.png"
    assert page.save_screenshot(str(picture))
    assert picture.stat().st_size > 20_000
    assert [e for e in page.get_log("browser") if e["level"] == "SEVERE"] == []


def test_the_page_comes_back_after_a_restart(demo, page):
    """The server restarts: the page reconnects by itself and ids go on."""
    before = evaluate(page, "({...demo, points: demo.points})")
    assert before["reconnections"] == 0
    assert int(before["lastId"]) == before["events"]
    assert demo.stop() == 0
    await_page(page, "demo.state === 'reconnecting'", "demo")
    assert evaluate(page, "document.querySelector('[aria-live]').textContent") == (
        "reconnecting"
    )
    lost = evaluate(page, "Number(demo.lastId)")
    assert lost >= before["events"]
    demo.start()
    await_page(page, f"demo.state === 'live' && demo.lastId >= {lost + 5}", "demo")
    assert evaluate(page, "demo.reconnections") >= 1
    # None was missed and none came twice.
    assert evaluate(page, "demo.events == demo.lastId")
    severe = [e for e in page.get_log("browser") if e["level"] == "SEVERE"]
    assert all("net::ERR_" in e["message"] for e in severe), severe


def test_the_server_drops_and_the_page_comes_back(page):
    """Drop connection: the server ends one stream, its browser goes on after it."""
    last = evaluate(page, "Number(demo.lastId)")
    page.execute_script("document.getElementById('drop').click()")
    await_page(page, "demo.reconnections === 1 && demo.state === 'live'", "demo")
    await_page(page, f"demo.lastId > {last + 4}", "demo")
    assert evaluate(page, "demo.events == demo.lastId")


def test_stop_and_start(demo, page):
    """Stop closes the connection, and the server sees it; start goes on after it."""
    with demo.get("/events") as other:
        while b"viewers" not in other.block():
            pass
        page.execute_script("document.getElementById('stop').click()")
        assert evaluate(page, "demo.state") == "stopped"
        assert evaluate(page, "source.readyState") == 2
        while b'event: viewers\ndata: {"count":1}' not in other.block():
            pass
    last = evaluate(page, "Number(demo.lastId)")
    page.execute_script("document.getElementById('stop').click()")
    await_page(page, f"demo.state === 'live' && demo.lastId > {last + 2}", "demo")
    assert evaluate(page, "demo.reconnections") == 0
    assert evaluate(page, "demo.events == demo.lastId")


def test_a_page_that_was_left_has_no_stream(demo, page):
    """Who goes to another page leaves at once, who comes back goes on.

    Else the browser's back/forward cache holds the stream for a minute.
    """
    last = evaluate(page, "Number(demo.lastId)")
    with demo.get("/events") as other:
        while b"viewers" not in other.block():
            pass
        page.get(f"{demo.url}health")
        while b'event: viewers\ndata: {"count":1}' not in other.block():
            pass
    page.back()
    await_page(page, "demo.state === 'live' && demo.points > 1", "demo")
    if evaluate(page, "demo.events == demo.lastId"):  # from the cache
        assert evaluate(page, "Number(demo.lastId)") >= last


def test_the_log_shows_events(demo, page):
    """The log shows name, id and data; a wave reaches every viewer."""
    rows = "[...document.querySelectorAll('#log li')].map((row) => row.innerText)"
    with demo.get("/wave", method="POST") as client:
        client.read_head()
        assert client.status == 204
    await_page(page, f"{rows}.some((t) => /^wave\\s+id \\d+\\s+{{.*}}$/.test(t))", rows)
    assert any(t.startswith("hello") for t in evaluate(page, rows))
    # A run of samples is one row.
    await_page(page, f"{rows}.some((t) => /^message \\S \\d+\\s+id /.test(t))", rows)
    assert evaluate(page, f"{rows}.length < demo.events")


def test_the_page_tells_how_to_curl(demo, page):
    """The line to copy is the stream's own address."""
    assert evaluate(page, "document.getElementById('curl').textContent") == (
        f"curl -N {demo.url}events"
    )


@pytest.mark.parametrize("width", [320, 390, 768])
def test_the_page_fits_a_phone(page, width):
    """Nothing is wider than the window."""
    resize(page, (width, 844))
    await_page(page, f"innerWidth === {width}", "innerWidth")
    assert evaluate(page, "document.documentElement.scrollWidth <= innerWidth")


def test_the_page_asks_nobody_else(page):
    """The page works without a network: it loads nothing from anywhere else."""
    origins = "performance.getEntriesByType('resource').map((e) => e.name)"
    assert evaluate(
        page, f"{origins}.filter((u) => !u.startsWith(location.origin))"
    ) in ([], ["data:"])


@pytest.mark.parametrize(
    ("id", "first"),
    [("41", 42), ("x", 1), ("-3", 1), ("9" * 5000, 1), ("٣", 1)],
    ids=["number", "text", "negative", "huge", "foreign-digits"],
)
def test_ids_go_on(demo, id, first):
    """The stream counts on from a Last-Event-ID, and is not upset by any other text."""
    with demo.get("/events", headers={"Last-Event-ID": id}) as client:
        assert client.block() == b": ok\n\n"
        assert client.block().startswith(f"id: {first}\nevent: hello\n".encode())
        assert client.block().startswith(f"id: {first + 1}\n".encode())


def test_samples(demo):
    """Each sample has its series, from 0 to 100."""
    with demo.get("/events") as client:
        samples = []
        while len(samples) < 3:
            block = client.block().decode()
            if "event: " not in block and "data: " in block:
                samples.append(json.loads(block.partition("data: ")[2]))
    for sample in samples:
        assert {"cpu", "walk"} <= sample.keys()
        assert all(0 <= value <= 100 for value in sample.values())


def test_listening_in_a_shell(demo):
    """`listen` prints each event once, over a drop; Ctrl-C ends it in silence."""
    command = [*COMMAND, "listen", f"{demo.url}events?client=shell", "--json"]
    with subprocess.Popen(command, stdout=-1, stderr=-1, env=ENV) as process:
        events = [json.loads(process.stdout.readline()) for _ in range(4)]
        with demo.get("/drop?client=shell", method="POST") as other:
            other.read_head()
            assert other.status == 204
        while events[-1]["event"] != "hello":
            events.append(json.loads(process.stdout.readline()))
        process.send_signal(signal.SIGINT)
        notes = process.stderr.read().decode().splitlines()
        assert process.wait(TIMEOUT) == 130
    assert [int(event["id"]) for event in events] == [*range(1, len(events) + 1)]
    assert events[0]["event"] == "hello"
    *_, last = events
    assert json.loads(last["data"])["after"] == len(events) - 1
    assert notes == [
        "-- connected to gunicorn",
        "-- retry: 1000 ms",
        "-- the server has ended the response;"
        f" reconnecting after id {len(events) - 1}",
        "-- connected again to gunicorn",
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it(tmp_path, number):
    """Ctrl-C and SIGTERM end the server, its streams too, in good order."""
    demo = Demo(tmp_path / "log")
    with (
        contextlib.closing(demo),
        demo.get("/events", headers=EVENT_SOURCE) as client,
    ):
        client.chunk()
        assert demo.stop(number) == 0
        client.rest()
        assert client.is_whole
    assert demo.log().count("\n") == 1, demo.log()


def test_a_port_in_use(demo):
    """A busy port is one line, and no server."""
    done = run("demo", "--port", str(demo.port))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert f"port {demo.port} of 127.0.0.1: Address already in use" in done.stderr


def run(*words):
    return subprocess.run(
        [*COMMAND, *words], capture_output=True, text=True, env=ENV, timeout=TIMEOUT
    )


def test_version():
    """--version says which version this is."""
    assert run("--version").stdout == f"syncstream {syncstream.__version__}\n"


def test_help():
    """Without a command there is help, and that is no error."""
    done = run()
    assert done.returncode == 0
    assert done.stdout == run("--help").stdout
    assert "demo" in done.stdout


def test_console_script():
    """The entry point of setup.cfg is there."""
    text = (ROOT / "setup.cfg").read_text()
    assert "syncstream = syncstream.__main__:main" in text


@pytest.mark.parametrize("port", ["65536", "-1", "http", "\uff18\uff10"])
def test_a_port_that_is_none(port, capsys):
    """What is no port number is refused with the reason."""
    with pytest.raises(SystemExit, match="2"):
        main(["demo", f"--port={port}"])
    assert f"must be 0 to 65535, got {port!r}" in capsys.readouterr().err


def test_an_unknown_host(capsys):
    """A host that is not this machine is one line."""
    assert main(["demo", "--host", "192.0.2.1"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_missing_extra(tmp_path):
    """What is not installed is named, with the command that installs it."""
    code = (
        "import sys, syncstream.__main__ as m; find = m.find_spec\n"
        "m.find_spec = lambda n: None if n in ('flask', 'gevent') else find(n)\n"
        "sys.exit(m.main(['demo']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENV
    )
    assert done.returncode == 1
    assert done.stderr == (
        "syncstream: the demo needs flask, gevent:"
        " pip install 'syncstream-wsgi[demo]'\n"
    )
