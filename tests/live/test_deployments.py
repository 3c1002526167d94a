"""The promises of a stream in the ways that people deploy it: a table of them.

`DEPLOYMENTS` are the rows, `PROMISES` the columns; docs/deployments.md shows what came
of each. A row is one real server for all its promises, the stop last. No stream is lost
without a sign: a response is whole with all its rows, or visibly cut, or it is that of
an EventSource, which comes back.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from celery import Celery

from syncstream import Hub
from syncstream.protocol import sse
from tests import ROOT
from tests.support.live import LiveServer, unique_key
from tests.support.nginx import Nginx
from tests.support.programs import lack, program
from tests.support.redis_server import RedisServer
from tests.support.waits import TIMEOUT, await_true

pytestmark = pytest.mark.matrix

GRACE = 10  # seconds: --graceful-timeout
DRAIN = 2  # seconds that finite work runs on when the server is told to stop
# Not told, that is as long as --graceful-timeout allows, of what `docker stop` waits.
CONTAINER_GRACE, KILL_AFTER = 8, 10

EVENT_SOURCE = {"Accept": "text/event-stream", "Cache-Control": "no-cache"}
FETCH = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
# Each kind of response: method, path and headers of its request.
KINDS = {
    "sse": ("GET", "/sse", EVENT_SOURCE),
    "fetch": ("GET", "/sse", FETCH),
    "post": ("POST", "/sse", {**FETCH, "Content-Length": "2"}),
    "ndjson": ("GET", "/ndjson", {}),
    "raw": ("GET", "/raw", {}),
    "events": ("GET", "/events", EVENT_SOURCE),
    "lines": ("GET", "/lines", {}),
    "plain": ("GET", "/plain", {}),
}
FINITE = ("fetch", "post", "ndjson", "raw")  # generators whose clients do not come back
GENERATORS = ("sse", *FINITE)
SUBSCRIPTIONS = ("events", "lines")
SHORT = {"rows": 6, "pause": 0.1}  # done within DRAIN
ENDLESS = {"pause": 0.05}
ROW = re.compile(rb"row (\d+)")


def script(name):
    """Return a command of the environment that runs the tests."""
    return str(Path(sys.executable).with_name(name))


@dataclass(frozen=True)
class Deployment:
    """One way to serve an application.

    Attributes:
        kind: One of live.SERVERS.
        app: The application, under tests/.
        options: More words for the server.
        env: More environment variables.
        before: What runs the server's command.
        nginx: What its location says; ``{port}`` and ``{folder}`` are the server's.
        agent: A name of apps/deploy.py's AGENTS, that watches all requests.
        promises: Names of `PROMISES`.
    """

    kind: str = "gunicorn-gthread"
    app: str = "tests.apps.deploy_flask:app"
    options: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    before: tuple[str, ...] = ()
    nginx: str | None = None
    agent: str = "none"
    promises: tuple[str, ...] = ("pieces", "leave", "keepalive", "left", "stopped")


ALL = ("pieces", "leave", "keepalive", "left", "replaced", "stopped")
BEHIND_A_PROXY = ("pieces", "slow", "leave", "keepalive", "left", "stopped")
# It makes what it runs PID 1 of a namespace, as containers do. Not only root may.
CONTAINER = (
    *("unshare", "--user", "--map-root-user"),
    *("--pid", "--fork", "--mount-proc", "--kill-child"),
)
NEW_RELIC = {
    "agent": "newrelic",
    "before": (script("newrelic-admin"), "run-program"),
}
DEPLOYMENTS = {
    "gunicorn-sync": Deployment("gunicorn-sync", promises=ALL),
    "gunicorn-gthread": Deployment(promises=ALL, env={"MIDDLEWARE": "1"}),
    "gunicorn-gevent": Deployment(
        "gunicorn-gevent", promises=ALL, env={"MIDDLEWARE": "1"}
    ),
    "preload": Deployment(options=("--preload",), promises=("left", "replaced")),
    "container": Deployment(
        options=("--graceful-timeout", str(CONTAINER_GRACE)),
        before=CONTAINER,
        promises=("pieces", "left", "stopped"),
    ),
    "nginx-tcp": Deployment(
        nginx="proxy_pass http://127.0.0.1:{port};", promises=BEHIND_A_PROXY
    ),
    "nginx-unix": Deployment(
        "gunicorn-gevent",
        nginx="proxy_pass http://unix:{folder}/socket:; proxy_http_version 1.1;",
        promises=BEHIND_A_PROXY,
    ),
    "new-relic-gthread": Deployment(**NEW_RELIC),
    "new-relic-gevent": Deployment("gunicorn-gevent", **NEW_RELIC),
    "sentry": Deployment("gunicorn-gevent", agent="sentry", env={"MIDDLEWARE": "1"}),
    "opentelemetry": Deployment(
        agent="opentelemetry",
        before=(script("opentelemetry-instrument"),),
        env={"MIDDLEWARE": "1"},
    ),
    "django": Deployment(
        app="tests.apps.deploy_django:app", env={"MIDDLEWARE": "1"}, promises=ALL
    ),
    # Its views are loaded by a worker's first request, and no middleware is installed.
    "django-fresh": Deployment(
        app="tests.apps.deploy_django:app",
        options=("--graceful-timeout", "60"),
        promises=("first_stream", "first_subscriber", "first_head", "first_burst"),
    ),
    **{
        f"max-requests-{kind}": Deployment(
            f"gunicorn-{kind}", options=("--max-requests", "3"), promises=("recycled",)
        )
        for kind in ("sync", "gthread", "gevent")
    },
    "reload": Deployment(
        options=(
            *("--graceful-timeout", "60"),
            *("--reload", "--reload-extra-file", "{folder}/extra"),
        ),
        promises=("reloaded",),
    ),
}


def need_namespaces():
    """Skip where this system lets nobody be PID 1; in CI that fails."""
    program("unshare", "util-linux")
    done = subprocess.run([*CONTAINER, "true"], capture_output=True, text=True)
    if done.returncode:
        lack(f"no namespaces for processes here: {done.stderr.strip()}")


class Site:
    """A deployment that runs.

    Attributes:
        server: Its `LiveServer`.
        hub: The channels of its workers, of this ``url``.
        folder: Its own; touch ``extra`` in it for a reload.
    """

    def __init__(self, deployment):
        self.deployment = deployment
        if deployment.before == CONTAINER:
            need_namespaces()
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="deploy-"))
            self.url = f"local:{folder}/hub"
            self.hub = stack.enter_context(contextlib.closing(Hub(self.url)))
            words = ["--graceful-timeout", str(GRACE), "-b", f"unix:{folder}/socket"]
            if deployment.kind == "gunicorn-gthread":
                words += ["--threads", "20"]
            words += deployment.options
            Path(folder, "extra").touch()
            env = {"HUB_URL": self.url, "AGENT": deployment.agent, **deployment.env}
            if deployment.before != CONTAINER:
                env["SYNCSTREAM_DRAIN"] = str(DRAIN)
            self.server = self._front = LiveServer(
                deployment.kind,
                deployment.app,
                *(word.format(folder=folder) for word in words),
                env={**env, **agent_settings(deployment.agent, Path(folder))},
                before=deployment.before,
            )
            stack.enter_context(self.server)
            self.folder = Path(folder)
            if deployment.nginx:
                settings = deployment.nginx.format(port=self.server.port, folder=folder)
                self._front = stack.enter_context(Nginx(location(settings)))
            self._stack = stack.pop_all()
        self.control = self.server.control
        # Lines are not handed over: a sync worker would serve nobody else.
        is_sync = deployment.kind == "gunicorn-sync"
        self.subscriptions = ("events",) if is_sync else SUBSCRIPTIONS

    def connect(self):
        return self._front.connect()

    def ask(self, kind, client=None, **query):
        """Return a client that has asked for a kind of response."""
        method, path, headers = KINDS[kind]
        text = "&".join(f"{name}={value}" for name, value in query.items())
        client = client or self.connect()
        client.request(method, f"{path}?{text}", headers=headers)
        if method == "POST":
            client.send("{}")
        return client

    def facts(self):
        """Return what a worker holds, as apps/deploy.py tells it."""
        with self.server.get("/facts", headers={"Connection": "close"}) as client:
            text = client.rest()
        assert client.status == 200, text
        return json.loads(text)

    def main(self):
        """Return the process that operators signal: what ``unshare`` runs, or ours."""
        process = psutil.Process(self.server.pid)
        if self.deployment.before[:1] == ("unshare",):
            (process,) = process.children()
        return process

    def workers(self):
        return self.main().children()

    def is_running(self):
        return self.server.is_running()

    def close(self):
        self._stack.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()


def location(settings):
    """Return nginx' part of a deployment."""
    # A small buffer, so that its clients are heard of each few kilobytes.
    listen = "listen 127.0.0.1:$PORT sndbuf=64k"
    return f"server {{ {listen}; location / {{ {settings} }} }}"


