"""What is told of what was stored, whatever somebody has done to the tables."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from syncstream import Gap, Hub
from syncstream.brokers.postgresql import listener
from syncstream.brokers.postgresql.connection import Connection, Lost
from syncstream.errors import (
    Unavailable,
)
from syncstream.runtime.journal import journal
from tests import ROOT
from tests.brokers.postgresql.waits import LIMIT, publish_until_it_works, read_until
from tests.brokers.sinks import Told, listening
from tests.support.postgresql_server import PostgreSQL
from tests.support.waits import await_true


def test_a_restored_backup_resets_who_has_what_it_lost(server):
    """And nobody else: ids that it has are complete."""
    with PostgreSQL() as server:
        hub = Hub(server.url)
        quiet = Hub(server.url)
        ids = hub.publish_many("a", ["1", "2", "3"])
        quiet.publish("b", "1")
        server.save("backup")
        lost = [publish_until_hub(hub, "a", data) for data in "45"]
        live = hub.subscribe("a", after=ids[2])
        assert [event.data for event in read_until(live, "5")] == ["4", "5"]
        untouched = quiet.subscribe("b")
        untouched.read(0)
        server.restore("backup")
        new = [publish_until_hub(hub, "a", data) for data in ("4'", "5'", "6'")]
        found = read_until(live, "6'")
        assert isinstance(found[0], Gap)
        assert [event.data for event in found[1:]] == ["1", "2", "3", "4'", "5'", "6'"]
        for id in lost:
            with contextlib.closing(hub.subscribe("a", after=id)) as subscription:
                first, *rest = read_until(subscription, "6'")
                assert isinstance(first, Gap)
                assert [event.id for event in rest] == [*ids, *new]
        for place, id in enumerate(ids):
            with contextlib.closing(hub.subscribe("a", after=id)) as subscription:
                found = read_until(subscription, "6'")
                assert [event.id for event in found] == [*ids[place + 1 :], *new]
        publish_until_hub(quiet, "b", "2")
        assert [event.data for event in untouched.read(LIMIT)] == ["2"]
        hub.close()
        quiet.close()


def publish_until_hub(hub, channel, data):
    """Publish, again if nothing was stored; return the id."""
    return publish_until_it_works(_Publishing(hub), (channel, data))


class _Publishing:
    def __init__(self, hub):
        self.hub = hub

    def publish(self, items):
        ((channel, data),) = items
        return self.hub.publish(channel, data)


@pytest.mark.parametrize(
    "how", ["DROP SCHEMA {} CASCADE", "TRUNCATE {0}.event, {0}.channel"]
)
def test_what_is_wiped_is_one_reset(server, schema, make, how):
    """Exactly one for each channel; then all goes on."""
    hub = Hub(broker=make())
    subscriptions = [hub.subscribe(name) for name in ("a", "b")]
    for subscription in subscriptions:
        subscription.read(0)
    for name in ("a", "b"):
        hub.publish_many(name, ["1", "2"])
    for subscription in subscriptions:
        found = read_until(subscription, "2")
        assert [event.data for event in found] == ["1", "2"]
    server.execute(how.format(schema))
    for name in ("a", "b"):
        publish_until_hub(hub, name, "3")
    for subscription in subscriptions:
        found = read_until(subscription, "3")
        assert [isinstance(event, Gap) for event in found] == [True, False]
    hub.close()


@pytest.mark.parametrize(
    "how",
    [
        "TRUNCATE {0}.event, {0}.channel",
        "DELETE FROM {0}.event; DELETE FROM {0}.channel",
        "TRUNCATE {0}.channel",
        "DELETE FROM {0}.channel",
    ],
)
def test_channels_that_somebody_deletes(server, schema, make, how):
    """Who knew them empty is not complete, nor who knows what they had then."""
    broker = make()
    empty, other = (broker.read(name, None).head for name in ("a", "b"))
    ids = broker.publish([("a", b"data: %d\n\n" % number) for number in range(3)])
    server.execute(how.format(schema))
    # One that is not there says nothing of those that are.
    now = broker.read("b", None).head
    server.execute(f"DELETE FROM {schema}.channel")
    assert broker.read("b", None).head == now != other
    (new,) = broker.publish([("a", b"data: new\n\n")])
    hub = Hub(broker=broker)
    for after in (empty, *ids):
        with contextlib.closing(hub.subscribe("a", after=after)) as subscription:
            found = read_until(subscription, "new")
            assert any(isinstance(event, Gap) for event in found)
    assert broker.read("a", new).complete
    hub.close()


def test_listen_dsn(server, make, line, caplog):
    """Listening has a way of its own; where it hears nothing it says so, and works."""
    url = server.url_at(line.port)
    broker = make(url, listen_dsn=server.url)
    told = listening(broker, "a")
    broker.publish([("a", b"1")])
    await_true(lambda: told.payloads == [b"1"])
    line.cut()
    with pytest.raises(Unavailable):
        broker.publish([("a", b"x")])
    # It hears, and cannot publish.
    assert told.states == [False]
    line.mend()
    publish_until_it_works(broker, ("a", b"2"))
    await_true(lambda: told.states == [False, True])


def test_a_slow_server_is_up_again(make, monkeypatch):
    """However long a read takes, up to its time-out; attempts note no failures."""
    monkeypatch.setattr(listener, "HEARTBEAT", 0.01)
    monkeypatch.setattr(listener, "_TRY", 1e-4)  # seconds: no connect takes less
    broker = make()
    told = listening(broker, "a")
    broker.health.fails("read", "the time-out of a moment")
    noted = broker.health.moment()
    await_true(lambda: told.states == [False, True])
    assert broker.health.moment() == noted


def test_a_silent_server_does_not_delay_the_end(server, make, line, monkeypatch):
    """Nothing answers the attempt to read, which may take as long as a read."""
    monkeypatch.setattr(listener, "HEARTBEAT", 0.01)
    monkeypatch.setattr(listener, "_TRY", 3600.0)
    broker = make(server.url_at(line.port), listen_dsn=server.url)
    listening(broker, "a")
    line.silence()
    broker.health.fails("read", "the line is silent")
    await_true(lambda: line.waiting)
    began = time.monotonic()
    broker.close(timeout=LIMIT)
    assert time.monotonic() - began < LIMIT / 2


def test_deaf_listeners_say_so(server, schema, make, monkeypatch, caplog):
    """LISTEN does nothing behind some poolers: slow, and said, but nothing is lost."""
    monkeypatch.setattr(listener, "HEARTBEAT", 0.05)
    broker = make()
    told = listening(broker, "a")
    server.execute(
        f"CREATE OR REPLACE FUNCTION {schema}.pg_notify(text, text) RETURNS void"
        " LANGUAGE sql AS ''"
    )
    for place in ("append(text,bytea,bigint,double precision)",):
        server.execute(
            f"ALTER FUNCTION {schema}.{place} SET search_path = {schema}, pg_catalog"
        )
    with caplog.at_level(logging.WARNING):
        for number in range(5):
            broker.publish([("a", b"%d" % number)])
            await_true(lambda number=number: len(told.entries) > number)
    journal().flush()
    assert [r.message for r in caplog.records if "listen_dsn" in r.message]


@pytest.mark.parametrize("name", ["a", "b"], ids=["beyond the head", "no channel"])
def test_a_row_that_was_inserted_by_hand_is_passed(server, schema, make, name):
    """Without its channel's: the next event comes after it, as a hole."""
    broker = make()
    told = listening(broker, "a", "b")
    broker.publish([("a", b"1")])
    head = broker.read(name, None).head
    server.execute(
        f"INSERT INTO {schema}.event SELECT nextval('{schema}.event_seq'), %s,"
        " g, 7, 7, now(), 'x' FROM generate_series(2, 3) g",
        name,
    )
    (id,) = broker.publish([(name, b"2")])
    await_true(lambda: told.payloads == [b"1", b"x", b"x", b"2"])
    page = broker.read(name, head)
    assert (page.entries[-1].id, page.head) == (id, id)
    assert not page.complete
    assert broker.read(name, id).complete


