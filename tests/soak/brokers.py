"""Do brokers keep their promise while everything around them fails?

    python -m tests.soak.brokers [--minutes 15] [--engine all] [--seed N]

In the repository's folder; ``tox -e soak`` runs it. Four workers of gunicorn, gthread
and gevent, handed over and attached, and one of an older release share a hub; clients
with sockets of their own resume at any of them by Last-Event-ID, leave and come back;
processes publish, and note when each event was sent and acknowledged. Faults come in
turn. Each says whom it hit and how its effect was seen; one without effect fails the
run.

What clients saw is judged (`judge`): between two events that one got of its channel,
without a reset in between, each acknowledged event was delivered, once and in order;
so was what was sent after a new client's stream had begun. Which lie between is told by
their times (one monotonic clock for all processes), and by the ids' numbers unless
something was deleted meanwhile. What was "not stored" never comes. A reset needs a
cause: a fault that took something later than the client's place, or its age. After the
last fault each client gets the last event within `WITHIN` seconds.

The older release has the faults that were mended since: what its worker gets wrong is
counted, not judged. ``--package COMMIT`` runs all with an older package, to see that
this finds its faults. PostgreSQL's clock is moved if libfaketime is installed (Debian's
package faketime); Redis' is not: its allocator asks for the time before libfaketime can
answer, so it does not start. `local:` as another user's cannot be tried by root.
"""

import argparse
import collections
import contextlib
import json
import logging
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
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path

import psutil
import psycopg
import redis

from syncstream.errors import Unavailable, Uncertain
from syncstream.protocol import sse
from tests import ROOT
from tests.apps import broker_soak_app
from tests.support.live import LiveServer
from tests.support.postgresql_server import PostgreSQL
from tests.support.redis_server import RedisServer
from tests.support.tcp_proxy import Proxy
from tests.support.waits import TIMEOUT

MAX_AGE = broker_soak_app.MAX_AGE
OLD = "99a5dc6"  # the commit whose package runs beside ours
CHANNELS = [f"c{number}" for number in range(6)]
HURT = "c1"  # the channel that loses single events
# They have an event now and then: nothing later shows what is missing.
QUIET = "quiet"
DELETED = "deleted"  # and its last one is deleted
ALL = [*CHANNELS, QUIET, DELETED]
WORKERS = (("gthread", 0), ("gevent", 0), ("gthread", 1), ("gevent", 1))
WITHIN = 30.0  # seconds
KEEPALIVE = 15.0  # seconds between two comments of a stream
SLOW = 10.0  # seconds that no `publish` takes
AFTER = 15.0  # seconds after a fault, or a client's return, in which a reset must come
LATE = 1.3 * MAX_AGE + AFTER  # seconds: also of a worker that is frozen meanwhile
HOLD = 3.0  # seconds that a fault lasts
PAUSE = 1.5  # seconds between two
SHIFT = 600  # seconds by which clocks are moved


class NotDone(Exception):
    """A fault had no effect."""


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
    """What a client got, when, and by which worker.

    Attributes:
        kind: "event", "reset", "connected", "left", or the status of a refusal, "403".
    """

    at: float
    id: str
    data: str
    kind: str = "event"
    worker: str = ""

    @property
    def is_by_old(self):
        return self.worker.startswith("old")


@dataclass
class Fault:
    """What is done to whom.

    Attributes:
        begin: Called with the fault: a generator, which goes on at its end. It sets
            `did`, or raises.
        loses: Channels that it may take events from.
        newest: Channel: the id of the newest that it took; else all may be gone that
            was published before its end.
        refuses: Channels that the engine refuses meanwhile: others go on.
        away: Half of the clients of this channel are away when it begins.
        did: Whom it hit, and how that was seen.
        problem: Why it was not done.
    """

    name: str
    begin: Callable[["Fault"], Iterator[None]] | None = None
    loses: Sequence[str] = ()
    refuses: Sequence[str] = ()
    away: str = ""
    hold: float = HOLD
    start: float = 0.0
    end: float = float("inf")
    newest: dict = field(default_factory=dict)
    did: str = ""
    problem: str = ""

    def may_explain(self, channel, place, id, seen, since):
        """Tell whether it may be the cause of a reset.

        Args:
            place, id: When what the client had last was published, and its id.
            seen: The reset.
            since: When the client's stream began.
        """
        if channel not in self.loses or seen.at < self.start:
            return False
        if seen.at > max(self.end, since) + AFTER:
            return False
        if id and channel in self.newest:
            return number(id) <= number(self.newest[channel])
        return place <= self.end


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