def agent_settings(agent, folder):
    """Return the environment of an agent that sends nothing anywhere."""
    if agent == "newrelic":
        config = folder / "newrelic.ini"
        config.write_text(
            "[newrelic]\n"
            f"license_key = {40 * '0'}\n"
            "app_name = deployments\n"
            "developer_mode = true\n"  # it believes to talk to its service
            "startup_timeout = 15.0\n"  # requests wait until they are watched
            "log_level = error\n"
        )
        return {"NEW_RELIC_CONFIG_FILE": str(config)}
    if agent == "opentelemetry":
        names = ("TRACES", "METRICS", "LOGS")
        return {f"OTEL_{name}_EXPORTER": "none" for name in names}
    return {}


class Answer(threading.Thread):
    """A request, and its response read to the end in a thread of its own.

    Args:
        site: Where it goes.
        kind: One of `KINDS`.
        is_frozen: Read nothing after the first row until `thaw` is called.
        query: Says what the response is made of; see apps/deploy.py.

    Attributes:
        text: What has come of the body.
        is_whole: Its end was marked.
        ended: When that was.
    """

    def __init__(self, site, kind, *, is_frozen=False, **query):
        super().__init__(name=kind, daemon=True)
        self.kind, self.query = kind, query
        self.key = unique_key()
        self.text, self.status, self.is_whole = b"", 0, False
        self.ended = None
        self._site = site
        self._has_begun = threading.Event()
        self._may_go_on = threading.Event()
        if not is_frozen:
            self.thaw()
        self.start()

    def thaw(self):
        self._may_go_on.set()

    def run(self):
        try:
            with self._site.ask(self.kind, key=self.key, **self.query) as client:
                client.socket.settimeout(3 * TIMEOUT)
                client.read_head()
                self.status = client.status
                while chunk := client.chunk():
                    self.text += chunk
                    if ROW.search(self.text):
                        self._has_begun.set()
                        self._may_go_on.wait()
                self.is_whole = client.is_whole
        except (ConnectionError, EOFError):
            pass  # is cut, and is not whole
        finally:
            self.ended = time.monotonic()
            self._has_begun.set()

    def await_first(self):
        """Wait for the first row."""
        assert self._has_begun.wait(2 * TIMEOUT), self
        assert ROW.search(self.text), (self, self.status, self.text)
        return self

    def await_end(self):
        self.join(3 * TIMEOUT)
        assert not self.is_alive(), self
        return self

    @property
    def rows(self):
        """The numbers of the rows that have come whole, or as far as they came."""
        return [int(number) for number in ROW.findall(self.text)]

    def __repr__(self):
        seen = f"{len(self.rows)} rows, whole: {self.is_whole}, {self.text[-80:]!r}"
        return f"<{self.kind} {self.query}: {seen}>"


