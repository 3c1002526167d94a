"""Files of something else, and files that are removed or replaced while in use."""

import contextlib
import fcntl
import os
import shutil
import sqlite3

import pytest

from syncstream import Gap, Hub
from syncstream.brokers.local.database import Database
from syncstream.brokers.local.files import Lock
from syncstream.errors import Unavailable
from tests.brokers.local.logs import kept, payloads, running
from tests.brokers.sinks import Told
from tests.support.waits import TIMEOUT, await_true


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
            # The listener may have found out, and have removed the rest by closing.
            with contextlib.suppress(FileNotFoundError):
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


def test_logs_are_replaced_one_by_one(folder):
    """A process that leaves the removed files of one has its others open still."""
    paths = [f"{folder}/log{number}" for number in range(2)]
    locks = [Lock(path, False) for path in paths]
    with contextlib.ExitStack() as stack:
        for lock in locks:
            lock.acquire()
            stack.callback(lock.close)
        replaced, other, sibling = (Database(paths[n]) for n in (0, 1, 0))
        for database in (replaced, other, sibling):
            database.open()
            stack.callback(database.close)
        os.unlink(f"{paths[0]}/log.db")
        assert [d.is_current() for d in (replaced, other, sibling)] == [
            False,
            True,
            False,
        ]
        replaced.open()
        assert [d.is_open for d in (replaced, other, sibling)] == [True, True, False]
        assert replaced.is_current()
        assert other.is_current()


def test_a_connection_is_opened_to_read_if_all_is_there(folder):
    """Not while files are missing, nor again while it is open."""
    path = f"{folder}/log"
    lock = Lock(path, False)
    lock.acquire()
    reader, writer = Database(path), Database(path)
    assert not reader.open_to_read()
    assert (reader.is_open, reader.is_current()) == (False, False)
    with pytest.raises(sqlite3.ProgrammingError, match="closed by a fork"):
        reader.connection.execute("BEGIN")
    writer.open()
    assert reader.open_to_read()
    assert not reader.open_to_read()
    assert reader.is_current()
    os.unlink(f"{path}/log.db-wal")
    assert not reader.is_current()
    for database in (reader, writer):
        database.close()
        assert (database.is_open, database.identity) == (False, None)
    assert not reader.open_to_read()
    lock.close()
