"""Do brokers keep their promise while everything around them fails?

    python tests/broker_soak.py [--minutes 15] [--engine all] [--seed N]

In the repository's folder; ``tox -e soak`` runs it. Four workers of gunicorn, gthread
and gevent, handed over and attached, share a hub; clients with sockets of their own
resume at any of them by Last-Event-ID, leave and come back; processes publish, and
note when each event was sent and acknowledged. Faults come in turn, see `faults`.

What clients saw is judged (`judge`): between two events that one got of its channel,
without a reset in between, each acknowledged event was delivered, once and in order.
Which lie between is told by their times (one monotonic clock for all processes), and
by the ids' numbers unless something was deleted meanwhile. What was "not stored" never
comes. After the last fault each client gets the last event within `WITHIN` seconds.

The engines' own clocks are not moved: those of workers and a publisher are, and the
times in the stores of `local:` and `postgresql:`. `local:` as another user's cannot be
tried by root.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import redis

from apps import broker_soak_app
from live import TIMEOUT, LiveServer
from postgresql_server import PostgreSQL
from redis_server import RedisServer
from syncstream.errors import Unavailable, Uncertain
from syncstream.protocol import sse
from tcp_proxy import Proxy

TESTS = Path(__file__).parent
MAX_AGE = broker_soak_app.MAX_AGE
OLD = "99a5dc6"  # the commit whose package publishes beside ours
CHANNELS = [f"c{number}" for number in range(6)]
WORKERS = (("gthread", 0), ("gevent", 0), ("gthread", 1), ("gevent", 1))
WITHIN = 30.0  # seconds
AFTER = 6.0  # seconds for which a fault may still be the cause of a reset
HOLD = 4.0  # seconds that a fault lasts


@dataclass
class Published:
    """An event: when it was sent, and acknowledged or refused."""

    channel: str
    data: str
    start: float
    end: float
    id: str | None
    outcome: str  # "stored", "Unavailable" or "Uncertain"

    @property
    def until(self):
        """By when it was stored: an engine may go on with what is in doubt."""
        return float("inf") if self.outcome == "Uncertain" else self.end


@dataclass
class Seen:
    """What a client got: an event or a reset; and by which worker."""

    at: float
    id: str
    data: str
    is_reset: bool = False
    worker: str = ""


@dataclass
class Fault:
    """What was done to whom, from when to when; whether it may lose events."""

    name: str
    loses: bool
    start: float
    end: float = float("inf")


@dataclass
class Verdict:
    """What is wrong, a line each; and what was counted."""

    broken: list = field(default_factory=list)
    counts: collections.Counter = field(default_factory=collections.Counter)
    false_resets: list = field(default_factory=list)


def number(id):
    """Return an id as its engine orders it: hexadecimal, or Redis' milliseconds."""
    first, _, second = id.partition("-")
    if first.isdecimal() and len(first) > 12:
        return int(first), int(second)
    return int(first, 16), 0


