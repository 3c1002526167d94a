"""``local:``: the contract, between processes too; and whatever may fail, fails."""

import contextlib
import fcntl
import itertools
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from syncstream import Gap, Hub
from syncstream.brokers import open_broker
from syncstream.brokers.local import LocalBroker, append
from syncstream.brokers.local import files as files_module
from syncstream.brokers.local import listener as listener_module
from syncstream.brokers.local.threads import Job, Thread
from syncstream.errors import PayloadTooLarge, Unavailable
from syncstream.runtime.journal import journal
from syncstream.testing import check_broker
from tests.brokers.processes import Node, Spread
from tests.support.live import unique_key
from tests.support.pairs import check_script, come_and_go, read_for_the_newest
from tests.support.programs import lack, need_root
from tests.support.waits import TIMEOUT, await_true

FORMATS = Path(__file__).parent / "formats"

CONTRACT = """
import itertools, sys
from gevent import monkey
monkey.patch_all()
from tests.brokers.processes import Node, Spread
from syncstream.brokers.local import LocalBroker
from syncstream.testing import check_broker
folder, count, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
nodes = [Node("gevent") for _ in range(count)]
names = itertools.count()
def make(**options):
    return lambda: Spread(f"local:{folder}/{next(names)}", nodes, **options)
check_broker(make(), rounds=rounds)
check_broker(make(capacity=100), capacity=100, rounds=rounds // 2)
check_broker(make(max_age=0.5), max_age=0.5)
for node in nodes:
    node.close()
"""


@pytest.fixture
def folder():
    """A folder with a short name: sockets are in it."""
    with tempfile.TemporaryDirectory(prefix="ss-") as path:
        yield path


@pytest.fixture
def make(folder):
    """Make brokers of one log; they are closed."""
    with contextlib.ExitStack() as stack:

        def make(name="log", **options):
            broker = LocalBroker(f"local:{folder}/{name}", **options)
            stack.callback(broker.close)
            return broker

        yield make


@pytest.fixture
def channel():
    return unique_key()


class Told:
    """A sink that keeps what it is told."""

    def __init__(self):
        self.payloads = []
        self.resyncs = 0
        self.states = []

    def deliver(self, channel, entry):
        self.payloads.append(entry.payload)

    def resync(self, channels):
        self.resyncs += 1

    def state(self, is_up, reason):
        self.states.append(is_up)

    def deny(self, name, reason):
        raise AssertionError(f"{name} is refused: {reason}")


def kept(broker, channel="a"):
    """Return what is kept of a channel, which must be one chain."""
    found, last = [], "0"
    while True:
        entries = broker.read(channel, last).entries
        for before, entry in itertools.pairwise([*found[-1:], *entries]):
            assert entry.prev == before.id
        if not entries:
            return found
        found += entries
        last = entries[-1].id


def payloads(broker, channel="a"):
    return [entry.payload for entry in kept(broker, channel)]


def run(script, *words, **options):
    """Start a script in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error", "-c", script, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        **options,
    )


@contextlib.contextmanager
def running(script, *words, **options):
    """Run a script beside us; it is killed in the end."""
    with run(script, *words, **options) as process:
        try:
            yield process
        finally:
            process.kill()


# The contract.


@pytest.mark.parametrize("count", [1, 4], ids=["1-process", "4-processes"])
def test_it_keeps_the_contract_by_threads(folder, count):
    """The whole suite, with much and with little room, and by age."""
    nodes = [Node() for _ in range(count - 1)]
    names = itertools.count()

    def make(**options):
        return lambda: Spread(f"local:{folder}/{next(names)}", nodes, **options)

    def remove(broker, channel, id):
        path = f"{broker.url.partition(':')[2]}/log.db"
        number = int(id.partition("-")[0], 16)
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute(f"DELETE FROM event WHERE number = {number}")
            connection.commit()

    rounds = 300 if count == 1 else 100  # another process's publish takes longer
    check_broker(make(), rounds=rounds, remove=remove)
    check_broker(make(capacity=100), capacity=100, rounds=rounds // 2)
    check_broker(make(max_age=0.5), max_age=0.5)
    for node in nodes:
        node.close()


@pytest.mark.parametrize("count", [1, 4], ids=["1-process", "4-processes"])
def test_it_keeps_the_contract_by_greenlets(folder, count):
    """The same in processes that gevent has patched."""
    pytest.importorskip("gevent")
    check_script(CONTRACT, folder, str(count - 1), "100")


def test_nothing_is_left_behind(make, folder):
    """A broker that was closed leaves no descriptor and no socket, and one file."""
    before = os.listdir("/proc/self/fd") if sys.platform == "linux" else []
    broker = make()
    hub = Hub(broker=broker)
    subscription = hub.subscribe("a")
    subscription.read(0)
    hub.publish("a", "x")
    assert [event.data for event in subscription.read(TIMEOUT)] == ["x"]
    hub.close()
    assert os.listdir(f"{folder}/log/wake") == []
    assert sorted(os.listdir(f"{folder}/log")) == ["lock", "log.db", "wake"]
    if before:
        # Fewer: what earlier tests have dropped may be collected meanwhile.
        assert len(os.listdir("/proc/self/fd")) <= len(before)


def test_nothing_is_opened_before_it_is_used(make, folder):
    """A hub in a module costs nothing: gunicorn may preload it, and fork."""
    Hub(broker=make()).close()
    assert os.listdir(folder) == []


def test_after_close(make):
    """A closed broker says so, and makes nothing anew."""
    broker = make()
    broker.publish([("a", b"x")])
    broker.close()
    with pytest.raises(Unavailable, match="closed"):
        broker.publish([("a", b"x")])
    with pytest.raises(Unavailable, match="closed"):
        broker.read("a", None)
    broker.watch("a")
    broker.close()


def test_ids_survive_a_restart(make):
    """What was kept is there for the next process, with its ids."""
    first = make()
    ids = first.publish([("a", b"1"), ("a", b"2")])
    empty = first.read("b", None).head
    first.close()
    second = make()
    assert [entry.id for entry in second.read("a", ids[0]).entries] == ids[1:]
    assert second.read("b", empty).complete
    (third,) = second.publish([("a", b"3")])
    page = second.read("a", ids[1])
    assert page.complete
    assert [entry.id for entry in page.entries] == [third]


# Where it is.


def test_names_keep_applications_apart(monkeypatch, folder):
    """By default in a folder of this user's own."""
    monkeypatch.setattr(tempfile, "tempdir", folder)
    brokers = [open_broker(url) for url in ("local:", "local:one", "local:two.3")]
    for broker in brokers:
        broker.publish([("a", broker.path.encode())])
    for broker in brokers:
        assert payloads(broker) == [broker.path.encode()]
        broker.close()
    parent = f"{folder}/syncstream-{os.geteuid()}"
    assert sorted(os.listdir(parent)) == ["default", "one", "two.3"]
    for path in (parent, f"{parent}/default", f"{parent}/default/wake"):
        assert os.stat(path).st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "url",
    [
        *("local://host/path", "local:../x", "local:.x", "local:a/b", "local:a b"),
        *("local:" + "a" * 41, "local:/" + "a" * 80, "memory:"),
        *("local:/", "local:/a/..", "local:/a\0b"),
    ],
)
def test_other_urls_are_refused(url):
    """At once, and in words that show what came."""
    with pytest.raises(ValueError, match=r"url.* must"):
        LocalBroker(url)


