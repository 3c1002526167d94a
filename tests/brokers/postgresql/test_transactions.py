"""Other people's transactions, in which events are stored."""

import contextlib
import threading

import psycopg
import pytest

from syncstream.brokers.postgresql.schema import install
from syncstream.errors import (
    Unavailable,
)
from tests.brokers.postgresql.waits import LIMIT, REVISION_1
from tests.brokers.sinks import listening
from tests.support.pairs import check_script
from tests.support.waits import await_true


def test_a_transaction_that_commits_is_seen_once(server, make):
    """After it has, in the order of commits; its ids are not known before."""
    broker = make(capacity=5000)
    told = listening(broker, "a")
    with server.connect() as first, server.connect() as second:
        with first.transaction():
            assert broker.publish([("a", b"late")], connection=first) == [None]
            with second.transaction():
                items = [("a", b"%d" % number) for number in range(1500)]
                broker.publish(items, connection=second)
            broker.publish([("a", b"between")])
        await_true(lambda: len(told.entries) == 1502)
    assert told.payloads == [*(p for _, p in items), b"between", b"late"]
    page = broker.read("a", told.entries[-3][1].id)
    assert [entry.payload for entry in page.entries] == [b"between", b"late"]


def test_a_transaction_that_rolls_back_never_was(server, schema, make):
    """Nor was what a savepoint takes back; no number is burnt."""
    broker = make()
    told = listening(broker, "a")
    with server.connect() as connection:
        with contextlib.suppress(ZeroDivisionError), connection.transaction():
            broker.publish([("a", b"never")], connection=connection)
            raise ZeroDivisionError
        with connection.transaction():
            broker.publish([("a", b"1")], connection=connection)
            with contextlib.suppress(ZeroDivisionError), connection.transaction():
                broker.publish([("a", b"never")], connection=connection)
                raise ZeroDivisionError
            broker.publish([("a", b"2")], connection=connection)
    broker.publish([("a", b"3")])
    await_true(lambda: told.payloads == [b"1", b"2", b"3"])
    numbers = [int(entry.id.partition("-")[0], 16) for _, entry in told.entries]
    assert numbers == [1, 2, 3]
    assert server.execute(f"SELECT count(*) FROM {schema}.outbox") == [(0,)]


def test_an_open_transaction_holds_nobody_up(server, make):
    """However long it is open, of the same channel, too."""
    broker = make()
    with server.connect() as connection, connection.transaction():
        broker.publish([("a", b"x")], connection=connection)
        for _ in range(20):
            broker.publish([("a", b"y")])  # who is held up gives up, and says so
        assert len(broker.read("a", "0").entries) == 20


def test_a_commit_that_waits_holds_nobody_up(server, schema, make):
    """A foreign key that is checked at the commit, and somebody who has its row."""
    broker = make()
    told = listening(broker, "a")
    broker.publish([("a", b"1")])
    server.execute(
        f"CREATE TABLE {schema}.parent (id integer PRIMARY KEY);"
        f"INSERT INTO {schema}.parent VALUES (1);"
        f"CREATE TABLE {schema}.child (parent integer"
        f" REFERENCES {schema}.parent DEFERRABLE INITIALLY DEFERRED)"
    )
    blocked = "SELECT count(*) FROM pg_locks l JOIN pg_class c ON c.oid = l.relation"
    blocked += " JOIN pg_locks w ON w.pid = l.pid AND NOT w.granted"
    blocked += f" WHERE c.oid = '{schema}.parent'::regclass"
    with server.connect() as waiting, server.connect() as owner:
        owner.execute("BEGIN")
        owner.execute(f"SELECT FROM {schema}.parent FOR UPDATE")
        waiting.execute("BEGIN")
        broker.publish([("a", b"3")], connection=waiting)
        waiting.execute("SET CONSTRAINTS ALL IMMEDIATE; SET CONSTRAINTS ALL DEFERRED")
        broker.publish([("a", b"4")], connection=waiting)
        waiting.execute(f"INSERT INTO {schema}.child VALUES (1)")
        committing = threading.Thread(target=waiting.execute, args=("COMMIT",))
        committing.start()
        await_true(lambda: server.execute(blocked)[0][0] > 0)
        broker.publish([("a", b"2")])
        owner.execute("COMMIT")
        committing.join(LIMIT)
    await_true(lambda: told.payloads == [b"1", b"2", b"3", b"4"])
    assert server.execute(f"SELECT count(*) FROM {schema}.outbox") == [(0,)]