def judge(published, clients, faults):
    """Compare what was published with what clients saw.

    Args:
        published: `Published`, of all channels.
        clients: Name: (channel, list of `Seen` in the order of coming).
        faults: `Fault` in their order.
    """
    verdict = Verdict()
    by_data = {event.data: event for event in published}
    by_channel = collections.defaultdict(list)
    for event in published:
        verdict.counts[event.outcome] += 1
        if event.outcome == "stored":
            by_channel[event.channel].append(event)
    for events in by_channel.values():
        events.sort(key=lambda event: event.end)

    def of(moment):
        return ", ".join(
            fault.name for fault in faults if fault.start <= moment <= fault.end + AFTER
        )

    def precedes(one, other):
        """Tell whether one was stored before the other, ``None`` if nobody knows."""
        if one.until < other.start:
            return True
        if other.until < one.start:
            return False
        start, end = min(one.start, other.start), max(one.end, other.end)
        if one.id is None or other.id is None or one.id == other.id:
            return None
        if any(f.loses and f.start <= end and f.end >= start for f in faults):
            return None
        return number(one.id) < number(other.id)

    def break_(kind, name, channel, event, seen, more=""):
        verdict.counts[kind] += 1
        verdict.broken.append(
            f"{kind}: client {name}, channel {channel}, event {event.data}"
            f" (id {event.id}), at {event.end:.2f}, worker {seen.worker},"
            f" fault when published [{of(event.end)}], when seen [{of(seen.at)}] {more}"
        )

    for name, (channel, record) in clients.items():
        before, got = None, set()
        last = None
        for seen in record:
            if seen.is_reset:
                verdict.counts["resets"] += 1
                away = seen.at - last if last is not None else 0
                if not away > 0.7 * MAX_AGE and not any(
                    fault.loses
                    and fault.start <= seen.at
                    and (last is None or fault.end + MAX_AGE >= last)
                    for fault in faults
                ):
                    verdict.counts["false resets"] += 1
                    verdict.false_resets.append(f"{name} [{of(seen.at)}] {seen}")
                # What was published before it came is announced.
                before = Published(channel, "reset", seen.at, seen.at, None, "")
                got, last = set(), seen.at
                continue
            event = by_data.get(seen.data)
            last = seen.at
            if event is None:
                verdict.counts["unknown"] += 1
                verdict.broken.append(f"unknown: client {name} got {seen}")
                continue
            verdict.counts["delivered"] += 1
            if event.outcome == "Unavailable":
                break_("not stored, but delivered", name, channel, event, seen)
            if event.data in got:
                break_("double", name, channel, event, seen)
                continue
            if event.id is None:  # in doubt: the clients know what it got
                event.id = seen.id
            if before is not None:
                is_replay = before.data == "reset" and event.start < before.end
                if before.data != "reset" and precedes(event, before):
                    break_("disorder", name, channel, event, seen, f"after {before}")
                if not is_replay:
                    for other in by_channel[channel]:
                        if other.data == event.data or other.data in got:
                            continue
                        if precedes(before, other) and precedes(other, event):
                            break_(
                                "hole",
                                name,
                                channel,
                                other,
                                seen,
                                f"between {before.data} and {event.data}",
                            )
            got.add(event.data)
            if not (before and before.data == "reset" and is_replay):
                before = event
    return verdict


class Client(threading.Thread):
    """Follows a channel at any worker; leaves and comes back; see `Seen`."""

    def __init__(self, soak, name, channel, seed):
        super().__init__(daemon=True)
        self.name, self.channel, self.record = name, channel, []
        self._soak, self._random = soak, random.Random(seed)
        self._last = None
        self._client = None
        self.is_over = False

    def run(self):
        while not self.is_over:
            try:
                self._follow()
            except (OSError, EOFError, ValueError):
                time.sleep(0.1)

    def _follow(self):
        choose = self._random
        server, attached = choose.choice(self._soak.servers)
        stays = time.monotonic() + choose.uniform(2, 40)
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-cache"}
        if self._last is not None:
            headers["Last-Event-ID"] = self._last
        after = choose.choice(("now", "start"))
        path = f"/sse/{self.channel}?after={after}&attached={attached}"
        with server.get(path, headers=headers) as client:
            self._client = client
            client.read_head()
            if client.status != 200:
                raise EOFError(client.status)
            worker = f"{server.kind}/{attached}/{client.headers['x-pid']}"
            # A worker that is frozen for good is left as by an impatient reader.
            client.socket.settimeout(1.5 * MAX_AGE)
            while not self.is_over and time.monotonic() < stays:
                if not (block := client.block()):
                    break
                for event in sse.Decoder().feed(block):
                    is_reset = event.event == "reset"
                    seen = Seen(
                        time.monotonic(), event.id, event.data, is_reset, worker
                    )
                    self.record.append(seen)
                    self._last = event.id
        if not self.is_over:
            time.sleep(choose.choice((0, 0, 0.5, 3)))

    def close(self):
        self.is_over = True
        with contextlib.suppress(OSError, AttributeError):
            self._client.socket.shutdown(2)