@pytest.mark.parametrize("value", [0, -1.0])
def test_publish_timeout_is_checked(value):
    with pytest.raises(ValueError, match="publish_timeout must be above 0"):
        LocalBroker("local:", publish_timeout=value)


@pytest.mark.parametrize("value", [0, -1, 3, None, 4096.0, float("inf"), "1 MB"])
def test_max_size_is_checked(value):
    with pytest.raises(ValueError, match="max_size must be 4 bytes or more"):
        LocalBroker("local:", max_size=value)


@pytest.mark.parametrize("name", ["a b", "50%20off", "a?b#c", "\udcff\n", "\u2028"])
def test_a_path_is_taken_as_it_is(make, folder, name):
    """Nothing in it is decoded, and no character of a folder is refused."""
    broker, told = make(name), Told()
    broker.attach(told)
    broker.watch("a")
    broker.publish([("a", b"x")])
    await_true(lambda: told.payloads == [b"x"])
    assert os.listdir(folder) == [name]


def test_what_is_stored_as_somebody_begins_to_watch(make, monkeypatch):
    """A listener with nothing to tell of passes over what is there, and no more."""
    broker, other, told = make(), make(), Told()
    broker.attach(told)
    broker.watch("b")
    broker.unwatch("b")
    newest, is_armed = listener_module.newest, [True]

    def begin(connection):
        if is_armed:
            is_armed.clear()
            broker.watch("a")
            other.publish([("a", b"told")])
        return newest(connection)

    monkeypatch.setattr(listener_module, "newest", begin)
    other.publish([("b", b"not told")])  # wakes it
    await_true(lambda: not is_armed and (told.payloads or told.resyncs))
    assert told.payloads == [b"told"]


def test_a_private_folder_must_be_private(monkeypatch, folder):
    """Neither a link, nor somebody else's, nor open to others."""
    monkeypatch.setattr(tempfile, "tempdir", folder)
    parent = f"{folder}/syncstream-{os.geteuid()}"
    os.mkdir(f"{folder}/elsewhere", 0o700)
    os.symlink(f"{folder}/elsewhere", parent)
    with pytest.raises(Unavailable, match="must be a directory of user"):
        LocalBroker().publish([("a", b"x")])
    os.unlink(parent)
    os.mkdir(parent)
    os.chmod(parent, 0o755)
    with pytest.raises(Unavailable, match="must be closed to other users: chmod 700"):
        LocalBroker().publish([("a", b"x")])
    os.chmod(parent, 0o700)
    if os.geteuid() == 0:
        os.chown(parent, 12345, -1)
        with pytest.raises(Unavailable, match="must be a directory of user 0"):
            LocalBroker().publish([("a", b"x")])
        os.chown(parent, 0, -1)
    broker = LocalBroker()
    broker.publish([("a", b"x")])
    broker.close()
    assert os.listdir(f"{folder}/elsewhere") == []