def judge(published, clients, faults, *, reads_write=False):
    """Compare what was published with what clients saw.

    Args:
        published: `Published`, of all channels.
        clients: Name: (channel, list of `Seen` in the order of coming).
        faults: `Fault` in their order.
        reads_write: A worker of the older release writes an id of its own to an empty
            channel that it reads: who came before that is reset by the first event.
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

    def stored(channel, start, end):
        """Return what may have been stored between: no publisher takes so long."""
        events, by_end = by_channel[channel], attrgetter("end")
        first = bisect_left(events, start, key=by_end)
        return events[first : bisect_left(events, end + SLOW, key=by_end)]

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
        if any(
            one.channel in fault.loses and fault.start <= end and fault.end >= start
            for fault in faults
        ):
            return None
        return number(one.id) < number(other.id)

    def break_(kind, name, channel, event, seen, more=""):
        if seen.is_by_old:
            verdict.counts["by the old worker"] += 1
            return
        verdict.counts[kind] += 1
        verdict.broken.append(
            f"{kind}: client {name}, channel {channel}, event {event.data}"
            f" (id {event.id}), at {event.end:.2f}, worker {seen.worker},"
            f" fault when published [{of(event.end)}], when seen [{of(seen.at)}] {more}"
        )

    for name, (channel, record) in clients.items():
        before, got, since = None, set(), 0.0
        id, place = "", 0.0  # of the last that it got
        ever, reset_at = set(), -1.0
        for seen in record:
            if seen.kind == "connected":
                since = seen.at
                if not id:  # a new one: what comes from now on is its own
                    before = Published(channel, "reset", since, since, None, "")
                    got, place = set(), since
                continue
            if seen.kind in ("left", "reset"):  # a reset that comes late is none
                begun = max(since, reset_at)
                for other in stored(channel, begun, seen.at):
                    is_due = begun < other.start and other.end + LATE < seen.at
                    if is_due and other.data not in ever:
                        break_("missed", name, channel, other, seen)
            if seen.kind == "left":
                continue
            if seen.kind not in ("event", "reset"):
                verdict.counts[f"status {seen.kind}"] += 1
                if seen.kind == "403" and not any(
                    channel in fault.refuses
                    and fault.start <= seen.at <= fault.end + AFTER
                    for fault in faults
                ):
                    refused = Published(channel, "", seen.at, seen.at, None, "")
                    break_("denied for no reason", name, channel, refused, seen)
                continue
            if seen.kind == "reset":
                verdict.counts["resets"] += 1
                is_old = seen.at - place > 0.7 * MAX_AGE
                is_first = not (id or any(e.end < since for e in by_channel[channel]))
                if not (is_old or (is_first and reads_write)) and not any(
                    fault.may_explain(channel, place, id, seen, since)
                    for fault in faults
                ):
                    verdict.counts["false resets"] += not seen.is_by_old
                    if not seen.is_by_old:
                        verdict.false_resets.append(
                            f"{name} [{of(seen.at)}] after {id!r} of {place:.2f},"
                            f" in a stream since {since:.2f}: {seen}"
                        )
                # What was published before it came is announced.
                before = Published(channel, "reset", seen.at, seen.at, None, "")
                got, id, place = set(), seen.id, seen.at
                reset_at = seen.at
                continue
            event = by_data.get(seen.data)
            if event is None:
                verdict.counts["unknown"] += 1
                verdict.broken.append(f"unknown: client {name} got {seen}")
                continue
            id, place = seen.id, event.start
            ever.add(event.data)
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
                    until = min(event.until, seen.at)
                    for other in stored(channel, before.start, until):
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
    for fault in faults:
        if fault.refuses:
            verdict.broken += deaf(fault, by_channel, clients)
    return verdict


def deaf(fault, by_channel, clients):
    """Yield who got nothing of a channel that was allowed while another was not."""
    start, end = fault.start + 1, fault.end
    for name, (channel, record) in clients.items():
        told = [e for e in by_channel[channel] if start <= e.end <= end - 1]
        around = [s for s in record if s.kind == "connected" and s.at <= end + 1]
        if channel in fault.refuses or not told or not around:
            continue
        stream = around[-1]
        if stream.at > fault.start or stream.worker.startswith("old"):
            continue
        if not any(s.kind == "event" and start <= s.at <= end for s in record):
            yield (
                f"deaf: client {name}, channel {channel}, at {stream.worker} got none"
                f" of {len(told)} events while {fault.name}"
            )


class Client(threading.Thread):
    """Follows a channel at any worker; leaves and comes back; see `Seen`."""

    def __init__(self, soak, name, channel, seed, home=None):
        super().__init__(daemon=True)
        self._home = home  # the server that it always asks
        self.name, self.channel, self.record = name, channel, []
        self._soak, self._random = soak, random.Random(seed)
        self._last = None
        self._client = None
        self.is_over = False
        self.may_come = threading.Event()
        self.may_come.set()

    def run(self):
        while not self.is_over:
            self.may_come.wait()
            try:
                self._follow()
            except (OSError, EOFError, ValueError):
                time.sleep(0.1)

    def _follow(self):
        choose = self._random
        server, attached, label = self._home or choose.choice(self._soak.servers)
        stays = time.monotonic() + (3 * LATE if self._home else choose.uniform(2, 40))
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-cache"}
        if self._last is not None:
            headers["Last-Event-ID"] = self._last
        after = choose.choice(("now", "start"))
        path = f"/sse/{self.channel}?after={after}&attached={attached}"
        with server.get(path, headers=headers) as client:
            self._client = client
            client.read_head()
            worker = f"{label}{server.kind}/{attached}/{client.headers.get('x-pid')}"

            def see(kind, id="", data=""):
                seen = Seen(time.monotonic(), id, data, kind, worker)
                self.record.append(seen)

            if client.status != 200:
                see(str(client.status))
                raise EOFError(client.status)
            # A worker that is frozen for good is left as by an impatient reader.
            client.socket.settimeout(1.3 * MAX_AGE + KEEPALIVE + 5)
            is_connected = False
            try:
                while self.may_come.is_set() and time.monotonic() < stays:
                    if self.is_over or not (block := client.block()):
                        break
                    if not is_connected:
                        is_connected = True
                        see("connected")
                    for event in sse.Decoder().feed(block):
                        kind = "reset" if event.event == "reset" else "event"
                        see(kind, event.id, event.data)
                        self._last = event.id
            finally:
                if is_connected:
                    see("left")
        if not self.is_over:
            time.sleep(choose.choice((0, 0, 0.5, 3)))

    def leave(self):
        """Go, and stay away until `may_come` is set."""
        self.may_come.clear()
        self._hang_up()

    def close(self):
        self.is_over = True
        self.may_come.set()
        self._hang_up()

    def _hang_up(self):
        with contextlib.suppress(OSError, AttributeError):
            self._client.socket.shutdown(2)


class Publisher(threading.Thread):
    """A process that publishes, and what it has noted."""

    def __init__(self, url, name, rate, path="", clock=""):
        super().__init__(daemon=True)
        self.published = []
        paths = [*filter(None, [path]), str(ROOT)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        if clock:
            env["SOAK_CLOCK"] = clock
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.soak.brokers", "--publish", name),
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
    logging.disable()  # that a broker is down is in what is noted
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


def seen(fault, what):
    """Note a fault's effect; one without is not done."""
    if not what:
        raise NotDone("it had no effect")
    fault.did = str(what)


