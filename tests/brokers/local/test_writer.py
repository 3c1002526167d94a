"""Publishers that are killed, held up, or have no room; and many at once."""

import contextlib
import os
import random
import sqlite3
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from syncstream.brokers.local import writer
from syncstream.brokers.local.append import Appender
from syncstream.brokers.local.files import Lock
from syncstream.errors import Unavailable
from tests.brokers.local.logs import kept, payloads, running
from tests.support.pairs import check_script
from tests.support.programs import lack
from tests.support.waits import TIMEOUT, await_true

PUBLISHER = """
import sys
from syncstream.brokers.local import LocalBroker
broker = LocalBroker(sys.argv[1], capacity=100_000)
name = sys.argv[2]
number = 0
while True:
    broker.publish([("a", f"{name} {number + n}".encode()) for n in range(3)])
    print(number + 2, flush=True)
    number += 3
"""


def test_a_publisher_that_is_killed(make, folder):
    """Nothing acknowledged is lost, nothing is half there; the others go on."""
    broker = make(capacity=100_000)
    choose = random.Random(0)
    acknowledged = {}
    for name in range(8):
        with running(PUBLISHER, f"local:{folder}/log", str(name)) as process:
            lines = [process.stdout.readline()]
            limit = time.monotonic() + choose.uniform(0.01, 0.15)
            while time.monotonic() < limit:
                broker.publish([("a", b"us 0")])
            process.kill()
            lines += process.stdout.readlines()
        whole = [line for line in lines if line.endswith("\n")]
        acknowledged[b"%d" % name] = int(whole[-1])
        # It would give up if it were held up for five seconds, as those above.
        broker.publish([("a", b"us 0")])
    found = [payload.split() for payload in payloads(broker)]
    for name, last in acknowledged.items():
        numbers = [int(number) for who, number in found if who == name]
        assert numbers == [*range(len(numbers))]
        assert len(numbers) > last
        assert len(numbers) % 3 == 0
    with contextlib.closing(sqlite3.connect(f"{folder}/log/log.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


STOPS_WITHIN = """
import sys
from syncstream.brokers.local import LocalBroker
from syncstream.brokers.local.append import Appender
store = Appender.store
def stop(self, items):
    ids = store(self, items)
    print("within", flush=True)
    sys.stdin.read()
    return ids
broker = LocalBroker(sys.argv[1], publish_timeout=float(sys.argv[2]))
Appender.store = stop
try:
    broker.publish([("a", b"lost")])
except Exception as error:
    print(type(error).__name__, flush=True)
broker.close(0.1)
"""


def test_a_publisher_that_is_killed_within_its_transaction(make, folder):
    """All its events are gone, its lock, too; who has waited goes on at once."""
    broker = make(publish_timeout=None)
    broker.publish([("a", b"1")])
    with running(STOPS_WITHIN, f"local:{folder}/log", "60") as process:
        assert process.stdout.readline() == "within\n"
        waiting = threading.Thread(target=broker.publish, args=([("a", b"2")],))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        process.kill()
        waiting.join(TIMEOUT)
        assert not waiting.is_alive()
    assert payloads(broker) == [b"1", b"2"]


@contextlib.contextmanager
def in_haste(broker, timeout):
    """Have a broker give up sooner, for a while.

    From its first publish on it would have this time for what opens files, too.
    """
    writer = broker.process.writer
    before, writer.timeout = writer.timeout, timeout
    try:
        yield
    finally:
        writer.timeout = before


def test_who_is_held_up_gives_up(make, folder):
    """Not begun is `Unavailable`, and it is not stored later; reads go on."""
    patient, hasty = make(), make()
    patient.publish([("a", b"1")])
    hasty.publish([("a", b"2")])
    with running(STOPS_WITHIN, f"local:{folder}/log", "60") as process:
        assert process.stdout.readline() == "within\n"
        began = time.monotonic()
        with in_haste(hasty, 0.2), pytest.raises(Unavailable, match=r"within 0\.2 s"):
            hasty.publish([("a", b"never")])
        assert time.monotonic() - began < 5
        assert payloads(hasty) == [b"1", b"2"]
    patient.publish([("a", b"3")])
    hasty.publish([("a", b"4")])
    assert payloads(hasty) == [b"1", b"2", b"3", b"4"]


def test_who_is_held_up_within_its_transaction_is_uncertain(folder):
    """It may be stored."""
    script = STOPS_WITHIN.replace("try:\n", BUSY + "try:\n")
    with running(script, f"local:{folder}/log", "3") as process:
        assert process.stdout.readline() == "within\n"
        assert process.stdout.readline() == "Uncertain\n"


# So that the writer's thread does it, which can be waited for with a limit: another one
# is publishing, until somebody waits.
BUSY = """
import threading, time
writes = threading.Event()
def wait(self, items):
    ids = store(self, items)
    writes.set()
    while not broker.process.writer.waiting:
        time.sleep(0.001)
    Appender.store = stop
    return ids
Appender.store = wait
threading.Thread(target=broker.publish, args=([("a", b"first")],)).start()
writes.wait()
"""


def test_a_locked_database(make, folder):
    """By somebody else's tool: publishes wait, give up, and then go on."""
    broker = make()
    broker.publish([("a", b"1")])
    with contextlib.closing(sqlite3.connect(f"{folder}/log/log.db")) as connection:
        connection.execute("BEGIN IMMEDIATE")
        with in_haste(broker, 0.5), pytest.raises(Unavailable, match=r"within 0\.5 s"):
            broker.publish([("a", b"never")])
        assert payloads(broker) == [b"1"]
        waiting = threading.Thread(target=broker.publish, args=([("a", b"2")],))
        waiting.start()
        await_true(lambda: broker.process.writer.waiting)
        connection.rollback()
        waiting.join(TIMEOUT)
    assert payloads(broker) == [b"1", b"2"]


FULL = """
import sys
from syncstream.brokers.local import LocalBroker
from syncstream.errors import Unavailable
broker = LocalBroker(sys.argv[1], publish_timeout=5)
stored = 0
try:
    while True:
        broker.publish([("a", b"%08d" % stored + b"x" * 10_000)])
        stored += 1
except Unavailable as error:
    print(stored, error, flush=True)
sys.stdin.readline()
broker.publish([("a", b"%08d" % stored)])
entries = broker.read("a", "0").entries
print([int(e.payload[:8]) for e in entries] == [*range(stored + 1)])
broker.close()
"""


def test_a_full_disk(folder):
    """Nothing was stored, and says so; with room again it goes on."""
    disk = f"{folder}/disk"
    os.mkdir(disk)
    words = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk]
    if os.geteuid() or subprocess.run(words, capture_output=True).returncode:
        lack("no tmpfs can be mounted: run as root")
    try:
        with open(f"{disk}/ballast", "wb") as file:
            file.write(bytes(500_000))
        with running(FULL, f"local:{disk}/log") as process:
            stored, _, reason = process.stdout.readline().partition(" ")
            assert int(stored) > 10
            assert "full" in reason
            os.unlink(f"{disk}/ballast")
            print(file=process.stdin, flush=True)
            assert process.stdout.readline() == "True\n"
            assert process.wait(TIMEOUT) == 0
    finally:
        subprocess.run(["umount", disk], check=True)


TOO_BIG = """
import resource, sys
from syncstream.brokers.local import LocalBroker
broker = LocalBroker(sys.argv[1])
broker.publish([("a", b"1")])
size = 100_000
resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
try:
    while True:
        broker.publish([("a", b"x" * 5000)])
except Exception as error:
    print(type(error).__name__)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
broker.publish([("a", b"2")])
print(broker.read("a", "0").entries[-1].payload)
broker.close()
"""


def test_a_disk_that_fails(folder):
    """A commit that could not be written: it may be stored."""
    lines = check_script(TOO_BIG, f"local:{folder}/log").splitlines()
    assert lines == ["Uncertain", "b'2'"]


STAYS_DOWN = """
import os, resource, sys, time
from syncstream.brokers.local import LocalBroker
from tests.support.waits import await_true
from syncstream.errors import Uncertain
class Told:
    states = []
    def deliver(self, channel, entry):
        pass
    def resync(self, channels):
        pass
    def state(self, is_up, reason):
        self.states.append(is_up)
tries = []
def statvfs(path, real=os.statvfs):
    tries.append(path)
    return real(path)
def wait_until(condition):
    await_true(condition, lambda: (tries, Told.states))
os.statvfs = statvfs
broker = LocalBroker(sys.argv[1])
broker.attach(Told())
broker.publish([("a", b"1")])
broker.watch("a")
size = os.stat(f"{broker.path}/log.db-wal").st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
try:
    broker.publish([("a", b"2")])
except Uncertain:
    pass
wait_until(lambda: len(tries) >= 3)
assert Told.states == [False], Told.states
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
wait_until(lambda: Told.states == [False, True])
broker.close()
"""


def test_a_disk_that_fails_is_down_until_it_works(folder):
    """Nothing else says so: a quota, a file system that went read-only."""
    check_script(STAYS_DOWN, f"local:{folder}/log")


NO_RIGHTS = """
import os, sys
from syncstream.brokers.local import LocalBroker
from syncstream.errors import Unavailable
folder, user = sys.argv[1], int(sys.argv[2])
if user:
    os.setgid(user)
    os.setuid(user)
broker = LocalBroker(f"local:{folder}/log", publish_timeout=2)
for call in (
    lambda: broker.publish([("a", b"x")]),
    lambda: broker.read("a", None),
    lambda: broker.watch("a"),
):
    try:
        call()
    except Unavailable as error:
        print(folder in str(error))
broker.close()
"""


@pytest.mark.parametrize("is_made", [False, True], ids=["new", "there"])
def test_a_folder_that_is_read_only(make, folder, is_made):
    """Nothing was stored, and says so."""
    if is_made:
        make().publish([("a", b"x")])
        os.chmod(f"{folder}/log", 0o555)
    os.chmod(folder, 0o555)
    try:
        user = "65534" if os.geteuid() == 0 else "0"
        assert check_script(NO_RIGHTS, folder, user) == "True\n" * 3
    finally:
        os.chmod(folder, 0o700)
        if is_made:
            os.chmod(f"{folder}/log", 0o700)


def test_many_publish_at_once_in_one_transaction(make, folder):
    """Who waits for the same turn shares it; each has its own ids, in its order."""
    broker = make(publish_timeout=None)
    broker.publish([("a", b"-1")])
    ids = {}
    with running(STOPS_WITHIN, f"local:{folder}/log", "60") as process:
        assert process.stdout.readline() == "within\n"

        def publish(who):
            ids[who] = broker.publish([("a", b"%d" % who), ("a", b"%d" % who)])

        threads = [threading.Thread(target=publish, args=(n,)) for n in range(20)]
        for thread in threads:
            thread.start()
        await_true(lambda: broker.process.writer.waiting == 20)
    for thread in threads:
        thread.join(TIMEOUT)
    entries = {entry.id: entry.payload for entry in kept(broker)}
    for who, own in ids.items():
        assert [entries[id] for id in own] == [b"%d" % who] * 2
    assert len(entries) == 41
    with contextlib.closing(sqlite3.connect(f"{folder}/log/log.db")) as connection:
        (times,) = connection.execute(
            "SELECT count(DISTINCT time) FROM event"
        ).fetchone()
    assert times <= 3


def test_a_hub_is_not_held_up_by_a_commit(make, monkeypatch):
    """Under gevent a native thread stores what greenlets publish."""
    gevent = pytest.importorskip("gevent")
    threads, store = [], Appender.store

    def noted(self, items):
        threads.append(threading.get_native_id())
        return store(self, items)

    monkeypatch.setattr(Appender, "store", noted)
    broker = make()
    for _ in range(3):
        gevent.spawn(broker.publish, [("a", b"x")]).get(timeout=TIMEOUT)
    assert len(threads) == 3
    assert threading.get_native_id() not in threads


def test_waiting_jobs_go_first(make, folder, monkeypatch):
    """A publisher that finds nobody writing overtakes none of them."""
    asleep, wake = threading.Event(), threading.Event()

    def sleep(seconds):
        asleep.set()
        wake.wait(TIMEOUT)

    broker = make()
    broker.publish([("a", b"1")])
    monkeypatch.setattr(writer, "native", lambda module, name: sleep)
    with contextlib.closing(sqlite3.connect(f"{folder}/log/log.db")) as connection:
        connection.execute("BEGIN IMMEDIATE")
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(broker.publish, [("a", b"2")])
            assert asleep.wait(TIMEOUT)  # the writer's thread, between two tries
            connection.rollback()
            second = pool.submit(broker.publish, [("a", b"3")])
            waiting = broker.process.writer
            await_true(lambda: second.done() or waiting.waiting == 2)
            wake.set()
            first.result(TIMEOUT)
            second.result(TIMEOUT)
    assert payloads(broker) == [b"1", b"2", b"3"]


@pytest.mark.parametrize(("size", "commits"), [(523_288, [2, 1]), (523_287, [3])])
def test_a_transaction_is_bounded(make, monkeypatch, size, commits):
    """What waits is stored in groups, each up to the one that reaches 1 MiB."""
    stored, store = [], Appender.store

    def noted(self, items):
        stored.append(len(items))
        return store(self, items)

    broker = make()
    broker.publish([("a", b"0")])
    monkeypatch.setattr(Appender, "store", noted)
    lock = Lock(broker.path, False)
    lock.acquire()
    try:
        with ThreadPoolExecutor(3) as pool:
            ids = [pool.submit(broker.publish, [("a", b"x" * size)]) for _ in range(3)]
            await_true(lambda: broker.process.writer.waiting == 3)
            lock.release()
            assert len({id.result(TIMEOUT)[0] for id in ids}) == 3
    finally:
        lock.close()
    assert stored == commits