def load(site, one="raw", what=SHORT):
    """Return answers of all kinds that run; the subscribers have three rows.

    A sync worker has but ``one`` generator, made of ``what``.
    """
    channel = unique_key()
    site.hub.publish_many(channel, [f"row {n}" for n in range(3)])
    answers = [Answer(site, kind, channel=channel) for kind in 2 * site.subscriptions]
    for answer in answers:
        answer.await_first()
    if site.deployment.kind == "gunicorn-sync":  # it serves one beside them
        return [*answers, Answer(site, one, **what).await_first()]
    answers += [Answer(site, kind, **ENDLESS) for kind in GENERATORS]
    answers += [Answer(site, "raw", is_frozen=True, size=50_000)]
    for answer in answers:
        answer.await_first()
    # Last: they are to be under way when the server is told.
    short = [Answer(site, kind, **SHORT) for kind in FINITE]
    for answer in short:
        answer.await_first()
    plain = Answer(site, "plain", **SHORT)
    site.control.next(f"{plain.key}-began")
    return [*answers, *short, plain]


def check(site, answers, told):
    """See what became of answers whose server was told to stop at a time."""
    for answer in answers:
        answer.await_end()
    come_back, drained = [], []
    for answer in answers:
        assert answer.rows == list(range(len(answer.rows))), answer
        if answer.kind in ("sse", "events"):
            assert answer.is_whole, answer
            assert b"syncstream-end" not in answer.text, answer
            come_back.append(answer.ended)
        elif answer.kind in SUBSCRIPTIONS:
            assert not answer.is_whole, answer
            come_back.append(answer.ended)
        elif "rows" in answer.query:
            assert answer.is_whole, answer
            assert len(answer.rows) == SHORT["rows"], answer
        else:
            assert not answer.is_whole, answer
            if "size" not in answer.query:
                drained.append(answer.ended)
        if answer.kind in GENERATORS:
            how = site.control.next(f"{answer.key}-ended")
            assert (how == "finished") == ("rows" in answer.query), (how, answer)
    if drained:
        assert max(come_back) < min(drained)
        assert min(drained) - told > DRAIN - 1