def clock_env(clock):
    """Return the environment of a program whose clock is moved; empty: it cannot be."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    if not found:
        return {}
    return {
        "LD_PRELOAD": str(found[-1]),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_DISABLE_SHM": "1",
    }


class Local:
    """`local:`, and what befalls its files."""

    name = "local"

    def __init__(self, stack, path=""):
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="syncstream-"))
        self.folder = Path(folder) / "log"
        self.url = self.direct = f"local:{self.folder}"

    def faults(self):
        # Whose `lock` is another file loses nothing: it is a file of locks.
        yield Fault("remove lock", self._remove("lock"))
        for name in ("log.db-shm", "log.db-wal", "log.db"):
            yield Fault(f"remove {name}", self._remove(name), ALL)
        yield Fault("remove the folder", self._rmtree, ALL)
        yield Fault("delete one event", self._delete_one, [HURT], away=HURT)
        for word, shift in (("back", -3600), ("ahead", 3600)):
            sql = f"UPDATE event SET time = time + {shift * 1000}"
            # Only times that are too old make events go.
            loses = ALL if shift < 0 else ()
            yield Fault(f"times in the store {word}", self._updated(sql), loses)
        yield Fault("max_size", self._fill, ALL)
        if os.geteuid():
            yield Fault("chmod 0", self._forbid)

    def _remove(self, name):
        def begin(fault):
            path = self.folder / name
            deadline = time.monotonic() + WITHIN
            while not path.exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            inode = path.stat().st_ino
            path.unlink()
            seen(fault, f"inode {inode}")
            yield

        return begin

    def _rmtree(self, fault):
        seen(fault, sorted(path.name for path in self.folder.iterdir()))
        while self.folder.exists():  # they write into it meanwhile
            shutil.rmtree(self.folder, ignore_errors=True)
            if not (self.folder / "log.db").exists():
                break
        yield

    def _sql(self, text, *words):
        with (
            contextlib.closing(
                sqlite3.connect(self.folder / "log.db", timeout=5)
            ) as connection,
            connection,
        ):
            cursor = connection.execute(text, words)
            return cursor.fetchall() if cursor.description else cursor.rowcount

    def _updated(self, text):
        def begin(fault):
            seen(fault, self._sql(text))
            fault.did += " rows"
            yield

        return begin

    def delete(self, channel):
        """Delete a channel's events; return how many."""
        sql = "DELETE FROM event WHERE channel IN (SELECT id FROM channel WHERE name=?)"
        return self._sql(sql, channel)

    def _delete_one(self, fault):
        ((seq, number, nonce),) = self._sql(
            "SELECT e.seq, e.number, e.nonce FROM event e JOIN channel c"
            " ON c.id = e.channel WHERE c.name = ? ORDER BY seq DESC LIMIT 1 OFFSET 4",
            HURT,
        )
        seen(fault, self._sql("DELETE FROM event WHERE seq = ?", seq))
        fault.newest = {HURT: f"{number:x}-{nonce:08x}"}
        fault.did = f"{fault.newest}"
        yield

    def _fill(self, fault):
        oldest = self._sql("SELECT min(seq) FROM event")
        hub = broker_soak_app.open_hub(self.direct)
        for _ in range(40):
            hub.publish("big", "x" * (256 << 10))
        hub.close()
        if self._sql("SELECT min(seq) FROM event") == oldest:
            raise NotDone("the oldest is still there")
        seen(fault, "the oldest are gone")
        yield

    def _forbid(self, fault):
        self.folder.chmod(0)
        try:
            seen(fault, not os.access(self.folder / "log.db", os.R_OK))
            yield
        finally:
            self.folder.chmod(0o700)


