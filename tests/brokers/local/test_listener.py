"""What is told of what was stored, whatever is in the way."""

import contextlib
import itertools
import os
import socket
import sqlite3
import threading
import time

import pytest

from syncstream import Hub
from syncstream.brokers.local import append
from syncstream.brokers.local import listener as listener_module
from syncstream.brokers.local.files import make_wake
from syncstream.brokers.local.peers import Peers
from syncstream.errors import Unavailable
from syncstream.runtime.journal import journal
from tests.brokers.local.logs import change, payloads, read_to, running
from tests.brokers.sinks import Told
from tests.support.waits import TIMEOUT, await_true


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
        assert told.resyncs == []
        copy.backup(log)
    await_true(lambda: told.resyncs)
    broker.publish([("a", b"2")])
    await_true(lambda: told.payloads[11:] == [b"2"])
    assert payloads(broker) == [b"1", b"2"]


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
    assert journal().flush()
    assert "LookupError: broken" in caplog.text


def test_a_listener_of_the_same_tick_is_woken(make, folder):
    """It has come when the folder was looked at, and has left its time as it was."""
    make().publish([("a", b"x")])
    path = f"{folder}/log"
    make_wake(path)
    others = Peers(path)
    with contextlib.closing(others):
        others.wake()
        before = os.stat(f"{path}/wake").st_mtime_ns
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as late:
            late.bind(f"{path}/wake/late")
            late.settimeout(1)
            os.utime(f"{path}/wake", ns=(before, before))
            others.wake()
            assert late.recv(16)


@pytest.mark.parametrize("count", [0, 1, 1000, 1001])
def test_wakes_are_taken(count):
    """As many as there are, up to a thousand: then it looks for their events."""
    wakes = [b"\0"] * count

    class Queue:
        def recv(self, size):
            if not wakes:
                raise BlockingIOError
            return wakes.pop()[:size]

    listener_module.drain(Queue())
    assert len(wakes) == max(0, count - 1000)


def test_a_socket_that_nobody_has_open_is_removed(folder):
    """Files of others stay, and whoever comes after it is woken all the same."""
    wake = f"{folder}/wake"
    os.mkdir(wake)
    alive = []
    try:
        for number in range(6):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            alive.append(sock)
            sock.bind(f"{wake}/{number}")
            sock.setblocking(False)
        for sock in alive[::2]:
            sock.close()
        with open(f"{wake}/file", "w"):
            pass
        os.symlink("1", f"{wake}/link")
        peers = Peers(folder)
        for _ in range(2):
            peers.wake()
            assert sorted(os.listdir(wake)) == ["1", "3", "5", "file", "link"]
            assert [sock.recv(16) for sock in alive[1::2]] == [b"\0"] * 3
            for sock in alive[1::2]:
                with pytest.raises(BlockingIOError):
                    sock.recv(16)
        peers.close()
    finally:
        for sock in alive:
            sock.close()


def test_a_full_queue_is_no_error(folder, caplog):
    """Whoever is behind by much has been woken, and the next one is woken, too."""
    caplog.set_level("DEBUG")
    wake = f"{folder}/wake"
    os.mkdir(wake)
    with contextlib.ExitStack() as stack:
        socks = [socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2)]
        for number, sock in enumerate(socks):
            stack.callback(sock.close)
            sock.bind(f"{wake}/{number}")
            sock.setblocking(False)
        peers = Peers(folder)
        stack.callback(peers.close)
        for _ in range(1000):  # the kernel's queue has a few hundred places at most
            peers.wake()
            assert socks[1].recv(16) == b"\0"
        listener_module.drain(socks[0])
        peers.wake()
        assert [sock.recv(16) for sock in socks] == [b"\0"] * 2
    journal().flush()
    assert caplog.records == []


def test_without_a_folder_nobody_is_woken(folder):
    """No error: it was removed, or is a link to another one."""
    Peers(folder).wake()
    os.symlink("/tmp", f"{folder}/wake")
    Peers(folder).wake()