# What each promise is: a function of the site.


def pieces(site):
    """Each piece arrives before the next is made, and the end is marked."""
    for kind in GENERATORS:
        key = unique_key()
        with site.ask(kind, key=key, gated=1, rows=3) as client:
            text = b""
            for n in range(3):
                site.control.open(key)
                while b"row %d" % n not in text:
                    chunk = client.chunk()
                    assert chunk, (kind, text)
                    text += chunk
            client.rest()
            assert client.is_whole, kind
        assert site.control.next(f"{key}-ended") == "finished"
    channel = unique_key()
    for kind in site.subscriptions:
        with site.ask(kind, channel=channel) as client:
            text = b""
            for n in range(3):
                site.hub.publish(channel, f"row {n}") if kind == "events" else None
                while b"row %d" % n not in text:
                    chunk = client.chunk()
                    assert chunk, (kind, text)
                    text += chunk


def slow(site):
    """Who reads slowly, but reads, is not dropped: for twice the send_timeout here."""
    key, size, rows = unique_key(), 50_000, 40
    with site.connect() as client:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32_000)
        site.ask("raw", client, key=key, size=size, rows=rows, send_timeout=1)
        client.read_head()
        begun, got = time.monotonic(), 0
        while chunk := client.chunk():
            got += len(chunk)
            # So many bytes a second, without a longer pause.
            while time.monotonic() - begun < got / 1_000_000:
                time.sleep(0.01)
        assert client.is_whole
    assert got > rows * size
    assert site.control.next(f"{key}-ended") == "finished"


def leave(site):
    """A client that leaves an idle stream ends it at once."""
    for kind in GENERATORS:
        leave_one(site, kind)
    channel = unique_key()
    site.hub.publish(channel, "row 0")
    for kind in site.subscriptions:
        with site.ask(kind, channel=channel) as client:
            while b"row 0" not in client.chunk():
                pass
            await_true(lambda: site.facts()["open"] == 1)
        await_true(lambda: site.facts()["open"] == 0)


