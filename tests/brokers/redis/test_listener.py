"""What is told of what was stored, by lines and servers that fail."""

import contextlib
import signal

import pytest

from syncstream.brokers.redis import beats
from syncstream.errors import Unavailable
from syncstream.runtime.journal import journal
from tests.brokers.redis.clients import (
    Publisher,
    Reader,
    account,
    at,
    end,
    hub_of,
    opened,
)
from tests.brokers.sinks import Told
from tests.support.redis_server import RedisServer
from tests.support.tcp_proxy import Proxy
from tests.support.waits import await_true


@pytest.fixture
def hasty(quick, monkeypatch):
    """Likewise, and a line is given up that soon; maybe one that is only slow."""
    monkeypatch.setattr(beats, "DEAF", 0.7)


MALFORMED = [
    b"",
    b" ",
    b"\0nope",
    b"reset",
    b"1-1",
    b"1-1 0-1",  # no payload's place
    b"one 0-1 x",
    b"\xff-1 0-1 x",
    b"1-1 \xff x",
    b"1-1  x",
    b"1-1-1 0-1 x",
    b"1" * 400 + b"-1 0-1 x",
    b"x" * 3_000_000,
]


def test_what_is_no_event_silences_nobody(server, quick, caplog):
    """It is dropped and said once, and its channel is read anew; the line stays."""
    with opened(server.url) as broker, server.client() as client:
        told = Told()
        broker.attach(told)
        for name in ("a", "b:*", "c:#"):
            broker.watch(name)
        (listener,) = server.listeners()
        (own,) = [c for c in client.pubsub_channels() if b"ctl:" in c]
        for data in MALFORMED:
            for topic in (b"ss:{a}", b"ss:{b:1}", b"ss:{b:\xff}", b"ss:{c:x", own):
                client.publish(topic, data)
        broker.publish([("a", b"1"), ("b:1", b"2"), ("c", b"3")])
        await_true(lambda: len(told.entries) == 3)
        assert told.payloads == [b"1", b"2", b"3"]
        await_true(lambda: {"a", "b:1"} <= {*told.lost})
        assert [found["id"] for found in server.listeners()] == [listener["id"]]
        assert told.states == []
        journal().flush()
        assert caplog.text.count("was dropped") == 1


def test_a_sink_that_fails_ends_no_listener(server, quick):
    """What it has not taken is read anew."""

    class Failing(Told):
        def deliver(self, channel, entry):
            if entry.payload == b"bad":
                raise ValueError("bad")
            super().deliver(channel, entry)

    with opened(server.url) as broker:
        told = Failing()
        broker.attach(told)
        names = [f"a{number}" for number in range(150)]  # more than a request's
        for name in names:
            broker.watch(name)
        broker.publish([(name, b"bad") for name in names])
        broker.publish([("a0", b"good")])
        await_true(lambda: told.payloads == [b"good"] and {*told.lost} == {*names})
        assert told.states == []


def test_a_sink_that_fails_is_told_of_a_loss_again(server, quick):
    """Nothing else would show it: the heads have been compared."""
    calls = []

    class Failing(Told):
        def resync(self, channels):
            calls.append([*channels])
            if len(calls) == 1:
                raise ValueError("bad")

    with opened(server.url) as broker:
        told = Failing()
        broker.attach(told)
        broker.watch("a")
        broker.publish([("a", b"1")])
        await_true(lambda: told.payloads == [b"1"])
        server.command("DEL", "ss:{a}")
        await_true(lambda: calls == [["a"], ["a"]])


@pytest.mark.parametrize("loss", [("FLUSHALL",), ("DEL", "ss:{a}")], ids=lambda w: w[0])
def test_what_an_empty_channel_lost_is_announced(loss, server):
    """Its head is another one after events that are gone; else it stays."""
    with opened(server.url) as broker:
        head = broker.read("a", None).head
        page = broker.read("a", head)
        assert (page.head, page.complete) == (head, True)
        broker.publish([("b", b"x")])
        assert broker.read("a", head).complete
        broker.publish([("a", b"1")])
        page = broker.read("a", head)
        assert page.complete
        assert [entry.prev for entry in page.entries] == [head]
        server.command(*loss)
        page = broker.read("a", head)
        assert not page.complete
        broker.publish([("a", b"2")])
        assert not broker.read("a", head).complete
        assert broker.read("a", page.head).complete


@contextlib.contextmanager
def silence(proxy):
    proxy.is_silent = True
    try:
        yield
    finally:
        proxy.is_silent = False


def cut(server, proxy, hub):
    """All connections are reset; new ones, too, for a while."""
    proxy.is_refusing = True
    proxy.cut()
    await_true(lambda: not hub.stats()["up"])
    proxy.is_refusing = False


def black_hole(server, proxy, hub):
    """Nothing passes, and nobody says so."""
    with silence(proxy):
        await_true(lambda: not hub.stats()["up"])


def restart(server, proxy, hub):
    """The server ends in good order, and comes back with what it has."""
    server.restart()


def crash(server, proxy, hub):
    """The server is killed, and comes back with what it has on disk."""
    server.restart(signal.SIGKILL)


def freeze(server, proxy, hub):
    """The server stops for so long that it is given up."""
    server.send(signal.SIGSTOP)
    await_true(lambda: not hub.stats()["up"])
    server.send(signal.SIGCONT)