class OverTCP:
    """What befalls an engine, and the connections to it."""

    def faults(self):
        yield Fault("reset connections", self._reset)
        yield Fault("refuse connections", self._refuse)
        yield Fault("forget connections", self._forget)
        yield Fault("black hole", self._silence)
        # Redis has appendfsync=always.
        yield Fault("engine killed", self._kill)

    def _reset(self, fault):
        seen(fault, self.proxy.cut())
        fault.did += " connections"
        yield

    def _forget(self, fault):
        seen(fault, self.proxy.forget())
        fault.did += " connections"
        yield

    def _refuse(self, fault):
        self.proxy.is_refusing = True
        try:
            count = self.proxy.cut()
            seen(fault, not self._answers())
            fault.did = f"{count} connections, and new ones: no answer"
            yield
        finally:
            self.proxy.is_refusing = False

    def _silence(self, fault):
        self.proxy.is_silent = True
        try:
            seen(fault, not self._answers())
            fault.did = "no answer"
            yield
        finally:
            self.proxy.is_silent = False

    def _kill(self, fault):
        before = self.pid
        self.kill()
        seen(fault, before != self.pid and f"pid {before}, now {self.pid}")
        yield


class Redis(OverTCP):
    name = "redis"

    def __init__(self, stack, path=""):
        words = ("--appendonly", "yes", "--appendfsync", "always")
        self.server = stack.enter_context(RedisServer(*words))
        self.proxy = stack.enter_context(Proxy(self.server.port))
        self._acl("~*", "&*")
        self.url = f"redis://soak:soak@127.0.0.1:{self.proxy.port}"
        self.direct = self.server.url

    @property
    def pid(self):
        return self.server.pid

    def _answers(self):
        words = {"port": self.proxy.port, "socket_timeout": 0.5, "protocol": 2}
        with redis.Redis(**words, retry=None) as client:
            try:
                client.execute_command("PING")
            except (redis.ConnectionError, redis.TimeoutError):
                return False
            return True

    def _acl(self, *words):
        words = ("on", ">soak", "+@all", "resetkeys", "resetchannels", *words)
        self.server.command("ACL", "SETUSER", "soak", *words)

    def kill(self):
        self.server.restart(signal.SIGKILL)
        self._acl("~*", "&*")  # users are not saved

    def _refuse_name(self, fault):
        names = [*(f"{{{name}}}" for name in CHANNELS[1:]), "{[^c]*", "empty"]
        words = [f"{sign}ss:{name}*" for name in names for sign in "~&"]
        self._acl(*words, "&ss:[^{]*")
        try:
            with self.server.client(username="soak", password="soak") as client:
                client.xlen(f"ss:{{{CHANNELS[1]}}}")
                try:
                    client.xlen(f"ss:{{{CHANNELS[0]}}}")
                except redis.exceptions.NoPermissionError as error:
                    seen(fault, error)
                else:
                    raise NotDone("the name is allowed")
            yield
        finally:
            self._acl("~*", "&*")

    def _kill_clients(self, fault):
        kinds = ("pubsub", "normal")
        ask = self.server.command
        seen(fault, sum(ask("CLIENT", "KILL", "TYPE", kind) for kind in kinds))
        fault.did += " connections"
        yield

    def _flush(self, fault):
        seen(fault, self.server.command("DBSIZE"))
        fault.did += " keys"
        self.server.command("FLUSHALL")
        yield

    def _unlink(self, fault):
        seen(fault, self.server.command("UNLINK", f"ss:{{{HURT}}}"))
        yield

    def delete(self, channel):
        """Delete a channel's events; return how many."""
        return self.server.command("XTRIM", f"ss:{{{channel}}}", "MAXLEN", "0")

    def _delete_one(self, fault):
        with self.server.client() as client:
            (*_, (id, _)) = client.xrevrange(f"ss:{{{HURT}}}", count=5)
            seen(fault, client.xdel(f"ss:{{{HURT}}}", id))
        fault.newest = {HURT: id.decode()}
        fault.did = f"{fault.newest}"
        yield

    def _fill(self, fault):
        ask = self.server.command
        ask("CONFIG", "SET", "maxmemory", "1")
        try:
            try:
                ask("SET", "probe", "1")
            except redis.exceptions.OutOfMemoryError as error:
                seen(fault, error)
            else:
                raise NotDone("it takes more")
            yield
        finally:
            ask("CONFIG", "SET", "maxmemory", "0")

    def _evict(self, fault):
        ask = self.server.command

        def info(name):
            with self.server.client() as client:
                return client.info()[name]

        before = info("evicted_keys")
        ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        try:
            # Little by little: the process has more than its keys.
            step = 0
            while info("evicted_keys") == before and step < 100:
                step += 1
                most = info("used_memory") - step * 20_000
                ask("CONFIG", "SET", "maxmemory", str(max(most, 1)))
                ask("PING")
                time.sleep(0.02)
            ask("CONFIG", "SET", "maxmemory", "0")
            seen(fault, info("evicted_keys") - before)
            fault.did += " keys"
            yield
        finally:
            ask("CONFIG", "SET", "maxmemory", "0")
            ask("CONFIG", "SET", "maxmemory-policy", "noeviction")

    def faults(self):
        yield Fault("XDEL", self._delete_one, [HURT], away=HURT)
        yield Fault("name refused", self._refuse_name, refuses=CHANNELS[:1], hold=5.0)
        yield from super().faults()
        yield Fault("CLIENT KILL", self._kill_clients)
        yield Fault("FLUSHALL", self._flush, ALL)
        yield Fault("UNLINK", self._unlink, [HURT])
        yield Fault("maxmemory, noeviction", self._fill)
        yield Fault("maxmemory, allkeys-lru", self._evict, ALL)