MOUNTS = """/dev/vda / ext4 rw 0 0
tmpfs /run tmpfs rw 0 0
server:/export /srv/shared nfs4 rw 0 0
/dev/vdb /srv/shared/disk xfs rw 0 0
//server/share /mnt/with\\040space cifs rw 0 0
host /mnt/host 9p rw 0 0
ssh /mnt/ssh fuse.sshfs rw 0 0
/dev/sdc /mnt/ntfs fuseblk rw 0 0
fuse-overlayfs /box fuse.fuse-overlayfs rw 0 0
share /mnt/host/vm virtiofs rw 0 0
tmpfs /mnt/a\u2028b\x0b\x85\r tmpfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/tmp/x", None),
        ("/run/x", None),
        ("/srv/shared", "nfs4"),
        ("/srv/shared/x/y", "nfs4"),
        ("/srv/sharedx", None),
        ("/srv/shared/disk/x", None),
        ("/mnt/with space/x", "cifs"),
        ("/mnt/host/x", "9p"),
        ("/mnt/host/vm/x", "virtiofs"),
        ("/mnt/ssh/x", "fuse.sshfs"),
        ("/mnt/ntfs/x", None),
        ("/box/x", None),
    ],
)
def test_network_file_systems_are_known(path, kind, monkeypatch, folder):
    """By the mount that a path is on."""
    with open(f"{folder}/mounts", "wb") as file:
        file.write(MOUNTS.encode())
    monkeypatch.setattr(files_module, "_MOUNTS", f"{folder}/mounts")
    assert files_module._network_kind(path) == kind


def test_network_file_systems_are_refused(make, monkeypatch, folder):
    """With a message that says what to use."""
    with open(f"{folder}/mounts", "w") as file:
        file.write(f"/dev/vda / ext4 rw 0 0\nserver:/x {folder} nfs rw 0 0\n")
    monkeypatch.setattr(files_module, "_MOUNTS", f"{folder}/mounts")
    with pytest.raises(Unavailable, match=r"network file system \(nfs\).*redis:"):
        make().publish([("a", b"x")])


# What is in it.


def test_tables_of_another_version_are_refused(make, folder):
    """Newer or older: nothing is stored, and the message says what to do."""
    make().publish([("a", b"x")])
    with contextlib.closing(sqlite3.connect(f"{folder}/log/log.db")) as connection:
        connection.execute("PRAGMA user_version=77")
    broker = make()
    for call in (
        lambda: broker.publish([("a", b"x")]),
        lambda: broker.read("a", None),
        lambda: broker.watch("a"),
    ):
        with pytest.raises(Unavailable, match=r"tables of version 77.*local:NAME"):
            call()


def test_other_databases_are_refused(make, folder):
    """Nothing is written into them."""
    os.mkdir(f"{folder}/log")
    with contextlib.closing(sqlite3.connect(f"{folder}/log/log.db")) as connection:
        connection.execute("CREATE TABLE mine(x)")
    with pytest.raises(Unavailable, match="another application's database"):
        make().publish([("a", b"x")])
    with open(f"{folder}/log/log.db", "wb") as file:
        file.write(b"no database" * 1000)
    with pytest.raises(Unavailable, match="not a database"):
        make().publish([("a", b"x")])


def test_it_has_no_transactions(make):
    with pytest.raises(ValueError, match="connection must be None"):
        make().publish([("a", b"x")], connection=object())


def test_what_is_too_large_is_refused(make):
    """And what does not encode; nothing is stored."""
    broker = make(max_size=4000)
    with pytest.raises(PayloadTooLarge, match="1000 bytes at most"):
        broker.publish([("a", b"x"), ("a", b"x" * 1001)])
    with pytest.raises(UnicodeEncodeError):
        broker.publish([("a", b"x"), ("\ud800", b"x")])
    assert kept(broker) == []


def size_of(folder, suffix=""):
    return os.stat(f"{folder}/log/log.db{suffix}").st_size


def test_the_log_is_bounded(make, folder, monkeypatch):
    """By capacity: 100,000 events leave what is kept, and a small WAL."""
    monkeypatch.setattr(append, "_SEEN", 0)
    broker = make(capacity=100)
    for number in range(1000):
        broker.publish([(f"c{number % 10}", b"x" * 200)] * 100)
        assert size_of(folder, "-wal") < 32 << 20
    assert len(kept(broker, "c0")) == 100
    assert size_of(folder) < 4_000_000


def test_the_log_is_bounded_in_bytes(make, folder):
    """The oldest of all channels go; what is left of each is a chain."""
    broker = make(max_size=4 << 20)
    for number in range(3000):
        broker.publish([(f"c{number % 10}", b"x" * 10_000)])
    assert size_of(folder) < 8 << 20
    found = [len(kept(broker, f"c{n}")) for n in range(10)]
    assert 20 < min(found) <= max(found) < 60


def test_what_is_too_old_goes(make, folder):
    """In batches, not only from sight."""
    broker = make(max_age=0.2)
    broker.publish([("a", b"x" * 1000)] * 1000)
    limit = time.monotonic() + 0.3
    while time.monotonic() < limit:
        broker.publish([("b", b"x")])
    for _ in range(20):
        broker.publish([("c", b"x")] * 100)
    with contextlib.closing(sqlite3.connect(f"{folder}/log/log.db")) as connection:
        (left,) = connection.execute(
            "SELECT count(*) FROM event JOIN channel ON channel.id = event.channel"
            " WHERE name = 'a'"
        ).fetchone()
    assert left == 0
    assert broker.read("a", "0").entries == ()


def test_idle_channels_are_forgotten(make, monkeypatch):
    """When they are very many; heads of before are then unknown, not wrong."""
    monkeypatch.setattr(append, "MAX_CHANNELS", 1000)
    broker = make(max_age=0.1)
    empty = broker.read("never", None).head
    (old,) = broker.publish([("c0", b"x")])
    deadline = time.monotonic() + TIMEOUT
    number = 0
    while broker.read("c0", None).head == old:
        assert time.monotonic() < deadline
        broker.publish([(f"d{number + n}", b"x") for n in range(100)])
        number += 100
    assert not broker.read("never", empty).complete
    assert not broker.read("c0", old).complete
    lasting = make()  # or it might be too old before it is read
    lasting.publish([("c0", b"y")])
    page = lasting.read("c0", old)
    assert not page.complete
    assert [entry.payload for entry in page.entries] == [b"y"]


def test_idle_channels_are_forgotten_behind_busy_ones(make, monkeypatch):
    """They are looked at a part at a time; the next part comes after the last one."""
    monkeypatch.setattr(append, "MAX_CHANNELS", 1000)
    monkeypatch.setattr(append, "_CHANNELS", 100)
    broker = make(max_age=0.1)
    deadline, number = time.monotonic() + TIMEOUT, 0
    busy = [(f"busy{n}", b"x") for n in range(100)]
    broker.publish(busy)
    (old,) = broker.publish([("behind", b"x")])
    while broker.read("behind", None).head == old:
        assert time.monotonic() < deadline
        broker.publish([*busy, *((f"d{number + n}", b"x") for n in range(100))])
        number += 100


def test_files_that_are_replaced_while_they_are_opened(make, folder, monkeypatch):
    """Those that are there then are opened, not those that were."""
    (id,) = make().publish([("a", b"x")])
    path, connect, replaced = f"{folder}/log/log.db", sqlite3.connect, []

    def replacing(*words, **options):
        if not replaced:
            replaced.append(shutil.copy2(path, f"{path}.copy"))
            os.replace(f"{path}.copy", path)
        return connect(*words, **options)

    monkeypatch.setattr(sqlite3, "connect", replacing)
    assert make().read("a", None).head == id
    assert replaced


def test_a_sink_that_fails_is_told_that_some_are_missing(make, caplog):
    """What it has not taken; others are told as before."""

    class Failing(Told):
        def deliver(self, channel, entry):
            if not self.resyncs:
                raise LookupError("broken")
            super().deliver(channel, entry)

    broker, sink = make(), Failing()
    broker.attach(sink)
    broker.watch("a")
    broker.publish([("a", b"1")])
    await_true(lambda: sink.resyncs)
    broker.publish([("a", b"2")])
    await_true(lambda: b"2" in sink.payloads)
    assert "LookupError: broken" in caplog.text


def test_a_thread_works_when_it_is_woken():
    """Once for each time; and it tells that it has ended."""
    served = []
    thread = Thread("the log", lambda: served.append(thread.take()))
    job = Job()
    thread.add(job)
    await_true(lambda: served)
    time.sleep(0.05)
    assert served == [job]
    assert thread.close(time.monotonic() + TIMEOUT)


def test_a_clock_that_is_put_back_tears_no_hole(make, monkeypatch):
    """What follows an event that is kept is kept."""
    broker = make(max_age=60.0)
    now = time.time()
    ids = []
    for at in (now, now - 100, now):
        monkeypatch.setattr(time, "time", lambda at=at: at)
        ids += broker.publish([("a", b"x")])
    page = broker.read("a", "0")
    assert [entry.id for entry in page.entries] == ids
    page = broker.read("a", ids[0])
    assert not page.complete
    assert [entry.id for entry in page.entries] == ids
    page = broker.read("a", ids[1])
    assert page.complete


# What may fail.

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


@pytest.mark.parametrize("what", ["log", "log/log.db", "log/lock", "log/wake"])
def test_what_is_removed_while_it_is_used(make, folder, what):
    """It goes on; of what is lost who resumes, and who listens, is told."""
    broker = make()
    hub = Hub(broker=broker)
    other = make()
    (lost,) = other.publish([("a", b"data: 1\n\n")])
    subscription = hub.subscribe("a", after="start")
    assert [event.data for event in subscription.read(TIMEOUT)] == ["1"]
    # At once: what removes it piece by piece races with who makes it anew.
    os.rename(f"{folder}/{what}", f"{folder}/away")
    (id,) = other.publish([("a", b"data: 2\n\n")])
    found = []
    while not found or found[-1].data != "2":
        new = subscription.read(TIMEOUT)
        assert new
        found += new
    is_lost = what in ("log", "log/log.db")
    assert [isinstance(event, Gap) for event in found] == [True, False][not is_lost :]
    assert found[-1].id == id
    page = broker.read("a", lost)
    assert page.complete is not is_lost
    assert [entry.id for entry in page.entries] == [id]
    (third,) = broker.publish([("a", b"data: 3\n\n")])
    assert [e.id for e in kept(other)][-2:] == [id, third]
    assert [event.data for event in subscription.read(TIMEOUT)] == ["3"]
    hub.close()


def test_an_older_copy_is_another_log(make, folder):
    """Of events that are lost all are told: who had them, and who had not yet."""
    broker = make()
    told = Told()
    ids = broker.publish([("a", b"%d" % n) for n in range(5)])
    broker.close()
    shutil.copytree(f"{folder}/log", f"{folder}/copy")
    broker = make()
    lost = broker.publish([("a", b"lost %d" % n) for n in range(5)])
    broker.attach(told)
    broker.watch("a")
    for suffix in ("-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{folder}/log/log.db{suffix}")
    os.replace(f"{folder}/copy/log.db", f"{folder}/log/log.db")
    new = broker.publish([("a", b"new %d" % n) for n in range(8)])
    for id in lost:
        page = broker.read("a", id)
        assert not page.complete
        assert [entry.id for entry in page.entries] == [*ids, *new]
    page = broker.read("a", ids[-1])
    assert page.entries[0].prev != ids[-1]
    assert [entry.id for entry in page.entries] == new
    await_true(lambda: told.resyncs)


LISTENER = """
import sys
from syncstream import Hub
hub = Hub(sys.argv[1])
subscription = hub.subscribe("a")
subscription.read(0)
print("listens", flush=True)
while True:
    for event in subscription.read():
        print(event.data, flush=True)
