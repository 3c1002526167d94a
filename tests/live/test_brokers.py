"""Several workers share their channels: each broker, behind each way of serving.

Real servers of four processes, each with clients of its own, and real engines.
Subscribers are handed over, or hold a thread or a greenlet; a sync worker has none to
hold, so there they are handed over.
"""

import contextlib
import json
import os
import signal
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import psutil
import pytest

from syncstream import Hub
from syncstream.errors import Unavailable, Uncertain
from syncstream.protocol import sse
from tests.support.live import LiveServer, unique_key
from tests.support.postgresql_server import PostgreSQL
from tests.support.redis_server import RedisServer
from tests.support.waits import TIMEOUT, await_true

pytestmark = pytest.mark.matrix  # WAYS of serving by brokers

LIMIT = 2 * TIMEOUT
PROCESSES, EACH = 4, 3  # workers, and the clients of each
WAYS = {
    "sync": ("gunicorn-sync", True),
    "gthread": ("gunicorn-gthread", True),
    "gevent": ("gunicorn-gevent", True),
    "gthread-attached": ("gunicorn-gthread", False),
    "gevent-attached": ("gunicorn-gevent", False),
}
EVENT_SOURCE = {"Accept": "text/event-stream", "Cache-Control": "no-cache"}


@dataclass
class Engine:
    """What a hub's URL leads to.

    Attributes:
        listeners: Counts the connections, or sockets, of those that listen.
        restart: Ends it by a signal, and starts it again.
    """

    url: str
    listeners: Any
    restart: Any = None


@contextlib.contextmanager
def local():
    with tempfile.TemporaryDirectory(prefix="syncstream-") as folder:
        wake = f"{folder}/log/wake"
        yield Engine(f"local:{folder}/log", lambda: len(os.listdir(wake)))


@contextlib.contextmanager
def redis():
    with RedisServer("--appendonly", "yes", "--appendfsync", "always") as server:
        yield Engine(server.url, lambda: len(server.listeners()), server.restart)


@contextlib.contextmanager
def postgresql():
    def listeners():
        ((count,),) = server.execute(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE application_name = 'syncstream' AND query ILIKE '%tail%'"
        )
        return count

    def restart(number):
        (server.kill if number == signal.SIGKILL else server.stop)()
        server.start()

    with PostgreSQL() as server:
        yield Engine(server.url, listeners, restart)


BROKERS = {"local": local, "redis": redis, "postgresql": postgresql}


@pytest.fixture(scope="module", params=BROKERS)
def engine(request):
    with BROKERS[request.param]() as engine:
        yield engine


@pytest.fixture(scope="module", params=WAYS)
def site(request, engine):
    """A server of four processes that share a hub; nothing it did may have failed."""
    kind, is_handed_over = WAYS[request.param]
    # Those that a test stops are not to be replaced.
    words = ["-w", str(PROCESSES), "--timeout", "120"]
    if kind == "gunicorn-gthread":
        words += ["--threads", "20"]
    with LiveServer(
        kind, "tests.apps.broker_app:wrapped", *words, env={"HUB_URL": engine.url}
    ) as site:
        site.is_handed_over = is_handed_over
        yield site
        assert site.tracebacks() == 0, site.log()


@pytest.fixture
def channel():
    return unique_key()


class Follower(threading.Thread):
    """An event source that resumes whenever it is cut off, and knows by which process.

    Attributes:
        got: Id and data of each event.
        pids: Who has served it.
    """

    def __init__(self, site, channel):
        super().__init__()
        self.got = []
        self.pids = []
        self.resets = 0
        self._site = site
        attached = "" if site.is_handed_over else "&attached=1"
        self._path = f"/sse/{channel}?after=start&who={channel}{attached}"
        self._last = None
        self._client = None
        self._is_over = False
        self.start()

    def run(self):
        while not self._is_over:
            try:
                self._follow()
            except (OSError, EOFError):
                time.sleep(0.02)

    def _follow(self):
        headers = dict(EVENT_SOURCE)
        if self._last is not None:
            headers["Last-Event-ID"] = self._last
        with self._site.get(self._path, headers=headers) as client:
            self._client = client
            client.read_head()
            client.socket.settimeout(None)  # it may be silent; `close` ends it
            self.pids.append(int(client.headers["x-pid"]))
            while not self._is_over and (block := client.block()):
                for event in sse.Decoder().feed(block):
                    self._last = event.id
                    if event.event == "reset":
                        self.resets += 1
                    else:
                        self.got.append((event.id, event.data))

    @property
    def data(self):
        return [data for _, data in self.got]

    def got_until(self, data):
        """Return what it has got up to an event; what was in doubt may follow."""
        return self.got[: self.data.index(data) + 1]

    def close(self):
        self._is_over = True
        with contextlib.suppress(OSError, AttributeError):
            self._client.socket.shutdown(2)
        self.join(LIMIT)
        assert not self.is_alive()