class Publisher(threading.Thread):
    """A process that publishes, and what it has noted."""

    def __init__(self, url, name, rate, path="", clock=""):
        super().__init__(daemon=True)
        self.published = []
        paths = [*filter(None, [path]), str(TESTS), str(TESTS.parent)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        if clock:
            env["SOAK_CLOCK"] = clock
        self.process = subprocess.Popen(
            [
                *(sys.executable, str(TESTS / "broker_soak.py"), "--publish", name),
                *("--url", url, "--rate", str(rate)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        self.start()

    def run(self):
        for line in self.process.stdout:
            self.published.append(Published(*json.loads(line)))

    def close(self):
        self.process.stdin.close()
        self.process.wait(3 * TIMEOUT)
        self.join(TIMEOUT)
        self.process.stdout.close()


def note(hub, channel, data):
    """Publish; return what has come of it."""
    start, id, outcome = time.monotonic(), None, "stored"
    try:
        id = hub.publish(channel, data)
    except Unavailable:
        outcome = "Unavailable"
    except Uncertain:
        outcome = "Uncertain"
    return channel, data, start, time.monotonic(), id, outcome


def publish(name, url, rate):
    """Publish until nobody holds our input any more."""
    hub = broker_soak_app.open_hub(url)
    is_over = threading.Event()
    threading.Thread(
        target=lambda: (sys.stdin.read(), is_over.set()), daemon=True
    ).start()
    choose, count = random.Random(name), 0
    while not is_over.wait(1 / rate):
        count += 1
        told = note(hub, choose.choice(CHANNELS), f"{name}-{count}")
        print(json.dumps(told), flush=True)
    hub.close()


class Local:
    """`local:`, and what befalls its files."""

    name = "local"

    def __init__(self, stack):
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="syncstream-"))
        self.folder = Path(folder) / "log"
        self.url = self.direct = f"local:{self.folder}"

    def faults(self):
        for name in ("log.db-wal", "log.db-shm", "lock", "log.db"):
            yield f"remove {name}", True, lambda n=name: self._remove(n), None
        yield "remove the folder", True, self._rmtree, None
        yield (
            "delete one event",
            True,
            lambda: self._sql(
                "DELETE FROM event WHERE seq = (SELECT max(seq) - 20 FROM event)"
            ),
            None,
        )
        for word, shift in (("back", -3600), ("ahead", 3600)):
            yield (
                f"times in the store {word}",
                True,
                lambda s=shift: self._sql(f"UPDATE event SET time = time + {s * 1000}"),
                None,
            )
        yield "max_size", True, self._fill, None
        if os.geteuid():
            yield (
                "chmod 0",
                False,
                lambda: self.folder.chmod(0),
                (lambda: self.folder.chmod(0o700)),
            )

    def _remove(self, name):
        (self.folder / name).unlink(missing_ok=True)

    def _rmtree(self):
        shutil.rmtree(self.folder, ignore_errors=True)

    def _sql(self, text):
        with (
            contextlib.closing(
                sqlite3.connect(self.folder / "log.db", timeout=5)
            ) as connection,
            connection,
        ):
            connection.execute(text)

    def _fill(self):
        hub = broker_soak_app.open_hub(self.direct)
        for _ in range(40):
            hub.publish("big", "x" * (256 << 10))
        hub.close()


class OverTCP:
    """What befalls the connections to an engine."""

    def faults(self):
        yield "reset connections", False, self.proxy.cut, None
        yield "refuse connections", False, self._refuse, self._mend
        yield "forget connections", False, self.proxy.forget, None
        yield "black hole", False, self._silence, self._mend
        yield "engine killed", self.name == "redis", self.kill, None

    def _refuse(self):
        self.proxy.is_refusing = True
        self.proxy.cut()

    def _silence(self):
        self.proxy.is_silent = True

    def _mend(self):
        self.proxy.is_refusing = self.proxy.is_silent = False


class Redis(OverTCP):
    name = "redis"

    def __init__(self, stack):
        words = ("--appendonly", "yes", "--appendfsync", "always")
        self.server = stack.enter_context(RedisServer(*words))
        self.proxy = stack.enter_context(Proxy(self.server.port))
        self._acl("resetkeys", "resetchannels", "~*", "&*")
        self.url = f"redis://soak:soak@127.0.0.1:{self.proxy.port}"
        self.direct = self.server.url

    def _acl(self, *words):
        self.server.command("ACL", "SETUSER", "soak", "on", ">soak", "+@all", *words)

    def kill(self):
        self.server.restart(signal.SIGKILL)
        # Users are not saved.
        self._acl("resetkeys", "resetchannels", "~*", "&*")

    def _refuse_name(self):
        words = [f"{sign}ss:{{{name}}}*" for name in CHANNELS[1:] for sign in "~&"]
        words += ["~ss:{[^c]*", "&ss:{[^c]*", "&ss:[^{]*"]
        self._acl("resetkeys", "resetchannels", *words)

    def _delete_one(self):
        with self.server.client() as client:
            found = client.xrevrange("ss:{c1}", count=10)
            if found:
                client.xdel("ss:{c1}", found[-1][0])

    def faults(self):
        yield from super().faults()
        ask = self.server.command
        yield (
            "CLIENT KILL",
            False,
            lambda: (
                ask("CLIENT", "KILL", "TYPE", "pubsub"),
                ask("CLIENT", "KILL", "TYPE", "normal"),
            ),
            None,
        )
        yield "FLUSHALL", True, lambda: ask("FLUSHALL"), None
        yield "UNLINK", True, lambda: ask("UNLINK", "ss:{c1}"), None
        yield "XDEL", True, self._delete_one, None
        yield (
            "maxmemory",
            False,
            lambda: ask("CONFIG", "SET", "maxmemory", "1"),
            (lambda: ask("CONFIG", "SET", "maxmemory", "0")),
        )
        yield (
            "name refused",
            False,
            self._refuse_name,
            (lambda: self._acl("resetkeys", "resetchannels", "~*", "&*")),
        )


class PostgreSql(OverTCP):
    name = "postgresql"

    def __init__(self, stack):
        self.server = stack.enter_context(PostgreSQL())
        self.proxy = stack.enter_context(Proxy(self.server.port))
        self.url = self.server.url_at(self.proxy.port)
        self.direct = self.server.url

    def kill(self):
        self.server.kill()
        self.server.start()

    def faults(self):
        yield from super().faults()
        sql = self.server.execute
        yield (
            "pg_terminate_backend",
            False,
            lambda: sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
            ),
            None,
        )
        yield "TRUNCATE", True, lambda: sql("TRUNCATE syncstream.event"), None
        yield (
            "DELETE of one event",
            True,
            lambda: sql(
                "DELETE FROM syncstream.event WHERE seq ="
                " (SELECT max(seq) - 20 FROM syncstream.event)"
            ),
            None,
        )
        for word, sign in (("back", "-"), ("ahead", "+")):
            yield (
                f"times in the store {word}",
                True,
                lambda s=sign: sql(
                    f"UPDATE syncstream.event SET ts = ts {s} interval '1 hour'"
                ),
                None,
            )


ENGINES = {"local": Local, "redis": Redis, "postgresql": PostgreSql}


def old_package(stack):
    """Return where the package is as it was, or ``None``: this copy has no history."""
    try:
        data = subprocess.run(
            ["git", "archive", OLD, "syncstream"],
            cwd=TESTS.parent,
            check=True,
            capture_output=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="old-"))
    subprocess.run(["tar", "-x", "-C", folder], input=data, check=True)
    return folder