"""


def test_a_listener_that_is_killed_leaves_nothing(make, folder):
    """Its socket goes with the next publish; the others are told."""
    broker, told = make(), Told()
    broker.attach(told)
    broker.watch("a")
    with running(LISTENER, f"local:{folder}/log") as process:
        assert process.stdout.readline() == "listens\n"
        broker.publish([("a", b"data: 1\n\n")])
        assert process.stdout.readline() == "1\n"
        assert len(os.listdir(f"{folder}/log/wake")) == 2
    broker.publish([("a", b"data: 2\n\n")])
    assert len(os.listdir(f"{folder}/log/wake")) == 1
    await_true(lambda: len(told.payloads) == 2)


def test_who_is_not_woken_looks(make, folder):
    """Twice a second, and makes its socket anew."""
    broker, told = make(), Told()
    broker.attach(told)
    broker.watch("a")
    wake = f"{folder}/log/wake"
    for name in os.listdir(wake):
        os.unlink(f"{wake}/{name}")
    make().publish([("a", b"x")])
    await_true(lambda: told.payloads == [b"x"])
    await_true(lambda: os.listdir(wake))


def test_a_socket_that_cannot_be_made_is_tried_again(make, folder):
    """Its listener goes on looking, and says what is the matter, until then."""
    broker, told = make(), Told()
    broker.attach(told)
    broker.watch("a")
    for attempt in itertools.count():
        os.rename(f"{folder}/log/wake", f"{folder}/away-{attempt}")
        with contextlib.suppress(FileExistsError):  # the listener was faster
            os.symlink(f"{folder}/nowhere", f"{folder}/log/wake")
            break
    await_true(lambda: told.states == [False])
    os.unlink(f"{folder}/log/wake")
    await_true(lambda: told.states == [False, True])
    make().publish([("a", b"x")])
    await_true(lambda: told.payloads == [b"x"])
    assert len(os.listdir(f"{folder}/log/wake")) == 1


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


def test_times_of_whole_seconds_hide_no_listener(make, folder, monkeypatch):
    """One that comes in the second of the last look is woken all the same."""
    monkeypatch.setattr(listener_module, "LOOK_EVERY", 3600.0)
    publisher, listener, told = make(), make(), Told()
    publisher.publish([("a", b"1")])
    second = int(time.time()) * 1_000_000_000
    monkeypatch.setattr(time, "time_ns", lambda: second + 900_000_000)
    os.utime(f"{folder}/log/wake", ns=(second, second))
    publisher.publish([("a", b"2")])
    listener.attach(told)
    listener.watch("a")
    os.utime(f"{folder}/log/wake", ns=(second, second))
    listener.publish([("a", b"3")])
    await_true(lambda: told.payloads == [b"3"])
    publisher.publish([("a", b"4")])
    await_true(lambda: told.payloads == [b"3", b"4"])


def test_what_was_trimmed_before_it_was_told(make, monkeypatch):
    """The sink is told that some are missing: others may have been the last."""
    monkeypatch.setattr(append, "_SEEN", 0)
    broker, told = make(capacity=10), Told()
    broker.attach(told)
    broker.watch("#")
    stop = threading.Event()
    entered = threading.Event()

    def deliver(channel, entry):
        entered.set()
        stop.wait(TIMEOUT)

    told.deliver = deliver
    broker.publish([("a", b"x")])
    assert entered.wait(TIMEOUT)
    for _ in range(20):
        broker.publish([("a", b"x")] * 10)
    stop.set()
    await_true(lambda: told.resyncs)


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
# The writer's thread has to be idle: of one that is about to take the GIL the child
# would have its mutex, locked. Nothing tells that it is.
time.sleep(0.2)
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


def test_a_listener_that_fails_says_so_and_goes_on(make, folder):
    """The sink is told that the log cannot be read, and that it can again."""
    broker, told = make(), Told()
    broker.attach(told)
    broker.watch("a")
    os.rename(folder, f"{folder}-away")
    await_true(lambda: told.states == [False])
    with pytest.raises(Unavailable):
        broker.publish([("a", b"x")])
    os.rename(f"{folder}-away", folder)
    await_true(lambda: told.states == [False, True])
    broker.publish([("a", b"x")])
    await_true(lambda: told.payloads == [b"x"])


DATA = "x'646174613a20780a0a'"  # "data: x", as a hub stores it

# What SQLite takes in our tables, and no hub has stored: after the event 1 of "a".
ROWS = {
    "a text": "INSERT INTO event VALUES (9, 1, 2, 7, 7, :now, 'data: x')",
    "a number": "INSERT INTO event VALUES (9, 1, 2, 7, 7, :now, 5)",
    "no nonce": f"INSERT INTO event VALUES (9, 1, 2, 'x', 7, :now, {DATA})",
    "no number": f"INSERT INTO event VALUES (9, 1, x'ff', 7, 7, :now, {DATA})",
    "no predecessor": f"INSERT INTO event VALUES (9, 1, 2, 7, 'x', :now, {DATA})",
    "beyond the head": f"INSERT INTO event VALUES (9, 1, 3, 7, 7, :now, {DATA})",
    "no UTF-8": f"""INSERT INTO channel VALUES (9, CAST(x'ff' AS TEXT), 1, 7);
        INSERT INTO event VALUES (9, 9, 1, 7, 0, :now, {DATA})""",
    "no name": f"""INSERT INTO channel VALUES (9, x'ff', 1, 7);
        INSERT INTO event VALUES (9, 9, 1, 7, 0, :now, {DATA})""",
}


def read_to(subscription, last):
    """Return the data of events, up to these; resets are left out."""
    found = []
    while last not in found:
        events = subscription.read(TIMEOUT)
        assert events
        assert len(found) < 100
        found += [e.data for e in events if not isinstance(e, Gap)]
    return found


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_a_row_that_is_no_event_silences_nobody(folder, rows, caplog):
    """It is left out; the listener goes on, and so does whoever reads it."""
    url = f"local:{folder}/log"
    with contextlib.closing(Hub(url)) as hub:
        listening = hub.subscribe("a"), hub.subscribe("#")
        assert [s.read(0) for s in listening] == [[], []]
        hub.publish("a", "1")
        assert [e.data for s in listening for e in s.read(TIMEOUT)] == ["1"] * 2
        with contextlib.closing(sqlite3.connect(f"{folder}/log/log.db")) as log:
            for row in rows.split(";"):
                log.execute(row, {"now": time.time() * 1000})
            log.execute("UPDATE channel SET last = 2, nonce = 7 WHERE name = 'a'")
            log.commit()
        hub.publish("a", "3")
        for subscription in listening:
            assert read_to(subscription, "3").count("3") == 1
        assert hub.stats()["up"]
    journal().flush()
    assert "the listener failed" not in caplog.text
    with contextlib.closing(Hub(url)) as hub:
        fresh = hub.subscribe("a", after="start")
        assert [text for text in read_to(fresh, "3") if text != "x"] == ["1", "3"]
        assert fresh.read(0) == []


@pytest.mark.parametrize(
    "damage",
    ["UPDATE channel SET last = 'x'", "UPDATE channel SET nonce = 'x'"],
)
def test_a_channel_that_is_damaged_is_named(folder, damage, caplog):
    """Its subscribers wait, the others hear on, and the log says which it is."""
    with contextlib.closing(Hub(f"local:{folder}/log")) as hub:
        for name in "ab":
            hub.publish(name, "1")
        with contextlib.closing(sqlite3.connect(f"{folder}/log/log.db")) as log:
            log.execute(f"{damage} WHERE name = 'a'")
            log.commit()
        assert hub.subscribe("a", after="start").read(0) == []
        assert read_to(hub.subscribe("b", after="start"), "1") == ["1"]
        assert hub.stats()["up"]
        await_true(lambda: "'a' cannot be read" in caplog.text)


def test_wakes_without_end_hold_up_nobody():
    """Whoever may write to the folder may send them faster than they are taken."""

    class Flooded:
        taken = 0

        def recv(self, size):
            self.taken += 1
            assert self.taken < 100_000
            return b"\0"

    listener_module.drain(Flooded())


def test_the_engine_may_come_later(make, folder):
    """A log that cannot be had when one begins is had when it can."""
    os.rmdir(folder)
    broker, told = make(), Told()
    broker.attach(told)
    for call in (lambda: broker.watch("a"), lambda: broker.publish([("a", b"x")])):
        with pytest.raises(Unavailable):
            call()
    os.mkdir(folder)
    broker.watch("a")
    broker.publish([("a", b"x")])
    await_true(lambda: told.payloads == [b"x"])


# Whose it is, and what becomes of its files.


def change(folder, sql):
    """As an operator does, by SQLite's own tool."""
    with contextlib.closing(sqlite3.connect(f"{folder}/log/log.db")) as connection:
        connection.execute(sql)
        connection.commit()