def ask(site, method, path, text=""):
    """Make a request; return which process has answered, and its JSON.

    Raises:
        OSError, EOFError: It has ended before it had answered.
    """
    body = text.encode()
    with site.connect() as client:
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        client.socket.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
        client.socket.sendall(body)
        answer = client.rest()
        if not client.is_whole:
            raise EOFError("the process has ended")
        assert client.status == 200, answer
        return int(client.headers["x-pid"]), json.loads(answer)


def post(site, channel, *items):
    """Publish, by whichever process takes the request; return that, and the ids."""
    return ask(site, "POST", f"/publish/{channel}", json.dumps(items))


@contextlib.contextmanager
def stopped(*pids):
    """Stop processes for a while; yield what stops one more.

    Which process takes a connection is the kernel's choice, of those that run.
    """
    done = set()

    def stop(pid):
        done.add(pid)
        os.kill(pid, signal.SIGSTOP)
        process = psutil.Process(pid)
        await_true(lambda: process.status() == psutil.STATUS_STOPPED)

    try:
        for pid in pids:
            stop(pid)
        yield stop
    finally:
        for pid in done:
            os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def followers(site, channel):
    """Yield three clients of each process; all have got "0", the first event."""
    _, (id,) = post(site, channel, "0")
    found = []
    try:
        with stopped() as stop:
            while len(found) < EACH * PROCESSES:
                follower = Follower(site, channel)
                found.append(follower)
                await_true(lambda f=follower: f.got == [(id, "0")], site.log)
                pid = follower.pids[0]
                if sum(other.pids[0] == pid for other in found) == EACH:
                    stop(pid)
        assert len({follower.pids[0] for follower in found}) == PROCESSES
        yield found
    finally:
        for follower in found:
            follower.close()


def test_all_clients_of_all_workers(site, engine, channel):
    """Whoever publishes: all get each event, once and in order; one listens in each."""
    ids, numbers = [], [*map(str, range(1, 81))]
    with followers(site, channel) as found:
        pids = {follower.pids[0] for follower in found}
        for place, pid in enumerate(pids):
            with stopped(*(pids - {pid})):
                counts = [EACH, 0] if site.is_handed_over else [0, EACH]
                state = pid, dict(zip(("parked", "attached"), counts, strict=True))
                await_true(lambda state=state: ask(site, "GET", "/state") == state)
                for start in range(20 * place, 20 * place + 20, 2):
                    by, stored = post(site, channel, *numbers[start : start + 2])
                    assert by == pid
                    ids += stored
        expected = [*zip(ids, numbers, strict=True)]
        for follower in found:
            await_true(lambda f=follower: len(f.got) > len(expected), site.log)
            assert follower.got[1:] == expected
            assert follower.resets == 0
            assert len(follower.pids) == 1
        await_true(lambda: engine.listeners() == PROCESSES, engine.listeners)
        # A kick ends those of all processes; an event source comes back, and resumes.
        _, count = ask(site, "GET", f"/kick/{channel}")
        assert count == EACH
        await_true(lambda: all(len(f.pids) > 1 for f in found), site.log)
        _, (id,) = post(site, channel, "after the kick")
        for follower in found:
            await_true(lambda f=follower: len(f.got) > len(expected) + 1, site.log)
            assert follower.got[1:] == [*expected, (id, "after the kick")]
            assert follower.resets == 0