def leave_one(site, kind):
    key = unique_key()
    with site.ask(kind, key=key, pause=1000) as client:
        while b"row 0" not in client.chunk():
            pass
    assert site.control.next(f"{key}-ended") != "finished", kind


def keepalive(site):
    """A comment breaks the silence of a generator that blocks, and of a channel."""
    for kind in ("sse", "post", "events"):
        key = unique_key()
        query = {"key": key, "gated": 1, "channel": key, "keepalive": 0.25}
        text = b""
        try:
            with site.ask(kind, **query) as client:
                while text.count(b": keepalive\n") < 2:
                    chunk = client.chunk()
                    assert chunk, (kind, text)
                    text += chunk
        finally:
            # As often as it asks until its client's departure is noticed.
            site.control.open(key, 1_000_000)


def left(site):
    """Streams of all kinds and ends leave no place, thread or descriptor behind."""
    agent = site.facts()["agent"]
    assert agent is (None if site.deployment.agent == "none" else True)
    held = [round_of(site) for _ in range(3)]  # the first begins threads that stay

    def is_left():
        facts = site.facts()
        return any(facts[name] > held[0][name] for name in ("threads", "fds", "open"))

    await_true(lambda: not is_left(), lambda: held)


def round_of(site):
    """Have streams of all kinds, whole and left; return what is held after them."""
    channel = unique_key()
    site.hub.publish(channel, "row 0")
    whole = [Answer(site, kind, rows=2) for kind in (*GENERATORS, "plain")]
    gone = []
    for kind in (*GENERATORS, *site.subscriptions):
        key = unique_key()
        with site.ask(kind, key=key, pause=1000, channel=channel) as client:
            while b"row 0" not in client.chunk():
                pass
        if kind in GENERATORS:
            gone.append(key)
    for answer in whole:
        answer.await_end()
        assert (answer.is_whole, answer.rows) == (True, [0, 1]), answer
    for key in gone:
        site.control.next(f"{key}-ended")
    await_true(lambda: site.facts()["open"] == 0)
    return site.facts()


def replaced(site):
    """On SIGHUP a new worker takes over, and nothing is lost without a sign."""
    (old,) = site.workers()
    answers = load(site)
    told = time.monotonic()
    site.main().send_signal(signal.SIGHUP)
    await_true(lambda: not old.is_running())
    thaw(answers)
    check(site, answers, told)
    resume(site, answers)
    await_true(lambda: site.facts()["open"] == 0)


def thaw(answers):
    for answer in answers:
        answer.thaw()


def resume(site, answers):
    """An EventSource that was told to come back gets what has come since."""
    (answer, *_) = [answer for answer in answers if answer.kind == "events"]
    last = list(sse.Decoder().feed(answer.text))[-1].id
    channel = answer.query["channel"]
    site.hub.publish(channel, "row 3")
    with site.connect() as client:
        headers = {**EVENT_SOURCE, "Last-Event-ID": last}
        client.request("GET", f"/events?channel={channel}", headers=headers)
        text = b""
        while not ROW.search(text):
            text += client.chunk()
    assert ROW.findall(text) == [b"3"]


def stopped(site):
    """On SIGTERM nothing is lost without a sign, and the server goes in time."""
    limit = GRACE
    if site.deployment.before == CONTAINER:
        limit = KILL_AFTER
    answers = load(site, "sse", ENDLESS)
    told = time.monotonic()
    site.main().send_signal(signal.SIGTERM)
    status = site.server.wait(limit)  # else TimeoutExpired, or SIGKILL
    thaw(answers)
    check(site, answers, told)
    assert status == 0
    assert site.server.tracebacks() == 0, site.server.log()


def fresh(site):
    """Have a worker that has answered no request."""
    (old,) = site.workers()
    site.main().send_signal(signal.SIGHUP)
    await_true(lambda: not old.is_running())


def first_stream(site):
    """A stream that is a worker's first request is ended when its client leaves."""
    fresh(site)
    leave_one(site, "sse")