def test_a_hole_is_announced_once(make, folder):
    """What follows an event whose successor was deleted; not the oldest, for ever."""
    broker = make()
    ids = broker.publish([("a", b"%d" % n) for n in range(5)])
    change(folder, "DELETE FROM event WHERE number = 3")
    page = broker.read("a", ids[0])
    assert page.complete
    assert [entry.id for entry in page.entries] == [ids[1], *ids[3:]]
    page = broker.read("a", ids[1])
    assert not page.complete
    assert [entry.id for entry in page.entries] == ids[3:]
    assert broker.read("a", ids[3]).complete


class OldWorker:
    """What a worker of the first format does to a log: its lock, its statements."""

    def __init__(self, path):
        self._lock = os.open(f"{path}/lock", os.O_RDWR | os.O_CREAT, 0o644)
        self._log = sqlite3.connect(f"{path}/log.db", isolation_level=None)

    def make(self):
        self._log.executescript((FORMATS / "local_1.sql").read_text())

    def publish(self, name, payload):
        execute = self._log.execute
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        execute("BEGIN IMMEDIATE")
        (empty,) = execute("SELECT empty FROM life").fetchone()
        found = "SELECT id, last, nonce FROM channel WHERE name = ?"
        if (row := execute(found, (name,)).fetchone()) is None:
            execute("INSERT INTO channel(name, last, nonce) VALUES (?, 0, 0)", (name,))
            channel, number, prev = execute(found, (name,)).fetchone()[0], 0, empty
        else:
            channel, number, prev = row
        nonce = random.getrandbits(32)
        execute(
            "INSERT INTO event(channel, number, nonce, prev, time, payload)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (channel, number + 1, nonce, prev, int(time.time() * 1000), payload),
        )
        execute(
            "UPDATE channel SET last = ?, nonce = ? WHERE id = ?",
            (number + 1, nonce, channel),
        )
        execute("COMMIT")
        fcntl.flock(self._lock, fcntl.LOCK_UN)
        return f"{number + 1:x}-{nonce:08x}"

    def read(self, name):
        rows = self._log.execute(
            "SELECT number, event.nonce, payload, prev FROM event"
            " JOIN channel ON channel.id = channel WHERE name = ? ORDER BY number",
            (name,),
        )
        return [(f"{row[0]:x}-{row[1]:08x}", *row[2:]) for row in rows]

    def close(self):
        self._log.close()
        os.close(self._lock)