def test_many_names(make, monkeypatch):
    """Beyond some hundreds the listener reads all; each gets its own all the same."""
    monkeypatch.setattr(listener, "_MAX_NAMES", 3)
    broker = make()
    told = listening(broker, "a", "b")
    broker.publish([("a", b"1"), ("x", b"-")])
    for name in "cdef":
        broker.watch(name)
    broker.publish([("f", b"2"), ("x", b"-"), ("b", b"3")])
    await_true(lambda: told.payloads == [b"1", b"2", b"3"])
    for name in "cdef":
        broker.unwatch(name)
    broker.publish([("f", b"-"), ("a", b"4")])
    await_true(lambda: told.payloads[3:] == [b"4"])


FROZEN = """
import json, sys
from syncstream import Gap, Hub
from syncstream.brokers.postgresql import PostgreSQLBroker
_, url, schema, names = sys.argv
broker = PostgreSQLBroker(url, schema=schema, publish_timeout=20.0)
hub = Hub(broker=broker)
subscriptions = {name: hub.subscribe(name) for name in names.split(",")}
for subscription in subscriptions.values():
    subscription.read(0)
hub.publish("place", "newest that it knows")
assert subscriptions["place"].read(10)
print("ready", flush=True)
sys.stdin.readline()
def kind(event):
    return "reset" if isinstance(event, Gap) else event.data
# The one that is told last, when all others were.
assert subscriptions["place"].read(10)
found = {name: [kind(e) for e in s.read(1)] for name, s in subscriptions.items()}
print(json.dumps(found), flush=True)
hub.close()
"""