def first_subscriber(site):
    """A subscriber that is a worker's first request holds no thread."""
    fresh(site)
    channel = unique_key()
    site.hub.publish(channel, "row 0")
    with site.ask("events", channel=channel) as client:
        while b"row 0" not in client.chunk():
            pass
        await_true(lambda: site.facts()["attached"] == 0)
        await_true(lambda: site.facts()["open"] == 1)
    await_true(lambda: site.facts()["open"] == 0)


def first_head(site):
    """A HEAD of a stream, as health checks send it, changes nothing of that."""
    fresh(site)
    with site.connect() as client:
        client.request("HEAD", f"/sse?key={unique_key()}")
        assert b"text/event-stream" in client.read_until(b"\r\n\r\n").lower()
    leave_one(site, "sse")


def first_burst(site):
    """Streams that come at once to a fresh worker all end when it is to go."""
    fresh(site)
    answers = [Answer(site, "sse", pause=1000) for _ in range(6)]
    for answer in answers:
        answer.await_first()
    fresh(site)
    for answer in answers:
        assert answer.await_end().is_whole
        assert site.control.next(f"{answer.key}-ended") != "finished"


def recycled(site):
    """Workers that go after three requests leave each response whole.

    One after another, then all at once; a subscriber is told to come back.
    """
    channel = unique_key()
    follower = Follower(site, channel)
    kinds = ("raw", "post", "ndjson", "fetch")
    answers = []
    for n, kind in enumerate(kinds):
        answers.append(Answer(site, kind, rows=20, pause=0.02).await_end())
        site.hub.publish(channel, f"row {n}")
    answers += [Answer(site, kind, rows=20, pause=0.02) for kind in kinds]
    for answer in answers:
        answer.await_end()
        assert (answer.is_whole, answer.rows) == (True, list(range(20))), answer
    site.hub.publish(channel, "row 4")
    assert follower.rows_at(5) == [0, 1, 2, 3, 4]
    pids = {site.control.next(f"{answer.key}-began") for answer in answers}
    assert len(pids) > 1


class Follower(threading.Thread):
    """An EventSource of a channel, that comes back whenever it is told to, or cut."""

    def __init__(self, site, channel):
        super().__init__(daemon=True)
        self._site, self._channel = site, channel
        self.rows, self._last = [], None
        self._client = None
        self._is_over = False
        self.start()

    def run(self):
        while not self._is_over:
            with contextlib.suppress(ConnectionError, EOFError):
                self._follow()

    def _follow(self):
        headers = dict(EVENT_SOURCE)
        if self._last is not None:
            headers["Last-Event-ID"] = self._last
        with self._site.connect() as self._client:
            path = f"/events?channel={self._channel}"
            self._client.request("GET", path, headers=headers)
            while block := self._client.block():
                for event in sse.Decoder().feed(block):
                    assert event.event is None, event
                    self._last = event.id
                    self.rows.append(int(event.data.removeprefix("row ")))

    def rows_at(self, count):
        """Wait for so many rows; go, and return those that have come."""
        await_true(lambda: len(self.rows) >= count, lambda: self.rows)
        return self.leave()

    def leave(self):
        """Go, and return the rows that have come."""
        self._is_over = True
        with contextlib.suppress(OSError):
            self._client.socket.shutdown(socket.SHUT_RDWR)
        self.join(TIMEOUT)
        assert not self.is_alive()
        return self.rows


def reloaded(site):
    """When the code has changed streams are cut at once, so that all can tell."""
    (old,) = site.workers()
    answers = load(site)
    (site.folder / "extra").touch()
    # By the clock of files: what is as old as the last look has not changed.
    later = time.time() + 10
    os.utime(site.folder / "extra", (later, later))
    await_true(lambda: not old.is_running())  # not after --graceful-timeout
    thaw(answers)
    for answer in answers:
        answer.await_end()
        assert answer.rows == list(range(len(answer.rows))), answer
        if answer.kind in ("sse", "events"):
            assert b"syncstream-end" not in answer.text, answer
        elif answer.is_whole:
            assert len(answer.rows) == answer.query.get("rows"), answer
        if answer.kind in GENERATORS:
            site.control.next(f"{answer.key}-ended")
    resume(site, answers)


