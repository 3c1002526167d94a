"""One process's part of a broker: threads, descriptors, forks, its end."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import threading

import pytest

from syncstream.brokers.local.database import Database
from syncstream.errors import Unavailable
from tests.brokers.local.logs import payloads, running
from tests.brokers.sinks import Told
from tests.support.pairs import check_script
from tests.support.waits import TIMEOUT, await_true

NO_DESCRIPTORS = """
import contextlib, os, resource, sys, time
from syncstream.brokers.local import LocalBroker
from tests.support.waits import await_true
from syncstream.errors import Unavailable
class Told(list):
    states = []
    def deliver(self, channel, entry):
        self.append(entry.payload)
    def resync(self, channels):
        pass
    def state(self, is_up, reason):
        self.states.append(is_up)
def wait_until(condition):
    await_true(condition, lambda: (told, told.states))
@contextlib.contextmanager
def none_left():
    taken = []
    try:
        while True:
            taken.append(os.dup(0))
    except OSError:
        yield
    finally:
        for fd in taken:
            os.close(fd)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
broker, told = LocalBroker(sys.argv[1]), Told()
broker.attach(told)
with none_left():
    for call in (
        lambda: broker.publish([("a", b"x")]),
        lambda: broker.read("a", None),
        lambda: broker.watch("a"),
    ):
        try:
            call()
        except Unavailable as error:
            assert "Too many open files" in str(error), error
        else:
            raise AssertionError("it needs none")
broker.watch("a")
broker.read("a", None)
broker.publish([("a", b"1")])
wait_until(lambda: told == [b"1"])
(name,) = os.listdir(f"{broker.path}/wake")
with none_left():
    os.unlink(f"{broker.path}/wake/{name}")
    broker.publish([("a", b"2")])
    wait_until(lambda: not told.states[-1])
wait_until(lambda: told == [b"1", b"2"])
assert told.states == [False, True] * 2, told.states
broker.publish([("a", b"3")])
wait_until(lambda: told == [b"1", b"2", b"3"])
broker.close()
"""


def test_no_descriptor_is_left(folder):
    """It is `Unavailable`; whoever listens does so again when there are some."""
    check_script(NO_DESCRIPTORS, f"local:{folder}/log")


def test_no_thread_is_left(make, folder):
    """It is `Unavailable`, nothing is stored later, and it works when there is one."""
    broker, told = make(), Told()
    broker.attach(told)
    before = threading.stack_size(1 << 46)  # bytes, which no machine has
    try:
        with pytest.raises(Unavailable, match="cannot start a thread"):
            broker.publish([("a", b"never")])
        with pytest.raises(Unavailable, match="cannot start a thread"):
            broker.watch("a")
        make().close()
    finally:
        threading.stack_size(before)
    assert os.listdir(f"{folder}/log/wake") == []
    broker.watch("a")
    broker.publish([("a", b"x")])
    assert payloads(broker) == [b"x"]
    await_true(lambda: told.payloads == [b"x"])
    broker.publish([("a", b"y")])
    assert told.states == [False, True]


FORK = """
import os, signal, sys, time
from syncstream import Hub
url, kind = sys.argv[1:]
if kind == "gevent":
    from gevent import monkey
    monkey.patch_all()
hub = Hub(url)
if kind != "preload":
    hub.publish("a", "parent")
    before = hub.subscribe("a")
    before.read(0)
child = os.fork()
if child:
    hub.publish("a", "forked")
    sys.stdin.readline()
    if kind != "preload":
        found = []
        while "forked" not in found:
            new = before.read(15)
            assert new
            found += [event.data for event in new]
    hub.close()
    print("parent is done", flush=True)
    os.waitpid(child, 0)
else:
    print(os.getpid(), flush=True)
    subscription = hub.subscribe("a")
    subscription.read(0)
    hub.publish("a", "child")
    while "from outside" not in (found := [e.data for e in subscription.read(15)]):
        print(found, flush=True)
        assert found
    print("child is done", flush=True)
    os._exit(0)
"""


@pytest.mark.parametrize("kind", ["preload", "threads", "gevent"])
def test_fork(make, folder, kind):
    """A forked child has all of its own; both go on."""
    if kind == "gevent":
        pytest.importorskip("gevent")
    broker = make()
    with running(FORK, f"local:{folder}/log", kind) as process:
        child = int(process.stdout.readline())
        try:
            while "child" not in (line := process.stdout.readline()):
                assert line
            broker.publish([("a", b"data: from outside\n\n")])
            while line != "child is done\n":
                line = process.stdout.readline()
                assert line
            print(file=process.stdin, flush=True)
            assert process.stdout.readline() == "parent is done\n"
            assert process.wait(TIMEOUT) == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
    expected = ["child", "forked", "from outside"]
    if kind != "preload":
        expected.append("parent")
    assert sorted(payloads(broker)) == [f"data: {e}\n\n".encode() for e in expected]


FORK_IN_THE_MIDST = """
import os, sys, threading
from syncstream import Hub
from syncstream.brokers import open_broker
broker, count = open_broker(sys.argv[1], capacity=100_000), int(sys.argv[2])
hub = Hub(broker=broker)
subscription = hub.subscribe("a")
subscription.read(0)
is_over, published, reads = threading.Event(), [], []
def publish():
    while not is_over.is_set():
        published.extend(hub.publish_many("a", ["x"] * 5))
