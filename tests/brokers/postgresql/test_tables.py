"""What the tables keep, and what holds up nobody."""

import threading

import psycopg
import pytest

from syncstream.brokers.postgresql.schema import install
from tests.brokers.postgresql.waits import LIMIT, REVISION_1


def test_the_table_is_bounded(server, schema, make):
    """20,000 events leave what is kept, and the room that they had is used again."""
    broker = make(capacity=100)
    for number in range(200):
        broker.publish([(f"c{number % 10}", b"x" * 200)] * 100)
    ((rows,),) = server.execute(f"SELECT count(*) FROM {schema}.event")
    assert rows < 10 * (100 + 32)
    server.execute(f"VACUUM {schema}.event")
    sql = f"SELECT pg_total_relation_size('{schema}.event')"
    ((before,),) = server.execute(sql)
    for number in range(100):
        broker.publish([(f"c{number % 10}", b"x" * 200)] * 50)
    ((after,),) = server.execute(sql)
    assert after < 1.1 * before


def test_what_is_too_old_makes_room(server, schema, make):
    """Whoever publishes removes it, of other channels, too."""
    broker = make(max_age=0.2)
    broker.publish([("idle", b"x")] * 100)
    threading.Event().wait(0.3)
    broker.publish([("busy", b"x")] * 100)
    broker.publish([("busy", b"x")] * 100)
    ((rows,),) = server.execute(
        f"SELECT count(*) FROM {schema}.event WHERE channel = 'idle'"
    )
    assert rows == 0


def test_a_clock_that_goes_back(server, schema, make):
    """What is kept has no holes, whatever the server's clock does."""
    broker = make(max_age=3600)
    broker.publish([("a", b"1")])
    for table in ("event", "channel"):
        server.execute(f"UPDATE {schema}.{table} SET ts = ts + interval '1 day'")
    broker.publish([("a", b"2"), ("a", b"3")])
    assert len(broker.read("a", "0").entries) == 3


def test_channels_that_are_idle_for_long_are_forgotten(server, schema, make):
    """Then nobody who knew them, or their absence, is taken for complete."""
    broker = make()
    never = broker.read("idle", None).head
    (known,) = broker.publish([("idle", b"1")])
    server.execute(f"UPDATE {schema}.channel SET ts = ts - interval '2 days'")
    server.execute(f"UPDATE {schema}.state SET swept = swept - interval '2 hours'")
    server.execute(f"SELECT setval('{schema}.event_seq', 1020)")
    broker.publish([("busy", b"x")] * 10)
    names = server.execute(f"SELECT name FROM {schema}.channel")
    assert names == [("busy",)]
    fresh = broker.read("idle", None).head
    assert fresh not in (never, known)
    broker.publish([("idle", b"2")])
    for id in (never, known):
        page = broker.read("idle", id)
        assert not page.complete
        assert [entry.payload for entry in page.entries] == [b"2"]
    assert broker.read("idle", fresh).complete


def test_a_deletion_that_is_open_holds_nobody_up(server, schema, make):
    """Room is made later; and whoever deletes can publish in the same transaction."""
    broker = make(max_age=60, capacity=10)
    broker.publish([("idle", b"1"), ("old", b"1"), ("erased", b"1")])
    server.execute(
        f"UPDATE {schema}.event SET ts = ts - interval '1 hour'"
        " WHERE channel IN ('idle', 'old')"
    )
    with psycopg.connect(server.url) as connection:
        connection.execute(
            f"DELETE FROM {schema}.event WHERE channel IN ('old', 'erased')"
        )
        broker.publish([("erased", b"2")], connection=connection)
        for _ in range(2):  # more than after which room is made
            broker.publish([("a", b"x")] * 32)
    kept = f"SELECT channel FROM {schema}.event WHERE channel <> 'a' ORDER BY seq"
    assert server.execute(kept) == [("idle",), ("erased",)]
    broker.publish([("a", b"x")] * 32)
    assert server.execute(kept) == [("erased",)]


def test_a_publication_of_all_tables(server, schema, make):
    """Logical replication forbids to update tables without a key: all have one."""
    renewed = f"{schema}_1"
    server.execute(REVISION_1.replace("syncstream", renewed))
    for name in (schema, renewed):
        install(server.url, schema=name)
    keyless = (
        "SELECT c.relname FROM pg_class c WHERE c.relkind = 'r'"
        " AND c.relnamespace IN (%s::regnamespace, %s::regnamespace) AND NOT EXISTS"
        " (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary)"
    )
    assert server.execute(keyless, schema, renewed) == []


def test_room_that_others_have_made_fails_no_commit(server, schema, make):
    """Nor a snapshot of before that: its channel is its own."""
    broker = make(max_age=60)
    broker.publish([("old", b"x")] * 30)
    server.execute(f"UPDATE {schema}.event SET ts = ts - interval '1 hour'")
    with server.connect() as connection:
        connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        broker.publish([("a", b"x")] * 32, connection=connection)
        broker.publish([("b", b"x")])
        # As the next one that publishes would, a little later.
        server.execute(f"DELETE FROM {schema}.event WHERE channel = 'old'")
        connection.execute("COMMIT")
    assert len(broker.read("a", "0").entries) == 32


def test_the_lock_is_the_schemas_own(server, schema, make):
    """Nobody holds up publishers who may not publish himself."""
    broker = make()
    broker.publish([("a", b"1")])
    server.execute(f"CREATE ROLE r{schema} LOGIN")
    url = server.url.replace("postgres@", f"r{schema}@")
    server.execute(f"GRANT USAGE ON SCHEMA {schema} TO r{schema}")
    server.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO r{schema}")
    oid = f"'{schema}.event'::regclass::oid::integer"
    with psycopg.connect(url) as other:
        other.execute(f"SELECT pg_advisory_lock(1937337955, {oid})")
        broker.publish([("a", b"2")])
        for sql in (
            *(f"SELECT FROM {schema}.state FOR {how}" for how in ("UPDATE", "SHARE")),
            f"LOCK TABLE {schema}.state IN ROW SHARE MODE",
            f"SELECT {schema}.append('a', '', 1, 1)",
        ):
            denied = pytest.raises(psycopg.errors.InsufficientPrivilege)
            with denied, other.transaction():
                other.execute(sql)


def test_transactions_of_opposite_order(server, make):
    """They take one lock, at their commits: none waits for the other for ever."""
    broker = make()

    def commit(channels):
        with server.connect() as connection:
            for _ in range(30):
                with connection.transaction():
                    for channel in channels:
                        broker.publish([(channel, b"x")], connection=connection)

    threads = [
        threading.Thread(target=commit, args=(channels,))
        for channels in ("ab", "ba", "abc", "cba")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert int(broker.read("a", None).head.partition("-")[0], 16) == 120
