"""Rights, as docs/brokers.md lists them, and what a server refuses."""

import contextlib

import psycopg
import pytest

from syncstream import Hub
from syncstream.brokers.postgresql.schema import install
from syncstream.errors import (
    Denied,
    Unavailable,
)
from tests import ROOT
from tests.brokers.sinks import listening
from tests.support.waits import await_true


def _grants(kind, role, schema):
    """Return the statements of the docs for a role that does one or the other."""
    docs = (ROOT / "docs" / "brokers.md").read_text()
    _, _, rest = docs.partition(f"<!-- postgresql rights: {kind} -->\n```sql\n")
    sql, _, _ = rest.partition("```")
    assert "GRANT" in sql
    sql = sql.replace("SCHEMA syncstream", f"SCHEMA {schema}")
    return sql.replace("syncstream.", f"{schema}.").replace("TO app;", f"TO {role};")


def _role(server, schema, kind):
    role = f"r{schema}_{kind}"
    server.execute(f"CREATE ROLE {role} LOGIN")
    server.execute(_grants(kind, role, schema))
    return server.url.replace("postgres@", f"{role}@")


def test_rights_of_the_docs(server, schema, make):
    """They are enough for what they say, and for no more."""
    install(server.url, schema=schema)
    # Functions that nobody else may call, as careful operators have it.
    server.execute(
        f"REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA {schema} FROM PUBLIC;"
        "REVOKE EXECUTE ON FUNCTION pg_control_system FROM PUBLIC"
    )
    urls = [_role(server, schema, kind) for kind in ("both", "publish", "subscribe")]
    both, publisher, reader = (make(url, create=False, capacity=10) for url in urls)
    heard = [listening(broker, "a") for broker in (both, reader)]
    for broker, url in zip((both, publisher), urls, strict=False):
        # Long enough to trim, by number and by age, of other channels, too.
        broker.publish([("a", b"x")] * 40)
        with psycopg.connect(url) as connection:
            broker.publish([("a", b"y")], connection=connection)
    for told in heard:
        await_true(lambda told=told: told.payloads.count(b"y") == 2)
    reader.read("a", "0")
    both.read("a", "0")
    with pytest.raises(Denied, match=r"permission denied.*docs/brokers.md"):
        reader.publish([("a", b"x")])
    # What it may not is its own affair: it hears as before.
    assert [told.states for told in heard] == [[], []]


def test_without_rights_it_says_so_once(server, schema, make):
    """And goes on when it has them: up and down as the server has it."""
    make().publish([("a", b"1")])
    server.execute(f"CREATE ROLE r{schema} LOGIN")
    broker = make(server.url.replace("postgres@", f"r{schema}@"))
    told = listening(broker, "a")
    for _ in range(2):
        with pytest.raises(Unavailable, match="permission denied for schema"):
            broker.read("a", None)
    await_true(lambda: told.states)
    assert told.states == [False]
    server.execute(_grants("subscribe", f"r{schema}", schema))
    await_true(lambda: told.states[1:])
    assert told.states == [False, True]
    # Rows that are hidden would be taken for deleted ones, or for none.
    server.execute(f"ALTER TABLE {schema}.event ENABLE ROW LEVEL SECURITY")
    for read in (lambda: broker.read("a", "0"), lambda: broker.newest("a", 1)):
        with pytest.raises(Unavailable, match="row-level security"):
            read()
    await_true(lambda: told.states[2:])
    server.execute(f"ALTER TABLE {schema}.event DISABLE ROW LEVEL SECURITY")
    broker.read("a", "0")
    await_true(lambda: told.states[3:])
    assert told.states == [False, True, False, True]


@pytest.mark.parametrize(
    ("denied", "granted"),
    [
        (
            "REVOKE EXECUTE ON FUNCTION {0}.read FROM PUBLIC, {1}",
            "GRANT EXECUTE ON FUNCTION {0}.read TO {1}",
        ),
        ("ALTER ROLE {1} CONNECTION LIMIT 1", "ALTER ROLE {1} CONNECTION LIMIT -1"),
    ],
    ids=["read", "connect"],
)
def test_what_the_listener_may_is_not_what_readers_may(
    server, schema, make, denied, granted
):
    """It hears, and they fail: that is down, until what fails is possible again."""
    other = make()
    other.publish([("a", b"0")])
    broker = make(_role(server, schema, "subscribe"))
    told = listening(broker, "a")
    server.execute(denied.format(schema, f"r{schema}_subscribe"))
    with pytest.raises(Unavailable):
        broker.read("a", None)
    for payload in (b"1", b"2", b"3"):  # a look each, and all of them but the last end
        other.publish([("a", payload)])
        await_true(lambda payload=payload: payload in told.payloads)
    assert told.states == [False]
    server.execute(granted.format(schema, f"r{schema}_subscribe"))
    await_true(lambda: told.states[1:])
    assert told.states == [False, True]
    broker.read("a", None)


def test_a_policy_denies_one_name(server, schema, make):
    """Who publishes is told; others, and all that listen, go on."""
    make().publish([("a", b"1")])
    url = _role(server, schema, "publish")
    server.execute(
        f"ALTER TABLE {schema}.event ENABLE ROW LEVEL SECURITY;"
        f"CREATE POLICY p ON {schema}.event USING (true) WITH CHECK (channel <> 'no')"
    )
    broker = make(url)
    told = listening(make(), "no", "a")
    with pytest.raises(Denied, match="row-level security"):
        broker.publish([("no", b"x")])
    broker.publish([("a", b"2")])
    await_true(lambda: told.payloads == [b"2"])


def test_kicks_that_a_role_may_not_tell(server, schema, make):
    """It is told so; whoever listens goes on."""
    reader = make()
    reader.publish([("a", b"data: 1\n\n")])
    url = _role(server, schema, "publish")
    server.execute(
        f"ALTER TABLE {schema}.event ENABLE ROW LEVEL SECURITY;"
        f"CREATE POLICY p ON {schema}.event USING (true)"
        " WITH CHECK (channel NOT LIKE 'syncstream %')"
    )
    with (
        contextlib.closing(Hub(broker=make(url))) as hub,
        contextlib.closing(Hub(broker=reader)) as other,
    ):
        ann = other.subscribe("a", who="ann")
        assert ann.read(0) == []
        with pytest.raises(Denied, match=r"in this process: 0.*row-level security"):
            hub.kick(who="ann")
        hub.publish("a", "2")
        assert [event.data for event in ann.read(5)] == ["2"]
        assert other.kick(who="ann") == 1


def test_what_the_server_refuses_is_down(server, schema, make):
    """Reading goes on, and it is said once: a full disk, for one."""
    broker = make()
    told = listening(broker, "a")
    broker.publish([("a", b"1")])
    server.execute(
        f"CREATE FUNCTION {schema}.full() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN RAISE disk_full; END'; CREATE TRIGGER full_disk BEFORE INSERT ON"
        f" {schema}.event EXECUTE FUNCTION {schema}.full()"
    )
    for _ in range(2):
        with pytest.raises(Unavailable, match="53100"):
            broker.publish([("a", b"x")])
        assert len(broker.read("a", "0").entries) == 1
    assert told.states == [False]
    server.execute(f"DROP TRIGGER full_disk ON {schema}.event")
    broker.publish([("a", b"2")])
    assert told.states == [False, True]