def test_a_batch_is_one_without_a_transaction(server, schema, make):
    """All of it is stored, or nothing, however long it is."""
    broker = make(capacity=5000)
    broker.publish([("a", b"1")])
    server.execute(f"ALTER TABLE {schema}.outbox ADD CHECK (data <> 'bad')")
    items = [("a", b"%d" % number) for number in range(2, 3002)]
    with server.connect() as connection:
        with pytest.raises(psycopg.errors.CheckViolation):
            broker.publish([*items, ("a", b"bad")], connection=connection)
        assert len(broker.read("a", "0").entries) == 1
        broker.publish(items, connection=connection)
    page = broker.read("a", "0", 5000)
    assert [int(entry.payload) for entry in page.entries] == list(range(1, 3002))


def test_a_transaction_that_is_not_read_committed(server, make):
    """It fails at its commit where others came first; nothing is stored then."""
    broker = make()
    broker.publish([("a", b"1")])
    with server.connect() as connection:
        connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        broker.publish([("a", b"never")], connection=connection)
        broker.publish([("a", b"2")])
        with pytest.raises(psycopg.errors.SerializationFailure):
            connection.execute("COMMIT")
    payloads = [entry.payload for entry in broker.read("a", "0").entries]
    assert payloads == [b"1", b"2"]


def test_constraints_that_are_immediate(server, schema, make):
    """As Django's TestCase has them: the commit is awaited, and no lock is held."""
    broker = make()
    told = listening(broker, "a")
    with server.connect() as connection:
        with connection.transaction():
            broker.publish([("a", b"1"), ("a", b"2")], connection=connection)
            connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
            broker.publish([("a", b"3")], connection=connection)
            connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
            with contextlib.suppress(ZeroDivisionError), connection.transaction():
                broker.publish([("a", b"never")], connection=connection)
                connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
                raise ZeroDivisionError
            connection.execute(
                "SET CONSTRAINTS ALL IMMEDIATE; SET CONSTRAINTS ALL DEFERRED"
            )
            broker.publish([("a", b"4")], connection=connection)
            broker.publish([("a", b"before")])  # nobody holds it up
            await_true(lambda: told.payloads == [b"before"])
        await_true(lambda: told.payloads == [b"before", b"1", b"2", b"3", b"4"])
        with contextlib.suppress(ZeroDivisionError), connection.transaction():
            connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
            broker.publish([("a", b"never")], connection=connection)
            raise ZeroDivisionError
        broker.publish([("a", b"5")], connection=connection)
    await_true(lambda: told.payloads[5:] == [b"5"])
    assert server.execute(f"SELECT count(*) FROM {schema}.outbox") == [(0,)]


def test_a_connection_to_elsewhere(server, schema, make):
    """A clear word, and nothing is stored there."""
    names = ["", "bare", "copy", "other"]
    for name in names:
        template = f"TEMPLATE {schema}" if name == "copy" else ""
        server.execute(f"CREATE DATABASE {schema}{name} {template}")
        if name != "bare":
            install(server.url_at(server.port, schema + name), schema=schema)
        # Nobody may be in it while it is copied.
        await_true(
            lambda: (
                server.execute(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname LIKE %s",
                    f"{schema}%",
                )
                == [(0,)]
            )
        )
    broker = make(server.url_at(server.port, schema))
    broker.publish([("a", b"1")])
    with (
        psycopg.connect(server.url_at(server.port, f"{schema}bare")) as connection,
        pytest.raises(Unavailable, match="is it the hub's database"),
    ):
        broker.publish([("a", b"x")], connection=connection)
    for name in ("copy", "other"):
        with psycopg.connect(server.url_at(server.port, schema + name)) as connection:
            for pipeline in (contextlib.nullcontext(), connection.pipeline()):
                with pipeline, pytest.raises(ValueError, match="hub's own database"):
                    broker.publish([("a", b"x")], connection=connection)
            # Its transaction goes on.
            sql = f"SELECT count(*) FROM {schema}.outbox"
            assert connection.execute(sql).fetchall() == [(0,)]
    url = server.url_at(server.port, schema)
    with psycopg.connect(url) as connection:
        connection.execute("SET session_replication_role = replica")
        with pytest.raises(ValueError, match="session_replication_role"):
            broker.publish([("a", b"x")], connection=connection)
    with pytest.raises(TypeError, match="connection must be one of Django"):
        broker.publish([("a", b"x")], connection="postgresql://")
    nowhere = psycopg.AsyncConnection(psycopg.pq.PGconn.connect(server.url.encode()))
    with pytest.raises(TypeError, match="must not be async"):
        broker.publish([("a", b"x")], connection=nowhere)
    nowhere.pgconn.finish()
    assert len(broker.read("a", "0").entries) == 1