def test_old_and_new_workers_share_a_log(folder, make):
    """A log that an old one has made, and both write: one chain, each told of all."""
    path = f"{folder}/log"
    os.mkdir(path, 0o700)
    with contextlib.closing(OldWorker(path)) as old:
        old.make()
        ids = [old.publish("a", b"0")]
        broker, told = make(), Told()
        broker.attach(told)
        broker.watch("a")
        for number in range(1, 20, 2):
            ids += broker.publish([("a", b"%d" % number)])
            ids.append(old.publish("a", b"%d" % (number + 1)))
        payloads = [b"%d" % number for number in range(21)]
        await_true(lambda: told.payloads == payloads[1:], lambda: told.payloads)
        assert told.resyncs == 0
        page = broker.read("a", ids[3])
        assert page.complete
        assert [entry.id for entry in page.entries] == ids[4:]
        rows = old.read("a")
        assert [row[:2] for row in rows] == [*zip(ids, payloads, strict=True)]
        assert [row[2] for row in rows][1:] == [int(id[-8:], 16) for id in ids[:-1]]
        # What only old ones have written is found by who comes back to nothing.
        head = broker.read("b", None).head
        first = old.publish("b", b"x")
        assert [entry.id for entry in broker.read("b", head).entries] == [first]
        assert broker.read("b", head).complete


def test_the_newest_are_found_without_the_rest(make, folder):
    """Their id before and the head's, within what is kept; no row is made by it."""
    with contextlib.closing(Hub(f"local:{folder}/own")) as hub:
        assert read_for_the_newest(hub) == 1
    broker = make(capacity=4)
    for count in (1, 10):
        (empty,) = {*broker.newest("a", count)}
    assert empty == broker.read("a", None).head
    ids = broker.publish([("a", b"%d" % n) for n in range(6)])
    assert broker.newest("a", 1) == (ids[4], ids[5])
    assert broker.newest("a", 3) == (ids[2], ids[5])
    assert broker.newest("a", 100) == (ids[1], ids[5])
    time.sleep(0.002)  # their times are whole milliseconds
    assert make(max_age=1e-9).newest("a", 3) == (ids[5], ids[5])
    for number in range(10):
        broker.read(f"unused {number}", None)
        broker.newest(f"unused {number}", 5)
    with contextlib.closing(sqlite3.connect(f"{broker.path}/log.db")) as connection:
        assert connection.execute("SELECT count(*) FROM channel").fetchone() == (1,)


def test_who_comes_and_goes_evicts_nothing(make):
    """Each process tells of those of the others; events are kept."""
    here, there = (Hub(broker=make(capacity=3)) for _ in range(2))
    with contextlib.closing(here), contextlib.closing(there):
        come_and_go(here, there)


def test_what_is_deleted_before_it_is_told_is_announced(make, folder):
    """The last ones, too, which no later event shows."""
    broker, told = make(), Told()
    broker.attach(told)
    broker.watch("a")
    with broker.process.news():  # as one that is frozen
        other = make()
        other.publish([("a", b"x")])
        change(folder, "DELETE FROM event")
    await_true(lambda: told.resyncs)
    assert told.payloads == []


def test_an_older_copy_is_put_back_in_place(make, folder):
    """By SQLite's own tools, into the same file: who listens is told, and hears on."""
    broker, told = make(), Told()
    broker.attach(told)
    broker.watch("a")
    broker.publish([("a", b"1")])
    with (
        contextlib.closing(sqlite3.connect(f"{folder}/log/log.db")) as log,
        contextlib.closing(sqlite3.connect(f"{folder}/copy.db")) as copy,
    ):
        log.backup(copy)
        broker.publish([("a", b"lost")] * 10)
        await_true(lambda: len(told.payloads) == 11)
        assert told.resyncs == 0
        copy.backup(log)
    await_true(lambda: told.resyncs)
    broker.publish([("a", b"2")])
    await_true(lambda: told.payloads[11:] == [b"2"])
    assert payloads(broker) == [b"1", b"2"]


def test_what_a_fast_clock_has_stored_does_not_stay(make, monkeypatch):
    """It ages from when the clock was put back."""
    broker = make(max_age=60.0)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1e6)
    broker.publish([("a", b"x")] * 10)
    monkeypatch.setattr(time, "time", lambda: now)
    broker.publish([("a", b"x")] * 100)
    assert len(kept(broker)) == 110
    monkeypatch.setattr(time, "time", lambda: now + 61)
    assert kept(broker) == []


def test_a_fast_clock_lets_no_log_grow(make, folder, monkeypatch):
    """What is beyond the capacity goes as well when nothing ages."""
    monkeypatch.setattr(append, "_SEEN", 0)
    broker = make(max_age=None, capacity=50)
    now = time.time()
    for number in range(30):
        at = now + (1e6 if number < 10 else number)
        monkeypatch.setattr(time, "time", lambda at=at: at)
        broker.publish([("a", b"x")] * 100)
    with contextlib.closing(sqlite3.connect(f"{folder}/log/log.db")) as connection:
        (count,) = connection.execute("SELECT count(*) FROM event").fetchone()
    assert 50 <= count <= 250
    assert len(kept(broker)) == 50


STORES = """
import sys
from syncstream.brokers.local import LocalBroker
broker = LocalBroker(sys.argv[1])
for line in sys.stdin:
    print(*broker.publish([("a", line.encode())]), flush=True)
broker.close()
print("closed", flush=True)
"""


@pytest.mark.parametrize(
    "names",
    [["-shm"], ["-wal"], ["-wal", "-shm"], ["", "-shm"], ["", "-wal", "-shm"]],
    ids=lambda names: "db".join(names) or "db",
)
def test_a_log_never_forks(make, folder, names, caplog):
    """Whichever of its files a cleaner removes, between the uses of two processes."""
    broker, told = make(), Told()
    path = f"{folder}/log/log.db"
    with running(STORES, f"local:{folder}/log") as process:

        def store(text):
            print(text, file=process.stdin, flush=True)
            return process.stdout.readline().strip()

        before = [*broker.publish([("a", b"1")]), store("2")]
        broker.attach(told)
        broker.watch("a")
        payloads(broker)
        for name in names:
            os.unlink(path + name)
        theirs = [store("3"), store("4")]
        ours = broker.publish([("a", b"5")])
        last = store("6")
        ids = [entry.id for entry in kept(broker)]
        assert ids[-4:] == [*theirs, *ours, last]
        assert ids[:-4] == (before if names == ["-shm"] else ids[:-4])
        await_true(lambda: told.resyncs)
        page = broker.read("a", before[1])
        assert page.complete is (before[1] in ids)
        process.stdin.close()
        assert process.stdout.readline() == "closed\n"
        assert process.wait(TIMEOUT) == 0
    assert [entry.id for entry in kept(make())] == ids
    assert "were removed or replaced" in caplog.text


