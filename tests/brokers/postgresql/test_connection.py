"""Servers that die, are silent, or were never there; URLs, and what they hide."""

import contextlib
import sys
import time
import traceback

import pytest

from syncstream.brokers import open_broker
from syncstream.brokers.postgresql import PostgreSQLBroker, __main__, listener, pool
from syncstream.errors import (
    Unavailable,
    Uncertain,
)
from tests.brokers.postgresql.waits import LIMIT, SHORT, publish_until_it_works
from tests.brokers.sinks import listening
from tests.support.clock import Clock
from tests.support.tcp_proxy import Proxy
from tests.support.waits import await_true


@pytest.fixture
def clock():
    with Clock() as clock:
        yield clock


def test_a_dead_server_is_told_of_in_time(make, line, clock):
    """Nothing was sent: Unavailable, within publish_timeout, and it comes back."""
    make().read("a", None)  # installs, however long that takes
    url = f"postgresql://postgres@127.0.0.1:{line.port}/postgres"
    broker = make(url, publish_timeout=SHORT)
    told = listening(broker, "a")
    broker.publish([("a", b"1")])
    await_true(lambda: told.payloads == [b"1"])
    line.cut()
    for call in (lambda: broker.publish([("a", b"x")]), lambda: broker.read("a", "0")):
        began = clock()
        with pytest.raises(Unavailable):
            call()
        assert clock() - began < 1.5
    await_true(lambda: told.states)
    line.mend()
    publish_until_it_works(broker, ("a", b"2"))
    await_true(lambda: told.payloads == [b"1", b"2"])
    assert told.states == [False, True]
    # It went on where it was: nobody has to read anything anew.
    assert told.resyncs == []


def test_a_silent_server_is_told_of_in_time(make, line, clock, monkeypatch):
    """A black hole: kept connections are asked first, so nothing was sent."""
    make().read("a", None)  # installs, however long that takes
    url = f"postgresql://postgres@127.0.0.1:{line.port}/postgres"
    broker = make(url, publish_timeout=SHORT)
    monkeypatch.setattr(pool, "FRESH", 0.0)
    broker.publish([("a", b"1")])
    line.silence()
    began, began_here = time.monotonic(), clock()
    with pytest.raises(Unavailable):
        broker.publish([("a", b"x")])
    assert time.monotonic() - began > 1
    assert clock() - began_here < 3
    line.mend()
    publish_until_it_works(broker, ("a", b"2"))
    payloads = [entry.payload for entry in broker.read("a", "0").entries]
    assert payloads == [b"1", b"2"]


def test_a_lost_answer_is_uncertain(make, line, monkeypatch):
    """It was sent and not confirmed: it is stored once, and nobody tries again."""
    make().read("a", None)  # installs, however long that takes
    url = f"postgresql://postgres@127.0.0.1:{line.port}/postgres"
    broker = make(url, publish_timeout=SHORT)
    monkeypatch.setattr(pool, "FRESH", LIMIT)  # it is not asked whether it lives
    broker.publish([("a", b"1")])
    line.silence("out")
    with pytest.raises(Uncertain):
        broker.publish([("a", b"2")])
    line.mend()
    await_true(lambda: len(broker.read("a", "0").entries) == 2)
    publish_until_it_works(broker, ("a", b"3"))
    payloads = [entry.payload for entry in broker.read("a", "0").entries]
    assert payloads == [b"1", b"2", b"3"]


def test_who_waits_for_the_lock_is_told_that_nothing_was_stored(make, server, schema):
    """Somebody appends by himself, and stays in his transaction."""
    make().read("a", None)  # installs, however long that takes
    broker = make(publish_timeout=SHORT)
    broker.publish([("a", b"1")])
    with server.connect() as other, other.transaction():
        other.execute(f"SELECT {schema}.append('a', '2', 1000, NULL)")
        # After publish_timeout it would be Uncertain.
        with pytest.raises(Unavailable, match="statement timeout"):
            broker.publish([("a", b"x")])
        assert len(broker.read("a", "0").entries) == 1
    broker.publish([("a", b"3")])
    payloads = [entry.payload for entry in broker.read("a", "0").entries]
    assert payloads == [b"1", b"2", b"3"]