def read():
    while not is_over.is_set():
        broker.read("a", "0-0")
        reads.append(None)
threads = [
    threading.Thread(target=each, daemon=True) for each in (publish, publish, read)
]
for thread in threads:
    thread.start()
ids = []
def take():
    found = subscription.read(15)
    assert found and "reset" not in {event.event for event in found}, found
    ids.extend(event.id for event in found)
for number in range(count):
    child = os.fork()
    if not child:
        mine, found = hub.subscribe("a"), []
        mine.read(0)
        hub.publish("a", f"child {number}")
        while f"child {number}" not in found:
            new = [event.data for event in mine.read(15)]
            assert new
            found += new
        hub.close()
        os._exit(0)
    take()
    assert os.waitpid(child, 0)[1] == 0
    print(number, flush=True)
assert all(thread.is_alive() for thread in threads)
is_over.set()
for thread in threads:
    thread.join()
assert len(reads) >= count
while len(ids) < len(published) + count:
    take()
assert len(set(ids)) == len(ids) == len(published) + count
assert set(published) < set(ids)
hub.close()
"""


def test_forks_in_the_midst_of_everything(folder):
    """While others write, read and listen: children and parent go on, all is there."""
    count = 30
    with running(FORK_IN_THE_MIDST, f"local:{folder}/log", str(count)) as process:
        assert process.stdout.read().split() == [str(n) for n in range(count)]
        assert process.wait(TIMEOUT) == 0


FORK_UNSAID = """
import ctypes, os, sys, time
from syncstream.brokers.local import LocalBroker
from syncstream.errors import Unavailable
used, idle = LocalBroker(sys.argv[1]), LocalBroker(sys.argv[1])
used.publish([("a", b"parent")])

def threads():
    # What the kernel counts of the others.
    found = []
    for number in {*os.listdir("/proc/self/task")} - {str(os.getpid())}:
        with open(f"/proc/self/task/{number}/status") as status:
            lines = status.read().splitlines()
        found += sorted(line for line in lines if line.startswith(("State", "Pid")))
        found += [line for line in lines if "ctxt_switches" in line]
    return found

# The writer's thread has to be idle: of one that is about to take the GIL the child
# would have its mutex, locked. It is if it slept on while it could have had the GIL.
time.sleep(0.2)
if sys.platform == "linux":
    before = None
    while (now := threads()) != before or "State:\\tR (running)" in now:
        before = now
        time.sleep(0.05)