class PostgreSql(OverTCP):
    """One whose role has the rights that docs/brokers.md lists, and no more."""

    name = "postgresql"

    def __init__(self, stack, path=""):
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="clock-")))
        folder.chmod(0o755)  # PostgreSQL's user reads it
        self.clock = folder / "clock"
        self.clock.write_text("+0")
        self.env = clock_env(self.clock)
        self.server = stack.enter_context(PostgreSQL(self.env))
        self.proxy = stack.enter_context(Proxy(self.server.port))
        url = self.server.url_at(self.proxy.port)
        self.url = url.replace("postgres@", "soak@")
        self.direct = self.server.url
        subprocess.run(
            [sys.executable, "-m", "syncstream.brokers.postgresql", self.direct],
            env={**os.environ, "PYTHONPATH": path or str(ROOT)},
            check=True,
        )
        self.server.execute("CREATE ROLE soak LOGIN")
        docs = (ROOT / "docs" / "brokers.md").read_text()
        _, _, rest = docs.partition("<!-- postgresql rights: both -->\n```sql\n")
        rights, _, _ = rest.partition("```")
        for right in rights.split(";"):
            try:
                self.server.execute(right.replace("TO app", "TO soak"))
            except psycopg.errors.UndefinedTable:
                if not path:  # an older schema has fewer tables
                    raise

    @property
    def pid(self):
        return int((self.server.data / "postmaster.pid").read_text().split()[0])

    def now(self):
        ((now,),) = self.server.execute("SELECT extract(epoch FROM clock_timestamp())")
        return float(now)

    def _answers(self):
        try:
            psycopg.connect(self.url, connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def kill(self):
        self.server.kill()
        self.server.start()

    def _move(self, shift):
        def begin(fault):
            self.clock.write_text(f"{shift:+}")
            try:
                self._await_clock(shift)
                seen(fault, f"it says so: {self.now() - time.time():+.0f} s")
                yield
            finally:
                self.clock.write_text("+0")
                self._await_clock(0)

        return begin

    def _await_clock(self, shift):
        deadline = time.monotonic() + 5
        while abs(self.now() - time.time() - shift) > 5:
            if time.monotonic() > deadline:
                raise NotDone(f"its clock is not {shift:+}: {self.now()}")
            time.sleep(0.1)

    def _revoke(self, right, probe):
        def begin(fault):
            self.server.execute(f"REVOKE {right} FROM soak")
            try:
                url = self.direct.replace("postgres@", "soak@")
                with psycopg.connect(url, autocommit=True) as connection:
                    try:
                        connection.execute(probe)
                    except psycopg.errors.InsufficientPrivilege as error:
                        seen(fault, error)
                    else:
                        raise NotDone("it is allowed")
                yield
            finally:
                self.server.execute(f"GRANT {right} TO soak")

        return begin

    def _done(self, sql, what):
        def begin(fault):
            seen(fault, len(self.server.execute(sql)))
            fault.did += what
            yield

        return begin

    def delete(self, channel):
        """Delete a channel's events; return how many."""
        sql = "DELETE FROM syncstream.event WHERE channel = %s RETURNING seq"
        return len(self.server.execute(sql, channel))

    def _delete_one(self, fault):
        ((number, nonce),) = self.server.execute(
            "DELETE FROM syncstream.event WHERE seq = (SELECT seq FROM syncstream.event"
            " WHERE channel = %s ORDER BY off DESC LIMIT 1 OFFSET 4)"
            " RETURNING off, nonce",
            HURT,
        )
        fault.newest = {HURT: f"{number:x}-{nonce:08x}"}
        seen(fault, f"{fault.newest}")
        yield

    def _truncate(self, fault):
        seen(fault, self.server.execute("SELECT count(*) FROM syncstream.event")[0][0])
        fault.did += " rows"
        self.server.execute("TRUNCATE syncstream.event")
        yield

    def faults(self):
        yield Fault("DELETE of one event", self._delete_one, [HURT], away=HURT)
        for right, probe in (
            ("SELECT ON syncstream.event", "SELECT FROM syncstream.event"),
            (
                "INSERT ON syncstream.event",
                "INSERT INTO syncstream.event DEFAULT VALUES",
            ),
        ):
            # Those who come meanwhile may be told so.
            begin = self._revoke(right, probe)
            yield Fault(f"REVOKE {right}", begin, refuses=ALL)
        yield from super().faults()
        if self.env:
            for shift in (-SHIFT, SHIFT):
                # Who is ahead finds everything too old.
                loses = ALL if shift > 0 else ()
                begin = self._move(shift)
                yield Fault(f"clock of the engine {shift:+} s", begin, loses)
        sql = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
        yield Fault("pg_terminate_backend", self._done(sql, " backends"))
        yield Fault("TRUNCATE", self._truncate, ALL)
        for word, sign in (("back", "-"), ("ahead", "+")):
            sql = (
                f"UPDATE syncstream.event SET ts = ts {sign} interval '1 hour'"
                " RETURNING seq"
            )
            loses = ALL if sign == "-" else ()
            begin = self._done(sql, " rows")
            yield Fault(f"times in the store {word}", begin, loses)


ENGINES = {"local": Local, "redis": Redis, "postgresql": PostgreSql}


def package_of(stack, commit):
    """Return a folder with the package as it was; exit where there is no history."""
    try:
        data = subprocess.run(
            ["git", "archive", commit, "syncstream"],
            cwd=ROOT,
            check=True,
            capture_output=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f"the package of {commit} cannot be had from git ({error}): run this in a"
            " clone with its history, or with --without-old"
        ) from None
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="old-"))
    subprocess.run(["tar", "-x", "-C", folder], input=data, check=True)
    return folder


