"""The schema: installed, renewed, refused, and shared with older workers."""

import contextlib
import subprocess
import sys
import threading

import psycopg
import pytest

from syncstream.brokers.postgresql import PostgreSQLBroker
from syncstream.brokers.postgresql.schema import install, install_sql
from syncstream.errors import (
    Unavailable,
)
from tests import ROOT
from tests.brokers.postgresql.waits import LIMIT, REVISION_1
from tests.brokers.sinks import listening
from tests.support.waits import await_true


def test_install(server, schema, make):
    """As often as one likes; then it is used by who may not create it."""
    for _ in range(2):
        install(server.url, schema=schema)
    server.execute(f"CREATE ROLE r{schema} LOGIN")
    url = server.url.replace("postgres@", f"r{schema}@")
    with pytest.raises(Unavailable, match="permission denied"):
        make(url).publish([("a", b"x")])
    for grant in (
        f"USAGE ON SCHEMA {schema}",
        f"USAGE ON ALL SEQUENCES IN SCHEMA {schema}",
        f"SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema}",
    ):
        server.execute(f"GRANT {grant} TO r{schema}")
    broker = make(url)
    told = listening(broker, "a")
    broker.publish([("a", b"1")])
    with psycopg.connect(url) as connection:
        broker.publish([("a", b"2")], connection=connection)
    await_true(lambda: told.payloads == [b"1", b"2"])