class Soak:
    """One engine, its workers, clients, publishers; and the faults."""

    def __init__(self, engine, stack, choose, clients=60, rate=60, workers=WORKERS):
        self.engine, self._stack, self._random = engine, stack, choose
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-"))
        self.clock = Path(folder) / "clock"
        self.clock.write_text("0")
        self.faults, self.servers = [], []
        self._old_path = old_package(stack)
        for place, (kind, attached) in enumerate(workers):
            # Their clocks are moved in every second one.
            env = {"HUB_URL": engine.url}
            if place % 2:
                env["SOAK_CLOCK"] = str(self.clock)
            words = ["-w", "1", "--timeout", "300"]
            if kind == "gthread":
                words += ["--threads", str(clients + 10)]
            server = stack.enter_context(
                LiveServer(
                    f"gunicorn-{kind}", "apps.broker_soak_app:wrapped", *words, env=env
                )
            )
            self.servers.append((server, attached))
        self.publishers = [
            Publisher(engine.url, f"p{place}", rate / 3, clock=clock)
            for place, clock in enumerate(("", "", str(self.clock)))
        ]
        self.clients = [
            Client(self, f"client{n}", CHANNELS[n % 6], choose.random())
            for n in range(clients)
        ]
        for client in self.clients:
            client.start()

    def _worker(self):
        server, _ = self._random.choice(self.servers)
        return psutil.Process(server.pid).children()[0]

    def _freeze(self, seconds):
        worker = self._worker()
        worker.suspend()
        time.sleep(seconds)
        worker.resume()

    def _old(self, path):
        publisher = Publisher(self.engine.url, f"old{len(self.publishers)}", 10, path)
        self.publishers.append(publisher)

    def all_faults(self):
        """Yield name, whether it loses events, what begins it and what ends it."""
        yield "worker frozen", False, lambda: self._freeze(HOLD), None
        yield "worker killed", False, lambda: self._worker().kill(), None
        for shift in (-600, 600):
            # Who is ahead finds everything too old.
            yield (
                f"clock {shift:+} s",
                self.engine.name == "local",
                (lambda s=shift: self.clock.write_text(str(s))),
                lambda: self.clock.write_text("0"),
            )
        if path := self._old_path:
            yield (
                f"old publisher ({OLD})",
                False,
                lambda: self._old(path),
                (lambda: self.publishers[-1].close()),
            )
        yield from self.engine.faults()
        yield (
            "worker frozen beyond max_age",
            True,
            (lambda: self._freeze(1.3 * MAX_AGE)),
            None,
        )

    def disturb(self, until):
        """Do one fault after the other."""
        faults = []
        while time.monotonic() < until:
            faults = faults or [*self.all_faults()]
            name, loses, begin, end = faults.pop(0)
            fault = Fault(name, loses, time.monotonic())
            self.faults.append(fault)
            problem = ""
            try:
                begin()
                time.sleep(min(HOLD, max(0, until - time.monotonic())))
            except (OSError, psutil.Error, sqlite3.Error, redis.RedisError) as error:
                problem = f", not done: {error!r}"
            finally:
                if end:
                    end()
            fault.end = time.monotonic()
            print(
                f"  {fault.start:.2f} {name}: {fault.end - fault.start:.1f} s{problem}",
                flush=True,
            )
            time.sleep(min(2, max(0, until - time.monotonic())))

    def finish(self):
        """Publish a last event of each channel; return who has not got it."""
        for publisher in self.publishers:
            if publisher.is_alive():
                publisher.close()
        last, published = {}, []
        deadline = time.monotonic() + WITHIN
        hub = broker_soak_app.open_hub(self.engine.direct)
        for channel in CHANNELS:
            attempt = 0
            while channel not in last and time.monotonic() < deadline:
                attempt += 1
                told = Published(*note(hub, channel, f"last-{channel}-{attempt}"))
                published.append(told)
                if told.outcome == "stored":
                    last[channel] = told.data
        hub.close()

        def hung():
            return [
                client
                for client in self.clients
                if last.get(client.channel)
                not in [seen.data for seen in client.record[-50:]]
            ]

        deadline = time.monotonic() + WITHIN
        while hung() and time.monotonic() < deadline:
            time.sleep(0.2)
        found = hung()
        for client in self.clients:
            client.close()
        for client in self.clients:
            client.join(TIMEOUT)
        for publisher in self.publishers:
            published += publisher.published
        return found, published