class Soak:
    """One engine, its workers, clients, publishers; and the faults.

    Args:
        path: Where the package is that all workers have; empty: ours.
        old: Where that is which one more worker has; empty: there is none.
    """

    def __init__(
        self,
        engine,
        stack,
        choose,
        *,
        clients=60,
        rate=60,
        workers=WORKERS,
        path="",
        old="",
        hold=None,
    ):
        self.engine, self._random = engine, choose
        self._path, self._old_path, self._hold = path, old, hold
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-"))
        self.clock = Path(folder) / "clock"
        self.clock.write_text("0")
        self.faults, self.servers = [], []
        self._told = []  # what was published here

        def serve(kind, path, **env):
            words = ["-w", "1", "--timeout", "300"]
            if kind == "gthread":
                words += ["--threads", str(clients + 10)]
            if path:
                env["PYTHONPATH"] = os.pathsep.join((path, str(ROOT)))
            env["HUB_URL"] = engine.url
            app = "tests.apps.broker_soak_app:wrapped"
            server = LiveServer(f"gunicorn-{kind}", app, *words, env=env)
            return stack.enter_context(server)

        for place, (kind, attached) in enumerate(workers):
            # The clocks of every second one are moved.
            env = {"SOAK_CLOCK": str(self.clock)} if place % 2 else {}
            self.servers.append((serve(kind, path, **env), attached, ""))
        self._moved = [server for server, *_ in self.servers[1::2]]
        self._ours = tuple(self.servers)
        if old:
            self.servers.append((serve("gthread", old), 0, "old "))
        self.all_servers = tuple(server for server, *_ in self.servers)
        self.publishers = [
            Publisher(engine.url, f"p{place}", rate / 3, path, clock)
            for place, clock in enumerate(("", "", str(self.clock)))
        ]
        self.clients = [
            Client(self, f"client{n}", CHANNELS[n % 6], choose.random())
            for n in range(clients)
        ]
        self.clients += [
            Client(self, f"{channel}{n}", channel, choose.random(), home)
            for channel in (QUIET, DELETED)
            for n, home in enumerate(self._ours)
        ]
        for client in self.clients:
            client.start()

    def _worker(self):
        """Return a worker's process, and which one it is."""
        server, attached, _ = self._random.choice(self._ours)
        deadline = time.monotonic() + TIMEOUT
        while not (found := psutil.Process(server.pid).children()):
            if time.monotonic() > deadline:
                raise NotDone(f"{server.kind} has no worker")
            time.sleep(0.05)
        return found[0], f"{server.kind}/{attached}/{found[0].pid}"

    def _freeze(self, fault):
        worker, name = self._worker()
        worker.suspend()
        try:
            deadline = time.monotonic() + TIMEOUT
            while worker.status() != psutil.STATUS_STOPPED:
                if time.monotonic() > deadline:
                    raise NotDone(f"{name} runs")
                time.sleep(0.01)
            seen(fault, f"{name} is stopped")
            if fault.hold > MAX_AGE:  # it is gone when the worker goes on
                self._tell(QUIET)
            yield
        finally:
            worker.resume()

    def _freeze_and_delete(self, fault):
        with contextlib.contextmanager(self._freeze)(fault):
            name = fault.did
            self._tell(DELETED)
            time.sleep(0.5)  # the others get it
            seen(fault, self.engine.delete(DELETED))
            fault.did = f"{name}, {fault.did} events deleted"
            yield

    def _tell(self, channel):
        hub = broker_soak_app.open_hub(self.engine.direct)
        told = Published(*note(hub, channel, f"{channel}-{len(self._told)}"))
        hub.close()
        self._told.append(told)
        return told

    def _kill(self, fault):
        worker, name = self._worker()
        worker.kill()
        psutil.wait_procs([worker], TIMEOUT)
        seen(fault, not worker.is_running() and f"{name} is gone")
        yield

    def _move_clocks(self, shift):
        def ask(server):
            with server.get("/clock") as client:
                return float(client.rest())

        def begin(fault):
            self.clock.write_text(str(shift))
            try:
                for server in self._moved:
                    if abs(ask(server) - time.time() - shift) > 10:
                        raise NotDone(f"the clock of {server.kind} is not moved")
                seen(fault, [server.kind for server in self._moved])
                yield
            finally:
                self.clock.write_text("0")

        return begin

    def _publish_by_old(self, fault):
        url = self.engine.url
        name = f"old{len(self.publishers)}"
        publisher = Publisher(url, name, 10, self._old_path)
        self.publishers.append(publisher)
        try:
            deadline = time.monotonic() + TIMEOUT
            while not publisher.published:
                if time.monotonic() > deadline:
                    raise NotDone("it published nothing")
                time.sleep(0.05)
            yield
        finally:
            publisher.close()
        stored = [one for one in publisher.published if one.outcome == "stored"]
        seen(fault, stored and f"{name}: {len(stored)} stored")

    def all_faults(self):
        yield Fault("worker frozen beyond max_age", self._freeze, hold=1.3 * MAX_AGE)
        yield Fault("its news deleted", self._freeze_and_delete, [DELETED])
        yield Fault("worker killed", self._kill)
        yield Fault("worker frozen", self._freeze)
        for shift in (-SHIFT, SHIFT):
            yield Fault(f"clock {shift:+} s", self._move_clocks(shift))
        if self._old_path:
            yield Fault(f"old publisher ({OLD})", self._publish_by_old)
        yield from self.engine.faults()

    def disturb(self, until):
        """Do one fault after the other."""
        faults = []
        for channel in (QUIET, DELETED):  # their clients have an id
            self._tell(channel)

        def pause(seconds):
            time.sleep(min(seconds, max(0, until - time.monotonic())))

        while not self.faults or time.monotonic() < until:
            faults = faults or [*self.all_faults()]
            fault = faults.pop(0)
            absent = [one for one in self.clients if one.channel == fault.away][::2]
            for client in absent:
                client.leave()
            if absent:
                pause(1.5)
            fault.start = time.monotonic()
            self.faults.append(fault)
            try:
                with contextlib.contextmanager(fault.begin)(fault):
                    if absent:  # some come to workers that have not heard it live
                        for server, *_ in self._random.sample(self._ours, 2):
                            for worker in psutil.Process(server.pid).children():
                                worker.kill()
                    for client in absent:
                        client.may_come.set()
                    pause(self._hold or fault.hold)
            except (
                *(NotDone, OSError, ValueError, subprocess.SubprocessError),
                *(psutil.Error, sqlite3.Error, redis.RedisError, psycopg.Error),
            ) as error:
                fault.problem = f"NOT DONE: {error!r}"
            finally:
                for client in absent:
                    client.may_come.set()
            fault.end = time.monotonic()
            print(
                f"  {fault.start:.2f} {fault.name}: {fault.end - fault.start:.1f} s;"
                f" {fault.problem or fault.did.strip()}",
                flush=True,
            )
            pause(PAUSE)

    def finish(self):
        """Publish a last event of each channel; return who has not got it."""
        # As at the end of a deploy: their clients go to the others.
        self.servers = list(self._ours)
        for server in self.all_servers[len(self._ours) :]:
            server.stop()
        for publisher in self.publishers:
            if publisher.is_alive():
                publisher.close()
        last = {}
        deadline = time.monotonic() + WITHIN
        for channel in ALL:
            while channel not in last and time.monotonic() < deadline:
                told = self._tell(channel)
                if told.outcome == "stored":
                    last[channel] = told.data

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
        published = list(self._told)
        for publisher in self.publishers:
            published += publisher.published
        return found, published