child = ctypes.PyDLL(None).fork()
if not child:
    for each in (
        lambda: used.publish([("a", b"x")]),
        lambda: used.read("a", None),
    ):
        try:
            each()
        except Unavailable as error:
            assert "lazy-apps" in str(error), error
        else:
            raise AssertionError("used what SQLite knows of another process")
    used.close()
    idle.publish([("a", b"child")])
    idle.close()
    print("right", flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
used.publish([("a", b"parent again")])
used.close()
"""


def test_a_fork_that_nobody_announces(make, folder):
    """uWSGI's: a child that would use its parent's files says what to do instead."""
    with running(FORK_UNSAID, f"local:{folder}/log") as process:
        assert process.stdout.read() == "right\n"
        assert process.wait(TIMEOUT) == 0
    assert payloads(make()) == [b"parent", b"child", b"parent again"]


FORK_AND_DIE = """
import os, sys, threading
from syncstream.brokers.local import LocalBroker
from syncstream.brokers.local.files import Lock
broker = LocalBroker(sys.argv[1])
broker.publish([("a", b"1")])
broker.watch("a")
acquire, is_held = Lock.acquire, threading.Event()
def hold(self, timeout=None):
    acquire(self, timeout)
    is_held.set()
    threading.Event().wait()
Lock.acquire, Lock.try_acquire = hold, lambda self: False
publish = threading.Thread(target=broker.publish, args=([("a", b"2")],), daemon=True)
publish.start()
is_held.wait()
child = os.fork()
if not child:
    print(os.getpid(), flush=True)
    sys.stdin.read()
    os._exit(0)
sys.stdin.read()
"""


def test_a_child_does_not_keep_what_its_killed_parent_held(make, folder):
    """Neither the lock nor the socket: both go with the parent."""
    broker = make()
    with running(FORK_AND_DIE, f"local:{folder}/log") as process:
        child = int(process.stdout.readline())
        try:
            assert len(os.listdir(f"{folder}/log/wake")) == 1
            process.kill()
            process.wait()
            broker.publish([("a", b"2")])
            assert payloads(broker) == [b"1", b"2"]
            assert os.listdir(f"{folder}/log/wake") == []
        finally:
            os.kill(child, signal.SIGKILL)


HUB_GOES_ON = """
import fcntl, sys
from gevent import monkey
monkey.patch_all()
import gevent
from syncstream.brokers.local import LocalBroker
broker = LocalBroker(sys.argv[1])
broker.publish([("a", b"1")])
other = open(f"{broker.path}/lock", "r+")
fcntl.flock(other, fcntl.LOCK_EX)
publisher = gevent.spawn(broker.publish, [("a", b"2")])
for _ in range(20):
    gevent.sleep(0.01)
    assert not publisher.ready()
    assert len(broker.read("a", "0").entries) == 1
fcntl.flock(other, fcntl.LOCK_UN)
publisher.get(timeout=5)
other.close()
try:
    with gevent.Timeout(0.05, False):
        fcntl.flock(held := open(f"{broker.path}/lock"), fcntl.LOCK_EX)
        broker.publish([("a", b"never")])
finally:
    held.close()
broker.publish([("a", b"3")])
assert [e.payload for e in broker.read("a", "0").entries] == [b"1", b"2", b"3"]
broker.close()
"""


def test_a_hub_is_never_held_up(folder):
    """Its greenlets run while one of them waits for another process."""
    pytest.importorskip("gevent")
    check_script(HUB_GOES_ON, f"local:{folder}/log")


DROPPED = """
import gc, os, sys, threading, time
if sys.argv[2] == "gevent":
    from gevent import monkey
    monkey.patch_all()
from syncstream import Hub
from syncstream.brokers.local import LocalBroker
from tests.support.waits import await_true
folder, count = sys.argv[1], 100
def wait_until(condition):
    def holds():
        gc.collect()
        return condition()
    await_true(holds, lambda: (descriptors(), threads()))
def descriptors():
    return len(os.listdir("/proc/self/fd"))
def threads():
    return len(os.listdir("/proc/self/task"))
def publish():
    while not is_over.is_set():
        first.publish([("a", b"x")])
is_over = threading.Event()
time.sleep(0.001)  # the descriptors of gevent's hub are not ours
before = descriptors(), threads()
first = LocalBroker(f"local:{folder}/log")
first.publish([("a", b"x")])
first.watch("a")
publisher = threading.Thread(target=publish)
publisher.start()
for number in range(count):
    hub = Hub(f"local:{folder}/log")
    hub.publish("b", number)
    if not number % 10:
        hub.subscribe("b").read(0)
    hub.itself = hub  # so that a garbage collection finds it
    del hub
    if not number % 50:
        gc.collect()
is_over.set()
publisher.join()
wait_until(lambda: threads() <= before[1] + 3)
assert len(os.listdir(f"{folder}/log/wake")) == 1
events = first.read("b", "0").entries
assert len(events) == count, len(events)
assert first.publish([("a", b"y")])
first.close()
# Not before: SQLite keeps a file's descriptors while the process has locks of it.
wait_until(lambda: descriptors() <= before[0] and threads() <= before[1])
assert sorted(os.listdir(f"{folder}/log")) == ["lock", "log.db", "wake"]
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc shows what is left")
@pytest.mark.parametrize("kind", ["threads", "gevent"])
def test_brokers_that_are_dropped_leave_nothing(folder, kind):
    """Hubs that nobody closes: no descriptor, thread or file; others publish."""
    if kind == "gevent":
        pytest.importorskip("gevent")
    with running(DROPPED, folder, kind, stderr=subprocess.PIPE) as process:
        _, errors = process.communicate(timeout=4 * TIMEOUT)
        errors = [line for line in errors.splitlines() if "hubs" not in line]
        assert (process.returncode, errors) == (0, [])


def test_a_file_that_cannot_be_closed_before_a_fork_is_named(
    make, folder, monkeypatch, caplog
):
    """All others are, and the parent goes on."""
    broker = make()
    broker.publish([("a", b"1")])
    assert payloads(broker) == [b"1"]
    process, close, closed = broker.process, Database.close, []

    def failing(database):
        closed.append(database)
        if len(closed) == 1:
            raise sqlite3.OperationalError("disk I/O error")
        close(database)

    monkeypatch.setattr(Database, "close", failing)
    process.pause()
    try:
        assert len(closed) == 3
        (record,) = caplog.records
        assert record.levelname == "ERROR"
        assert f"{folder}/log could not be closed before a fork" in record.message
    finally:
        process.resume()
    monkeypatch.undo()
    broker.publish([("a", b"2")])
    assert payloads(broker) == [b"1", b"2"]


def test_no_file_is_open_while_a_fork_is_prepared(make):
    """Whoever wants one waits until the fork is over."""
    broker = make()
    broker.publish([("a", b"1")])
    process = broker.process
    assert process.has_files
    process.pause()
    assert not process.has_files
    waiting = threading.Thread(target=broker.publish, args=([("a", b"2")],))
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    assert not process.has_files
    process.resume()
    waiting.join(TIMEOUT)
    assert payloads(broker) == [b"1", b"2"]