def soak(kind, seconds, choose, **options):
    """Run one engine; print its summary; return whether all promises were kept."""
    print(f"{kind}:", flush=True)
    with contextlib.ExitStack() as stack:
        run = Soak(ENGINES[kind](stack), stack, choose, **options)
        run.disturb(time.monotonic() + seconds)
        hung, published = run.finish()
        clients = {one.name: (one.channel, one.record) for one in run.clients}
        verdict = judge(published, clients, run.faults)
        tracebacks = sum(server.tracebacks() for server, _ in run.servers)
    counts = verdict.counts
    print(
        f"  published {len(published)}, acknowledged {counts['stored']}, uncertain"
        f" {counts['Uncertain']}, not stored {counts['Unavailable']}; delivered"
        f" {counts['delivered']}; resets {counts['resets']}, of these not needed"
        f" {counts['false resets']}; holes {counts['hole']}, doubles"
        f" {counts['double']}, disorder {counts['disorder']}; hung {len(hung)};"
        f" tracebacks {tracebacks}"
    )
    for line in verdict.false_resets[:20]:
        print(f"  reset that was not needed: {line}")
    for line in verdict.broken[:40]:
        print(f"  BROKEN {line}")
    for client in hung:
        print(f"  HUNG {client.name}, {client.channel}, last {client.record[-1:]}")
    return not verdict.broken and not hung and counts["delivered"] > 0


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--engine", choices=[*ENGINES, "all"], default="all")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--publish", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--rate", type=float, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.publish:
        publish(words.publish, words.url, words.rate)
        return
    print(f"seed {words.seed}", flush=True)
    kinds = ENGINES if words.engine == "all" else [words.engine]
    kept = [soak(kind, words.minutes * 60, random.Random(words.seed)) for kind in kinds]
    sys.exit(0 if all(kept) else 1)


if __name__ == "__main__":
    main()