def soak(kind, seconds, choose, commit="", with_old=False, **options):
    """Run one engine; print its summary; return whether all promises were kept."""
    print(f"{kind}:", flush=True)
    with contextlib.ExitStack() as stack:
        path = package_of(stack, commit) if commit else ""
        old = package_of(stack, OLD) if with_old else ""
        engine = ENGINES[kind](stack, path)
        if kind == "postgresql" and not engine.env:
            print("  its clock is not moved: there is no libfaketime")
        run = Soak(engine, stack, choose, path=path, old=old, **options)
        run.disturb(time.monotonic() + seconds)
        hung, published = run.finish()
        clients = {one.name: (one.channel, one.record) for one in run.clients}
        reads_write = with_old and kind == "redis"
        verdict = judge(published, clients, run.faults, reads_write=reads_write)
        logs = [server.log() for server in run.all_servers]
        tracebacks = sum(server.tracebacks() for server in run.all_servers)
    counts = verdict.counts
    statuses = {k: n for k, n in sorted(counts.items()) if k.startswith("status")}
    not_done = [fault for fault in run.faults if fault.problem]
    denied = sum(log.count("so its subscribers are ended") for log in logs)
    print(
        f"  published {len(published)}, acknowledged {counts['stored']}, uncertain"
        f" {counts['Uncertain']}, not stored {counts['Unavailable']}; delivered"
        f" {counts['delivered']}; resets {counts['resets']}, of these not needed"
        f" {counts['false resets']}; holes {counts['hole']}, doubles"
        f" {counts['double']}, disorder {counts['disorder']}; hung {len(hung)};"
        f" by the old worker {counts['by the old worker']}; names denied {denied},"
        f" refused {statuses}; tracebacks {tracebacks}; faults {len(run.faults)}, of"
        f" these not done {len(not_done)}"
    )
    for line in verdict.false_resets[:20]:
        print(f"  RESET THAT WAS NOT NEEDED {line}")
    for line in verdict.broken[:40]:
        print(f"  BROKEN {line}")
    for client in hung:
        print(f"  HUNG {client.name}, {client.channel}, last {client.record[-1:]}")
    for fault in not_done:
        print(f"  {fault.name} {fault.problem}")
    found = verdict.broken or verdict.false_resets or hung or not_done
    return not found and counts["delivered"] > 0


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--engine", choices=[*ENGINES, "all"], default="all")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument(
        "--without-old", action="store_true", help="no worker of an older release"
    )
    parser.add_argument(
        "--package", metavar="COMMIT", help="all run this one's package"
    )
    parser.add_argument("--publish", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--rate", type=float, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.publish:
        publish(words.publish, words.url, words.rate)
        return
    print(f"seed {words.seed}", flush=True)
    kinds = ENGINES if words.engine == "all" else [words.engine]
    options = {
        "commit": words.package,
        "with_old": not words.without_old and not words.package,
    }
    kept = [
        soak(kind, words.minutes * 60, random.Random(words.seed), **options)
        for kind in kinds
    ]
    sys.exit(0 if all(kept) else 1)


if __name__ == "__main__":
    main()