PROMISES = {
    one.__name__: one
    for one in (
        *(pieces, slow, leave, keepalive, left, replaced, stopped),
        *(first_stream, first_subscriber, first_head, first_burst),
        *(recycled, reloaded),
    )
}


@pytest.fixture(scope="module")
def running():
    """The site of one row at a time, for those of its promises that follow."""
    sites = {}

    def run(row):
        if row not in sites or not sites[row].is_running():
            close()
            sites[row] = Site(DEPLOYMENTS[row])
        return sites[row]

    def close():
        for site in sites.values():
            site.close()
        sites.clear()

    yield run
    close()


@pytest.mark.parametrize(
    ("row", "promise"),
    [
        (row, promise)
        for row, deployment in DEPLOYMENTS.items()
        for promise in deployment.promises
    ],
    ids=lambda value: value,
)
def test_a_deployment_keeps_a_promise(running, row, promise):
    """Each row of the table; `PROMISES` says what its columns mean."""
    PROMISES[promise](running(row))


@pytest.fixture
def celery():
    """Return what runs a Celery worker of two processes in a `Site`."""
    with contextlib.ExitStack() as stack:

        def run(site, redis):
            log = stack.enter_context(tempfile.TemporaryFile())
            words = ("worker", "-c", "2", "-l", "warning")
            worker = subprocess.Popen(
                [script("celery"), "-A", "tests.apps.deploy_celery", *words],
                env={
                    **os.environ,
                    "PYTHONPATH": str(ROOT),
                    "CONTROL": str(site.control.port),
                    "BROKER_URL": redis.url,
                    "HUB_URLS": f"{site.url} {redis.url}",
                },
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

            def end():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()

            stack.callback(end)
            return worker

        yield run


def test_celerys_processes_publish(running, celery):
    """Each event once, from all processes; a stop loses none.

    The hubs are the module's, and were used before the processes were forked.
    """
    site = running("gunicorn-gthread")
    with (
        RedisServer() as redis,
        contextlib.closing(Hub(redis.url)) as hub,
        Celery(broker=redis.url) as app,
    ):
        worker = celery(site, redis)
        channel = unique_key()
        follower = Follower(site, channel)

        def send(number, gated=False):
            args = (channel, f"row {number}", gated)
            app.send_task("tests.apps.deploy_celery.publish", args)

        for number in range(40):
            send(number, gated=number < 2)
        # Now each process has a task.
        pids = {site.control.next(f"{channel}-began", 2 * TIMEOUT) for _ in range(2)}
        site.control.open(channel, 2)
        held = {}
        for _ in range(40):
            pid, *what = site.control.next(f"{channel}-held", 2 * TIMEOUT)
            held.setdefault(pid, []).append(what)
        assert held.keys() == pids
        for whats in held.values():  # the first task opens what stays
            assert whats == [whats[0]] * len(whats), held
        # These are under way, or wait for that, when it is told.
        for number in range(40, 50):
            send(number, gated=True)
        for _ in range(2):
            site.control.next(f"{channel}-began")
        children = psutil.Process(worker.pid).children(recursive=True)
        worker.send_signal(signal.SIGTERM)
        site.control.open(channel, 10)
        assert worker.wait(2 * TIMEOUT) == 0
        assert not any(child.is_running() for child in children)
        # A task that is published but not yet acknowledged is in the queue, too.
        with redis.client() as client:
            queue = b"".join(client.lrange("celery", 0, -1) + client.hvals("unacked"))
        waiting = {int(number) for number in ROW.findall(queue)}
        await_true(lambda: waiting.union(follower.rows) == set(range(50)))
        rows = follower.leave()
        assert len(rows) >= 42
        assert sorted(set(rows)) == sorted(rows)
        subscription = hub.subscribe(channel, after="start")
        told = [event.data for event in subscription.read(TIMEOUT)]
        assert sorted(told) == sorted(f"row {number}" for number in rows)
        subscription.close()