def test_what_was_deleted_while_a_process_was_frozen(server, schema, make):
    """Aged out, trimmed or deleted, with nothing newer in its channel: a reset each."""
    broker = make(max_age=60)
    names = ["aged", "deleted", "trimmed", "kept", "idle", "place"]
    words = [FROZEN, server.url, schema, ",".join(names)]
    with subprocess.Popen(
        [sys.executable, "-c", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
    ) as child:
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGSTOP)
        # What it saw last is of a time when the clock was ahead: that stays.
        later = f"UPDATE {schema}.event SET ts = ts + interval '1 day'"
        server.execute(later)
        broker.publish([("aged", b"data: 1\n\n")])
        earlier = f"UPDATE {schema}.event SET ts = ts - interval '1 hour' WHERE channel"
        server.execute(f"{earlier} = 'aged'")
        broker.publish([("deleted", b"data: 1\n\n"), ("kept", b"data: 1\n\n")])
        server.execute(f"DELETE FROM {schema}.event WHERE channel = 'deleted'")
        few = make(capacity=3)
        few.publish([("trimmed", b"data: %d\n\n" % n) for n in range(64)])
        left = "SELECT count(*) FROM {}.event WHERE channel IN ('aged', 'deleted')"
        assert server.execute(left.format(schema)) == [(0,)]
        child.send_signal(signal.SIGCONT)
        broker.publish([("place", b"data: last\n\n")])
        out, _ = child.communicate("go\n", timeout=LIMIT)
        assert child.returncode == 0
    found = json.loads(out)
    assert found == {
        "aged": ["reset"],
        "deleted": ["reset"],
        "trimmed": ["reset", "61", "62", "63"],
        "kept": ["1"],
        "idle": [],
        "place": [],
    }


def test_a_deletion_that_was_seen_before_a_look_failed(
    server, schema, make, monkeypatch
):
    """Its channel is read all the same, however far the look had come."""
    monkeypatch.setattr(listener, "TAIL", 1)
    broker = make()
    told = listening(broker, "a", "b")
    run, failed = Connection.run, []
    looks = threading.Lock()

    def run_or_fail(self, sql, *args, **options):
        if ".tail(" not in sql:
            return run(self, sql, *args, **options)
        with looks:
            if told.payloads == [b"0", b"1"] and not failed:
                failed.append(sql)
                raise Lost("cut")
            return run(self, sql, *args, **options)

    monkeypatch.setattr(Connection, "run", run_or_fail)
    broker.publish([("a", b"0")])
    await_true(lambda: told.payloads == [b"0"])
    with looks:  # nobody sees what is deleted
        broker.publish([("b", b"deleted"), ("a", b"1"), ("a", b"2"), ("a", b"3")])
        server.execute(f"DELETE FROM {schema}.event WHERE channel = 'b'")
    await_true(lambda: told.payloads == [b"0", b"1", b"2", b"3"], lambda: told.payloads)
    await_true(lambda: told.resyncs == [None])
    assert failed


def test_a_sink_that_fails_is_told_again(server, schema, make):
    """That channels must be read."""
    broker, calls = make(), []

    class Fails(Told):
        def resync(self, channels):
            calls.append(channels)
            if len(calls) == 1:
                raise RuntimeError("a fault of the hub")

    told = Fails()
    broker.attach(told)
    broker.watch("a")
    broker.publish([("a", b"1")])
    await_true(lambda: told.payloads == [b"1"])
    with server.connect() as other, other.transaction():
        items = "ARRAY['b', 'a'], ARRAY['x'::bytea, '2'::bytea]"
        other.execute(f"SELECT {schema}.publish({items}, 1000, NULL)")
        other.execute(f"DELETE FROM {schema}.event WHERE channel = 'b'")
    await_true(lambda: calls == [None, None])
    assert told.payloads == [b"1", b"2"]


def test_a_hole_in_the_middle(server, schema, make):
    """What was deleted is not passed over; what follows it is all there."""
    broker = make()
    first, second, third, *rest = broker.publish(
        [("a", b"data: %d\n\n" % number) for number in range(5)]
    )
    server.execute(f"DELETE FROM {schema}.event WHERE off = 3")

    def read(after):
        page = broker.read("a", after)
        return page.complete, [entry.id for entry in page.entries]

    assert read(first) == (True, [second, *rest])  # who reads it sees the break
    assert read(second) == (False, rest)
    assert read(third) == (True, rest)
    assert read("3-00000000") == (False, [first, second, *rest])
    hub = Hub(broker=make())
    with contextlib.closing(hub.subscribe("a", after=second)) as subscription:
        reset, *events = subscription.read(LIMIT)
        assert isinstance(reset, Gap)
        assert reset.id == third
        assert [event.id for event in events] == rest
    hub.close()


def test_a_sequence_that_is_behind(server, schema, make):
    """Logical replication copies none, and some restore rows alone: all is told."""
    broker = make()
    told = listening(broker, "a")
    broker.publish([("a", b"0")] * 50)
    restart = f"ALTER SEQUENCE {schema}.event_seq RESTART"
    for count, sql in ((51, ""), (52, f"DELETE FROM {schema}.event")):
        server.execute(f"{restart};{sql}")
        broker.publish([("a", b"1")])
        await_true(lambda count=count: len(told.entries) == count)