@pytest.mark.parametrize("how", ["used", "killed", "closed"])
def test_what_a_removed_wal_undid_is_announced(make, folder, how):
    """Also to those who had not got it, and would go on with what is stored then."""
    broker, wal = make(), f"{folder}/log/log.db-wal"
    (first,) = broker.publish([("a", b"1")])
    broker.close()  # it is in log.db
    other = make()
    with running(STORES, f"local:{folder}/log") as process:
        print("2", file=process.stdin, flush=True)
        second = process.stdout.readline().strip()
        if how == "used":
            assert other.read("a", first).head == second
            nothing = other.read("b", None).head
            other.publish([("b", b"1")])
            os.unlink(wal)
            os.unlink(f"{folder}/log/lock")
            page = other.read("a", first)
            assert (page.entries, page.complete) == ((), False)
            assert not other.read("b", nothing).complete
            print("3", file=process.stdin, flush=True)  # it finds it, too
            assert process.stdout.readline()
        elif how == "killed":
            process.kill()
            process.wait(TIMEOUT)
            os.unlink(wal)
        else:
            process.stdin.close()
            process.wait(TIMEOUT)
    other.publish([("a", b"4")])
    page = other.read("a", first)
    if how == "closed":
        assert [entry.prev for entry in page.entries] == [first, second]
        return
    assert page.entries[0].prev not in (first, second)
    numbers = [int(entry.id.partition("-")[0], 16) for entry in page.entries]
    assert numbers == ([3, 4] if how == "used" else [3])  # broken once


def test_closing_a_stale_log_undoes_nothing(make, folder):
    """A process that has not stored since a cleaner came takes no events along."""
    idle, other = make(), make()
    idle.publish([("a", b"1")])
    os.unlink(f"{folder}/log/log.db-shm")
    with running(STORES, f"local:{folder}/log") as process:
        process.stdin.write("2\n")
        process.stdin.close()
        assert process.stdout.readlines()[-1] == "closed\n"
        process.wait(TIMEOUT)
    idle.close()
    assert payloads(other) == [b"1", b"2\n"]


def test_closing_a_stale_log_waits_for_the_lock_of_now(make, folder, monkeypatch):
    """Not for the removed one, beside which others write."""
    idle = make()
    idle.publish([("a", b"1")])
    for name in ("lock", "log.db-shm"):
        os.unlink(f"{folder}/log/{name}")
    with running(STORES, f"local:{folder}/log") as process:
        print("2", file=process.stdin, flush=True)
        assert process.stdout.readline()
        moved = []
        with open(f"{folder}/log/lock") as lock, monkeypatch.context() as patch:
            patch.setattr(os, "rename", lambda *names: moved.append(names))
            fcntl.flock(lock, fcntl.LOCK_EX)
            idle.close()
        assert moved == []
        process.stdin.write("3\n")
        process.stdin.close()
        assert process.stdout.readlines()[-1] == "closed\n"
        assert process.wait(TIMEOUT) == 0
    assert payloads(make()) == [b"1", b"2\n", b"3\n"]


def test_the_times_of_files_are_fresh(make, folder, monkeypatch):
    """Cleaners go by them: of the log, its lock, its sockets and their folders."""
    monkeypatch.setattr(files_module, "FRESHEN", 0.0)
    broker = make()
    broker.attach(Told())
    broker.watch("a")
    broker.publish([("a", b"x")])
    (name,) = os.listdir(f"{folder}/log/wake")
    names = "", "/log.db", "/log.db-wal", "/log.db-shm", "/lock", "/wake"
    paths = [f"{folder}/log{name}" for name in (*names, f"/wake/{name}")]
    for path in paths:
        os.utime(path, (1, 1))
    await_true(lambda: all(os.stat(path).st_mtime > 1e9 for path in paths))
    assert all(os.stat(path).st_atime > 1e9 for path in paths)


def modes(folder):
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            found[name] = os.stat(f"{parent}/{name}").st_mode & 0o7777
    return found


@pytest.mark.parametrize("umask", [0o022, 0o077, 0])
def test_files_are_their_owners_only(make, folder, umask):
    """Whatever the umask, and also those that an earlier release has made."""
    os.mkdir(f"{folder}/log")
    os.chmod(f"{folder}/log", 0o755)
    with open(f"{folder}/log/lock", "w"):
        os.chmod(f"{folder}/log/lock", 0o644)
    before = os.umask(umask)
    try:
        broker = make()
        broker.attach(Told())
        broker.watch("a")
        broker.publish([("a", b"x")])
    finally:
        os.umask(before)
    found = modes(f"{folder}/log")
    assert found.pop("wake") == 0o700
    assert len(found) == 5
    assert {*found.values()} == {0o600}


def test_folders_of_others_are_refused(make, folder):
    """Whoever owns it reads and forges; whoever may write to it, too."""
    path = f"{folder}/log"
    os.mkdir(path)
    os.chmod(path, 0o777)
    with pytest.raises(Unavailable, match=r"for every user: chmod o-w"):
        make().publish([("a", b"x")])
    os.chmod(path, 0o755)
    need_root("a folder is another user's")
    os.chown(path, 12345, 12345)
    with pytest.raises(Unavailable, match=r"belongs to user 12345.*chmod 2770"):
        make().publish([("a", b"x")])
    os.chown(path, 0, 0)
    os.symlink(path, f"{folder}/link")
    os.chown(f"{folder}/link", 12345, 12345, follow_symlinks=False)
    with pytest.raises(Unavailable, match="belongs to user 12345"):
        make("link").publish([("a", b"x")])
    assert os.listdir(path) == []


SHARES = """
import os, sys
url, user, umask = sys.argv[1], int(sys.argv[2]), int(sys.argv[3], 8)
from syncstream import Hub
import syncstream.brokers.local
os.umask(umask)
if user:
    os.setgroups([23456])
    os.setgid(user)
    os.setuid(user)
hub = Hub(url)
subscription = hub.subscribe("a", after="start")
for line in sys.stdin:
    hub.publish("a", line.strip())
    found = []
    while line.strip() not in found:
        new = subscription.read(15)
        assert new, found
        found += [event.data for event in new]
    print(*found, flush=True)
hub.close()
"""