def test_a_server_that_was_restarted_is_the_same(server, schema, make):
    """To itself; a copy of it, which looks like that, is another one."""
    broker = make()
    broker.publish([("a", b"1")])
    sql = f"SELECT {schema}.identity()"
    before = server.execute(sql)
    server.stop()
    server.start()
    assert server.execute(sql) != before
    with server.connect() as connection:
        broker.publish([("a", b"2")], connection=connection)
    assert len(broker.read("a", "0").entries) == 2


DJANGO = """
import sys
_, mode, url, port, name = sys.argv
if mode == "gevent":
    from gevent import monkey
    monkey.patch_all()
import django
from django.conf import settings
from django.core.management import call_command
from django.db import connection, connections, transaction
from syncstream import Hub
from syncstream.brokers.postgresql import PostgreSQLBroker

where = {"HOST": "127.0.0.1", "PORT": port, "USER": "postgres", "NAME": name}
settings.configure(
    INSTALLED_APPS=["syncstream"],
    DATABASES={
        "default": {"ENGINE": "django.db.backends.postgresql", **where},
        "other": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"},
    },
)
django.setup()
if mode == "threads":  # what an older release has made
    call_command("migrate", "syncstream", "0001", fake=True, verbosity=0)
call_command("migrate", verbosity=0)
call_command("migrate", database="other", verbosity=0)
call_command("makemigrations", check=True, verbosity=0)

hub = Hub(broker=PostgreSQLBroker(url, create=False))
subscription = hub.subscribe("orders")
subscription.read(0)

def take(last):
    found = []
    while last not in found:
        events = subscription.read(10)
        assert events, found
        found += [event.json()["n"] for event in events]
    return found

class Refused(Exception):
    pass

def order(number, refuse=False):
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
        id = hub.publish("orders", {"n": number}, connection=connection)
        assert id is None
        if refuse:
            raise Refused

for number in range(6):
    try:
        order(number, refuse=number % 2)
    except Refused:
        pass
with transaction.atomic():
    order(6)
    try:
        order(7, refuse=True)
    except Refused:
        pass
    assert take(4) == [0, 2, 4]
    assert subscription.read(0.3) == []
hub.publish("orders", {"n": 8}, connection=connection)  # no transaction: at once
assert take(8) == [6, 8]
try:
    hub.publish("orders", {"n": 9}, connection=connections["other"])
except ValueError as error:
    assert "PostgreSQL" in str(error)
else:
    raise AssertionError("it is a SQLite")
call_command("migrate", "syncstream", "zero", verbosity=0)
with connection.cursor() as cursor:
    cursor.execute("SELECT to_regnamespace('syncstream')")
    assert cursor.fetchone() == (None,)
hub.close()
connection.close()
"""


@pytest.mark.parametrize("mode", ["threads", "gevent"])
def test_django(server, schema, mode):
    """migrate installs it; what atomic() takes back is never seen, the rest once."""
    pytest.importorskip("django")
    server.execute(f"CREATE DATABASE {schema}")
    url = server.url_at(server.port, schema)
    if mode == "threads":
        with psycopg.connect(url) as connection:
            connection.execute(REVISION_1)
    check_script(DJANGO, mode, url, str(server.port), schema)