def test_a_server_that_is_not_there_at_the_start(make, line, clock):
    """It is told of in time, and when it comes all is as if it had been there."""
    line.cut()
    broker = make(f"postgresql://postgres@127.0.0.1:{line.port}/postgres")
    began = clock()
    told = listening(broker, "a")
    assert clock() - began < 2
    with pytest.raises(Unavailable):
        broker.read("a", None)
    await_true(lambda: told.states == [False])
    line.mend()
    await_true(lambda: told.states == [False, True])
    # It may have missed some: who watches was told that it did not yet.
    assert told.resyncs == [None]
    broker.publish([("a", b"1")])
    await_true(lambda: told.payloads == [b"1"])


def test_a_host_that_does_not_answer_leaves_time_for_the_next(make, server, line):
    """Each address of a connection string has its share of the time."""
    make().publish([("a", b"0")])  # to install takes a share, too
    line.silence()
    broker = make(
        f"postgresql://postgres@127.0.0.1:{line.port},127.0.0.1:{server.port}/postgres",
        publish_timeout=4.0,
    )
    broker.publish([("a", b"1")])
    with pytest.raises(Unavailable, match="no-such-host"):
        make("postgresql://no-such-host.invalid/x").publish([("a", b"x")])


def test_urls(server, monkeypatch):
    """postgresql: alone is what the environment says; others are libpq's."""
    monkeypatch.setenv("PGHOST", "127.0.0.1")
    monkeypatch.setenv("PGPORT", str(server.port))
    monkeypatch.setenv("PGUSER", "postgres")
    for name, url in enumerate(("postgresql:", "postgres://", server.url)):
        with contextlib.closing(open_broker(url, capacity=7, max_age=None)) as broker:
            assert broker.scope == "cluster"
            channel = f"a{name}"
            assert broker.read(channel, None).head.startswith("0-")
            broker.publish([(channel, b"x")] * 8)
            assert len(broker.read(channel, "0").entries) == 7
    with pytest.raises(ValueError, match="as libpq takes them"):
        open_broker("postgresql://h/d?no_such_option=1")
    for host in ("a..b", "c" * 64):
        with (
            contextlib.closing(open_broker(f"postgresql://{host}/d")) as broker,
            pytest.raises(Unavailable, match="cannot be found"),
        ):
            broker.publish([("a", b"x")])
    for options in (
        {"schema": "a; DROP"},
        {"publish_timeout": 0},
        {"connections": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            PostgreSQLBroker(**options)


def test_a_firewall_forgets_idle_connections(server, make, clock, monkeypatch):
    """The next publish is stored, within its time; what listens goes on, too."""
    make().publish([("a", b"1")])
    with Proxy(server.port) as proxy:
        url = server.url_at(proxy.port)
        broker = make(url, connections=2, publish_timeout=SHORT)
        told = listening(broker, "a")
        broker.publish([("a", b"2")])
        # Until the listener takes no answer for an end.
        monkeypatch.setattr(listener, "READ_TIMEOUT", 1.0)
        monkeypatch.setattr(pool, "FRESH", 0.0)
        proxy.forget()
        began = clock()
        broker.publish([("a", b"3")])
        assert clock() - began < 2
        await_true(lambda: told.payloads == [b"2", b"3"])
    payloads = [entry.payload for entry in make().read("a", "0").entries]
    assert payloads == [b"1", b"2", b"3"]


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://app:s3cr3t@h/d",
        "postgresql://app:s3cr3t%zz@h/d",
        "postgresql://app:x/s3cr3t@h/d",
        "postgresql://app:s3cr3t/x@h/d",
        "postgresql://app:x@s3cr3t@h/d",
        "postgresql://app:s3cr3t@h:port/d",
        "host=h password=x s3cr3t",
        "postgresql://app:s3cr3t@h/d?nonsense=1",
    ],
)
def test_no_password_is_shown(url, capsys, monkeypatch):
    """Not in an error, its causes, a repr, or what the command says."""
    with pytest.raises(ValueError, match="url must be") as found:
        PostgreSQLBroker(url)
    assert "s3cr3t" not in "".join(traceback.format_exception(found.value))
    for words in ([url], [url, url]):
        monkeypatch.setattr(sys, "argv", ["postgresql", *words])
        with pytest.raises(SystemExit) as ended:
            __main__.main()
        assert ended.value.code
        output = capsys.readouterr()
        assert "s3cr3t" not in output.out + output.err