def test_a_worker_that_is_killed(site, channel):
    """kill -9 under load: its clients go on at others; nothing is lost or doubled."""
    posted, unsure, is_over = {"a": [], "b": []}, [], threading.Event()

    def publish(name):
        number = 0
        while not is_over.is_set():
            number += 1
            try:
                post(site, channel, f"{name}{number}")
                posted[name].append(number)
            except (OSError, EOFError):  # it was the victim's
                unsure.append(f"{name}{number}")

    def stored():
        return sum(len(numbers) for numbers in posted.values())

    with followers(site, channel) as found:
        victim = found[0].pids[0]
        publishers = [threading.Thread(target=publish, args=(name,)) for name in posted]
        for publisher in publishers:
            publisher.start()
        try:
            await_true(lambda: stored() > 60, site.log)
            os.kill(victim, signal.SIGKILL)
            before = stored()
            await_true(lambda: stored() > before + 60, site.log)
        finally:
            is_over.set()
            for publisher in publishers:
                publisher.join(LIMIT)
        post(site, channel, "over")
        for follower in found:
            await_true(lambda f=follower: "over" in f.data, site.log)
            assert follower.got_until("over") == found[0].got_until("over")
            assert follower.resets == 0
            # Those of others have noticed nothing.
            assert (len(follower.pids) > 1) == (follower.pids[0] == victim)
            assert victim not in follower.pids[1:]
        data = [data for _, data in found[0].got_until("over")[1:-1]]
    assert len(unsure) <= len(publishers)
    # What the victim had sent may be stored, a moment later: an engine that has it goes
    # on with it. All else is there, in its publisher's order.
    assert len(set(data)) == len(data)
    sure = [text for text in data if text not in unsure]
    for name, numbers in posted.items():
        own = [int(text[1:]) for text in sure if text[0] == name]
        assert own == numbers


def next_data(client):
    """Return the data of a stream's next event."""
    while not (events := sse.Decoder().feed(client.block())):
        pass
    (event,) = events
    return event.data


@pytest.mark.parametrize("broker", BROKERS)
def test_many_processes_listen_once_each(broker, channel):
    """However many clients they have; and all of these get what is published."""
    count = int(os.environ.get("TEST_PROCESSES", "8"))
    words = ["-w", str(count), "--preload", "--timeout", "120"]
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(BROKERS[broker]())  # where nobody else listens
        env = {"HUB_URL": engine.url}
        site = stack.enter_context(
            LiveServer(
                "gunicorn-sync", "tests.apps.broker_app:wrapped", *words, env=env
            )
        )
        post(site, channel, "0")
        clients, pids = [], Counter()
        with stopped() as stop:
            while len(clients) < 2 * count:
                client = site.get(f"/sse/{channel}?after=start", headers=EVENT_SOURCE)
                clients.append(stack.enter_context(client))
                assert next_data(client) == "0"
                pid = int(client.headers["x-pid"])
                pids[pid] += 1
                if pids[pid] == 2:
                    stop(pid)
        assert len(pids) == count
        post(site, channel, "1")
        assert {next_data(client) for client in clients} == {"1"}
        await_true(lambda: engine.listeners() == count, engine.listeners)
        assert site.tracebacks() == 0, site.log()


class Publisher(threading.Thread):
    """Publishes from a process that is not the server's, and tries again."""

    def __init__(self, url, channel):
        super().__init__()
        self.stored = []
        self.uncertain = set()
        self.refused = 0
        self._hub = Hub(url, capacity=100_000)
        self._channel = channel
        self._is_over = threading.Event()
        self.start()

    def run(self):
        number = 0
        while not self._is_over.wait(0.002):
            number += 1
            try:
                self._hub.publish(self._channel, str(number))
                self.stored.append(str(number))
            except Unavailable:
                self.refused += 1
            except Uncertain:
                self.uncertain.add(str(number))

    def more(self, count=100):
        """Wait until so many more are stored."""
        before = len(self.stored)
        await_true(lambda: len(self.stored) >= before + count)

    def close(self):
        self._is_over.set()
        self.join(LIMIT)
        self._hub.close()


@pytest.mark.parametrize("engine", ["redis", "postgresql"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_engine_that_restarts(site, engine, channel, number):
    """Streams stay open, and go on by themselves with all that was stored."""
    with (
        followers(site, channel) as found,
        contextlib.closing(Publisher(engine.url, channel)) as publisher,
    ):
        publisher.more()
        engine.restart(number)
        publisher.more()
        publisher.close()
        last = publisher.stored[-1]
        for follower in found:
            await_true(lambda f=follower: last in f.data, site.log)
            got = [text for text in follower.data if text not in publisher.uncertain]
            assert got == ["0", *publisher.stored]
            assert follower.got_until(last) == found[0].got_until(last)
            assert follower.resets == 0
            assert len(follower.pids) == 1, site.log()