FAULTS = (cut, end, black_hole, restart, crash, freeze)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_subscribers_miss_nothing(fault, hasty, clock, caplog):
    """Whatever fails, who is there stays, and gets all that was stored, in order."""
    with (
        RedisServer("--appendonly", "yes", "--appendfsync", "always") as server,
        Proxy(server.port) as proxy,
        hub_of(at(proxy.port, "publish_timeout=1")) as hub,
        Reader(hub, "a") as reader,
        Publisher(at(server.port, "publish_timeout=1"), clock=clock) as publisher,
    ):
        for _ in range(2):
            publisher.more()
            before = caplog.text.count("the broker is back")
            fault(server, proxy, hub)
            await_true(lambda n=before: caplog.text.count("the broker is back") > n)
            publisher.more()
        account(publisher, reader)
        assert publisher.longest < 1.5
        assert len(publisher.uncertain) < 10
        journal().flush()
        assert "the broker is down" in caplog.text
        # The server sees a moment later that another one has ended.
        await_true(lambda: len(server.listeners()) == 1)


def test_the_last_event_is_not_lost(server, proxy, quick):
    """What came while a line was down is read when it is back; nothing follows it."""
    with (
        hub_of(at(proxy.port)) as hub,
        Reader(hub, "a") as reader,
        Reader(hub, "b") as other,
        opened(server.url) as broker,
    ):
        proxy.is_refusing = True
        proxy.cut()
        await_true(lambda: not hub.stats()["up"])
        broker.publish([("a", b"data: last\n\n")])
        proxy.is_refusing = False
        await_true(lambda: reader.got == ["last"])
        assert other.got == other.gaps == []


def test_what_nobody_told_of_is_found(server, quick):
    """An event whose message never came is read within a round, the last one, too."""
    with hub_of(server.url) as hub, Reader(hub, "a") as reader:
        hub.publish("a", "1")
        await_true(lambda: reader.got == ["1"])
        head = hub.head("a")
        ms, _, number = head.partition("-")
        id = f"{ms}-{int(number) + 1}"
        fields = ["p", head, "d", "data: 2\n\n"]
        server.command("XADD", "ss:{a}", id, *fields)
        await_true(lambda: reader.got == ["1", "2"])
        assert reader.gaps == []


@pytest.mark.parametrize("fault", ["flush", "evict", "restart"])
def test_lost_events_are_announced(fault, server, quick):
    """A server that has forgotten them: one reset for each who is there."""
    with (
        hub_of(server.url) as hub,
        Reader(hub, "a") as reader,
        Reader(hub, "b") as other,
        Publisher(server.url) as publisher,
    ):
        hub.publish("b", "1")
        await_true(lambda: other.got == ["1"])
        publisher.more()
        if fault == "flush":
            server.command("FLUSHALL")
        elif fault == "evict":
            server.command("DEL", "ss:{a}", "ss:{b}")
        else:
            server.restart(signal.SIGKILL)
            await_true(lambda: hub.stats()["up"])
        publisher.more()
        account(publisher, reader, has_gap=True)
        await_true(lambda: other.gaps)
        assert [gap.json()["channel"] for gap in reader.gaps] == ["a"]
        assert [gap.json()["channel"] for gap in other.gaps] == ["b"]
        assert other.got == ["1"]


def test_patterns_are_told_of_a_loss(server, proxy):
    """Nobody knows which channels there were: one reset, then all that comes."""
    with hub_of(at(proxy.port)) as hub, Reader(hub, "a:*") as reader:
        hub.publish("a:1", "1")
        await_true(lambda: reader.got == ["1"])
        cut(server, proxy, hub)
        await_true(lambda: reader.gaps)
        hub.publish("a:2", "2")
        await_true(lambda: reader.got == ["1", "2"])
        assert [gap.json()["channel"] for gap in reader.gaps] == ["a:*"]


def test_a_promoted_replica_has_lost_some(server, quick):
    """Who has a lost id gets a reset, who has one that was kept misses nothing."""
    with RedisServer() as replica, Proxy(server.port) as proxy:
        replica.command("REPLICAOF", "127.0.0.1", str(server.port))
        with (
            hub_of(at(proxy.port)) as hub,
            Reader(hub, "a") as reader,
            Reader(hub, "b") as quiet,
        ):
            kept = [hub.publish("a", str(number)) for number in range(10)]
            hub.publish("b", "0")
            await_true(lambda: replica.command("XLEN", "ss:{b}") == 1)
            replica.command("REPLICAOF", "NO", "ONE")
            lost = [hub.publish("a", f"lost {number}") for number in range(5)]
            await_true(lambda: "lost 4" in reader.got)
            proxy.target = replica.port
            server.stop(signal.SIGKILL)
            proxy.cut()
            await_true(lambda: hub.stats()["up"] and len(replica.listeners()) == 1)
            new = [hub.publish("a", f"new {number}") for number in range(8)]
            await_true(lambda: "new 7" in reader.got)
            assert len(reader.gaps) == 1
            assert quiet.gaps == []
            after = hub.broker.read("a", kept[-1])
            assert after.complete
            assert [entry.id for entry in after.entries] == new
            for id in lost:
                page = hub.broker.read("a", id)
                assert not page.complete
                assert [entry.id for entry in page.entries] == kept + new


def test_a_server_that_comes_later(quick):
    """Who subscribes before there is one is told as soon as there is."""
    with RedisServer() as server:
        server.stop()
        with opened(server.url) as broker:
            told = Told()
            broker.attach(told)
            broker.watch("a")
            broker.watch("b:*")
            await_true(lambda: told.states)
            assert told.states[0] is False
            assert "cannot connect" in told.reasons[0]
            with pytest.raises(Unavailable):
                broker.publish([("a", b"0")])
            server.start()
            await_true(lambda: len(told.states) == 2)
            assert told.states[1] is True
            await_true(lambda: sorted(told.lost) == ["a", "b:*"])
            broker.publish([("a", b"1"), ("b:1", b"2")])
            await_true(lambda: told.payloads == [b"1", b"2"])