def test_the_schema_is_created_once(server, schema):
    """By the first of many who come at one moment."""
    errors = []

    def use(broker):
        try:
            broker.publish([("a", b"x")])
        except Exception as error:
            errors.append(error)

    brokers = [
        PostgreSQLBroker(server.url, schema=schema, publish_timeout=LIMIT)
        for _ in range(10)
    ]
    threads = [threading.Thread(target=use, args=(broker,)) for broker in brokers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert errors == []
    assert len(brokers[0].read("a", "0").entries) == 10
    for broker in brokers:
        broker.close()


def test_what_it_says_without_a_schema(server, schema, make):
    """That it may not create it, or that it was told not to; and what to do."""
    with pytest.raises(Unavailable, match=r"no schema .*manage.py migrate"):
        make(create=False).publish([("a", b"x")])
    server.execute(f"CREATE ROLE r{schema} LOGIN")
    url = server.url.replace("postgres@", f"r{schema}@")
    with pytest.raises(Unavailable, match=r"may not create it: permission .*migrate"):
        make(url).publish([("a", b"x")])


def test_another_version_is_refused(server, schema, make):
    """Before anything is done with it."""
    make().publish([("a", b"x")])
    server.execute(f"UPDATE {schema}.state SET version = 99")
    broker = make()
    told = listening(broker, "a")
    with pytest.raises(Unavailable, match=r"has version 99, .* needs 1"):
        broker.publish([("a", b"x")])
    await_true(lambda: told.states)
    assert "version 99" in told.reasons[0]


def test_search_path_does_not_matter(server, schema, make):
    """Nor who has made things of the same names."""
    server.execute(
        "CREATE SCHEMA evil; CREATE TABLE evil.event (x int);"
        " CREATE FUNCTION evil.to_hex(bigint) RETURNS text LANGUAGE sql AS"
        " 'SELECT ''evil''';"
    )
    broker = make(f"{server.url}?options=-csearch_path%3Devil,pg_catalog")
    told = listening(broker, "a")
    (id,) = broker.publish([("a", b"1")])
    assert id.startswith("1-")
    with server.connect() as connection:
        connection.execute("SET search_path = evil, pg_catalog")
        broker.publish([("a", b"2")], connection=connection)
    await_true(lambda: told.payloads == [b"1", b"2"])


def test_other_settings_of_the_server(server, make):
    """Isolation, quoting and limits that a role or database has by default."""
    words = (
        "default_transaction_isolation=serializable",
        "default_transaction_read_only=on",
        "standard_conforming_strings=off",
        "bytea_output=escape",
    )
    options = "%20".join(f"-c{word}".replace("=", "%3D") for word in words)
    make().publish([("a", b"0")])
    broker = make(f"{server.url}?options={options}")
    told = listening(broker, "a")
    for number in range(3):
        broker.publish([("a", b"\\%d'" % number)])
    await_true(lambda: told.payloads == [b"\\0'", b"\\1'", b"\\2'"])


def test_the_command(server, schema):
    """It installs, or prints what it would; what fails it says in one line."""

    def run(*words):
        return subprocess.run(
            [sys.executable, "-m", "syncstream.brokers.postgresql", *words],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )

    assert run("--sql").stdout == f"{install_sql()};\n"
    words = ("--schema", schema)
    for _ in range(2):
        done = run(server.url, *words)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert server.execute(f"SELECT version FROM {schema}.state") == [(1,)]
    done = run("postgresql://postgres@127.0.0.1:1/x", *words)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1


class OldWorker:
    """What a worker of revision 1 does, over a connection."""

    def __init__(self, server, schema):
        self.connection = server.connect()
        self.schema = schema
        self.place = 0

    def publish(self, *items):
        sql = f"SELECT {self.schema}.publish(%s::text[], %s::bytea[], 1000, 3600.0)"
        channels, data = map(list, zip(*items, strict=True))
        return [id for (id,) in self.connection.execute(sql, (channels, data))]

    def enlist(self, channel, payload):
        self.connection.execute(
            f"INSERT INTO {self.schema}.outbox (channel, data, capacity, max_age)"
            " VALUES (%s, %s, 1000, 3600.0)",
            (channel, payload),
        )

    def tail(self):
        sql = f"SELECT * FROM {self.schema}.tail(%s, 500, ARRAY['a'], '{{}}')"
        rows = self.connection.execute(sql, (self.place,)).fetchall()[1:]
        self.place = rows[-1][0] if rows else self.place
        return [bytes(row[5]) for row in rows if row[5] is not None]

    def read(self):
        sql = f"SELECT * FROM {self.schema}.read('a', -1, 0, 1000, 1000, 3600.0)"
        return [bytes(row[3]) for row in self.connection.execute(sql).fetchall()[1:]]

    def version(self):
        sql = f"SELECT version FROM {self.schema}.state"
        return self.connection.execute(sql).fetchone()[0]


def test_old_and_new_workers_share_a_schema(server, schema, make):
    """While it is renewed, and after it: nothing is lost, doubled or out of order."""
    server.execute(REVISION_1.replace("syncstream", schema))
    old, waiting, late = (OldWorker(server, schema) for _ in range(3))
    with contextlib.ExitStack() as stack:
        for worker in (old, waiting, late):
            stack.enter_context(worker.connection)
        assert old.publish(("a", b"1"))[0].startswith("1-")
        for options in ({"create": False}, {}):
            server.execute(f"CREATE ROLE r{schema}{len(options)} LOGIN")
            url = server.url.replace("postgres@", f"r{schema}{len(options)}@")
            server.execute(f"GRANT USAGE ON SCHEMA {schema} TO r{schema}{len(options)}")
            with pytest.raises(Unavailable, match=r"older release.*migrate"):
                make(url, **options).read("a", None)
        late.connection.execute("BEGIN")
        late.enlist("a", b"5")
        # One that has appended and not committed, and one that waits for its lock.
        old.connection.execute("BEGIN")
        old.publish(("a", b"2"))
        waiting.connection.execute("BEGIN")
        steps = [
            threading.Thread(target=waiting.publish, args=(("a", b"3"), ("new", b"x"))),
            threading.Thread(target=lambda: install(server.url, schema=schema)),
        ]
        blocked = "SELECT count(*) FROM pg_locks WHERE NOT granted"
        for count, step in enumerate(steps, 1):
            step.start()
            await_true(lambda count=count: server.execute(blocked) == [(count,)])
        old.connection.execute("COMMIT")
        for step in steps:
            step.join(LIMIT)
        assert server.execute(f"SELECT revision FROM {schema}.upkeep") == [(2,)]
        assert waiting.version() == 1
        # It has begun before, and it holds up who has not.
        broker = make(publish_timeout=0.5)
        told = listening(broker, "a")
        with pytest.raises(Unavailable):
            broker.publish([("a", b"no")])
        waiting.connection.execute("COMMIT")
        broker.publish([("a", b"4")])
        late.connection.execute("COMMIT")
        old.publish(("a", b"6"))
        broker.publish([("a", b"7")])
        everything = [b"%d" % number for number in range(1, 8)]
        assert old.read() == everything
        assert old.tail() == everything
        await_true(lambda: told.payloads[-1:] == [b"7"])
        assert told.payloads == everything[2:]
        ids = [entry.id for entry in broker.read("a", "0").entries]
        prevs = [entry.prev for entry in broker.read("a", "0").entries]
        assert prevs[1:] == ids[:-1]


def test_who_may_not_renew_holds_up_nobody(server, schema, make):
    """Its turn at the schema ends before it waits for a lock that publishers need."""
    server.execute(REVISION_1.replace("syncstream", schema))
    server.execute(
        f"CREATE ROLE r{schema} LOGIN; GRANT USAGE ON SCHEMA {schema} TO r{schema};"
        f"GRANT ALL ON ALL TABLES IN SCHEMA {schema} TO r{schema}"
    )
    with server.connect() as other, other.transaction():
        other.execute(f"DELETE FROM {schema}.event")
        with pytest.raises(Unavailable, match="must be owner"):
            make(server.url.replace("postgres@", f"r{schema}@")).read("a", None)