@pytest.mark.parametrize("umask", ["077", "022"])
@pytest.mark.parametrize("first", [0, 12345], ids=["root-first", "user-first"])
def test_users_of_a_group_share_a_folder(make, folder, first, umask):
    """One of setgid 2770, whoever comes first, and wake each other."""
    need_root("two users share it")
    os.chmod(folder, 0o755)
    path = f"{folder}/log"
    os.mkdir(path)
    os.chown(path, 0, 23456)
    os.chmod(path, 0o2770)
    second = 12345 - first or 54321
    users = [(str(first), umask), (str(second), umask)]
    url = f"local:{path}"
    with running(SHARES, url, *users[0]) as one, running(SHARES, url, *users[1]) as two:

        def say(process, text):
            print(text, file=process.stdin, flush=True)
            return process.stdout.readline().split()

        assert say(one, "1") == ["1"]
        assert say(two, "2") == ["1", "2"]
        assert say(one, "3") == ["2", "3"]
        found = modes(path)
        assert found.pop("wake") == 0o2770
        assert len(found) == 6
        assert {*found.values()} == {0o660}
        for process in (one, two):
            process.stdin.close()
            assert process.wait(TIMEOUT) == 0


def test_who_makes_a_file_has_the_lock(make, folder):
    """Nobody else sees one that has not its rights yet: a reader makes none alone."""
    first = make()
    first.publish([("a", b"x")])
    first.close()
    names = sorted(os.listdir(f"{folder}/log"))
    hasty, reader = make(publish_timeout=0.1), make()
    with open(f"{folder}/log/lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Unavailable, match="lock is held"):
            hasty.read("a", None)
        assert sorted(os.listdir(f"{folder}/log")) == names
    assert payloads(reader) == [b"x"]


def test_no_file_is_removed_but_a_socket(make, folder):
    """Whoever shares the folder may have put a link in place of the sockets'."""
    broker = make()
    broker.publish([("a", b"1")])
    os.mkdir(f"{folder}/others")
    files = [f"{folder}/others/{name}" for name in ("precious", "1-00000000")]
    for name in files:
        with open(name, "w"):
            pass
    os.rename(f"{folder}/log/wake", f"{folder}/log/was")
    os.symlink(f"{folder}/others", f"{folder}/log/wake")
    broker.publish([("a", b"2")])
    os.unlink(f"{folder}/log/wake")
    os.rename(f"{folder}/others", f"{folder}/log/wake")
    broker.publish([("a", b"3")])
    assert {*os.listdir(f"{folder}/log/wake")} == {"precious", "1-00000000"}


@pytest.mark.parametrize("name", ["lock", "log.db"])
def test_no_link_is_followed(make, folder, name):
    """Whoever shares the folder may have put one in place of a file."""
    os.mkdir(f"{folder}/log", 0o700)
    os.symlink(f"{folder}/elsewhere", f"{folder}/log/{name}")
    with pytest.raises(Unavailable, match="plain file"):
        make().publish([("a", b"1")])
    assert not os.path.lexists(f"{folder}/elsewhere")


def test_a_hard_link_is_refused(make, folder):
    """SQLite has one WAL for each name: a copied release would fork the log."""
    first = make()
    first.publish([("a", b"1")])
    os.mkdir(f"{folder}/copy", 0o700)
    os.link(f"{folder}/log/log.db", f"{folder}/copy/log.db")
    copy = make("copy")
    with pytest.raises(Unavailable, match="a second name"):
        copy.publish([("a", b"2")])
    with pytest.raises(Unavailable, match="a second name"):
        copy.read("a", None)
    first.publish([("a", b"3")])
    os.unlink(f"{folder}/copy/log.db")
    copy.publish([("a", b"4")])
    assert payloads(copy) == [b"4"]
    assert payloads(first) == [b"1", b"3"]


@pytest.mark.parametrize("name", ["lock", "log.db"])
def test_who_makes_a_file_may_be_killed(make, folder, name):
    """Between the two names that it has for a moment: the first one goes."""
    make().publish([("a", b"1")])
    os.link(f"{folder}/log/{name}", f"{folder}/log/{name}-0123abcd")
    broker = make()
    broker.publish([("a", b"2")])
    assert payloads(broker) == [b"1", b"2"]
    assert f"{name}-0123abcd" not in os.listdir(f"{folder}/log")


def test_links_lead_nowhere(make, folder, monkeypatch):
    """Those in a folder that a group shares: no times are changed, nobody is woken."""
    monkeypatch.setattr(files_module, "FRESHEN", 0.0)
    broker = make()
    broker.publish([("a", b"1")])
    elsewhere = f"{folder}/elsewhere"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(elsewhere)
        other.setblocking(False)
        os.symlink(elsewhere, f"{folder}/log/wake/1-00000000")
        broker.publish([("a", b"2")])
        with pytest.raises(BlockingIOError):
            other.recv(1)
    os.rename(f"{folder}/log/wake", f"{folder}/was")
    os.symlink(elsewhere, f"{folder}/log/wake")
    os.utime(elsewhere, (1, 1))
    broker.publish([("a", b"3")])
    assert os.stat(elsewhere).st_mtime == 1


def test_a_link_has_no_mode_changed(folder, monkeypatch):
    """Not either if it takes a file's place after that was looked at."""
    open(f"{folder}/precious", "w").close()
    os.chmod(f"{folder}/precious", 0o640)
    found = os.stat(f"{folder}/precious")
    os.symlink(f"{folder}/precious", f"{folder}/link")
    monkeypatch.setattr(os, "lstat", lambda path: found)
    files_module.settle(f"{folder}/link", 0o600, found.st_gid)
    assert modes(folder)["precious"] == 0o640


REFUSED = """
import logging, os, sys
from syncstream import Hub
from syncstream.errors import Unavailable
import syncstream.brokers.local
logging.disable()
user = int(sys.argv[2])
os.setgroups([])
os.setgid(user)
os.setuid(user)
hub = Hub(sys.argv[1])
try:
    hub.publish("a", "x")
except Unavailable as error:
    print(error)
print(hub.stats()["up"])
hub.close()
"""


def test_another_user_is_told_what_to_do(make, folder):
    """As whom to run, and how to share; stats say that it does not work."""
    need_root("two users share it")
    os.chmod(folder, 0o755)
    make().publish([("a", b"x")])
    lines = check_script(REFUSED, f"local:{folder}/log", "12345").splitlines()
    assert "chmod 2770" in lines[0]
    assert lines[1] == "False"


def test_each_operation_judges(make, folder):
    """Publishing and reading, too: said once, and once again when it is mended."""
    broker, told = make(), Told()
    broker.attach(told)
    with open(f"{folder}/log", "w"):
        pass
    for _ in range(2):
        with pytest.raises(Unavailable):
            broker.publish([("a", b"x")])
        with pytest.raises(Unavailable):
            broker.watch("a")
    assert told.states == [False]
    with pytest.raises(Unavailable):
        broker.read("a", None)
    os.unlink(f"{folder}/log")
    broker.publish([("a", b"x")])
    assert told.states == [False]
    broker.read("a", None)
    broker.watch("a")
    await_true(lambda: told.states == [False, True])


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
