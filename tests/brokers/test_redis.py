"""``redis:``: the contract, and what it says when a server or a line fails.

Everything is real: servers that are killed, stopped, flushed and promoted, and a
proxy that cuts connections and swallows what they carry.
"""

import contextlib
import itertools
import os
import queue
import random
import re
import signal
import socket
import threading
import time
import traceback
from inspect import signature
from pathlib import Path

import pytest
import redis

from syncstream.brokers import open_broker
from syncstream.brokers.log import JOIN
from syncstream.brokers.redis import RedisBroker, beats
from syncstream.brokers.redis import broker as module
from syncstream.brokers.redis import server as server_module
from syncstream.channels import control as control_module
from syncstream.channels.control import CONTROL
from syncstream.channels.gap import Gap
from syncstream.channels.hub import Hub
from syncstream.errors import Closed, Denied, Unavailable, Uncertain
from syncstream.runtime.journal import journal
from syncstream.testing import check_broker
from tests import ROOT
from tests.brokers.redis_nodes import Nodes
from tests.support.clock import Clock
from tests.support.pairs import check_script, come_and_go, read_for_the_newest
from tests.support.programs import certificate
from tests.support.redis_server import RedisServer, Sentinel
from tests.support.tcp_proxy import Proxy
from tests.support.waits import TIMEOUT, await_true

_prefixes = itertools.count()


@pytest.fixture(scope="module")
def shared():
    """One server, for tests that leave it as it was."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def server():
    """A server of the test's own."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def proxy(server):
    """A line to that server."""
    with Proxy(server.port) as proxy:
        yield proxy


@pytest.fixture
def clock():
    with Clock() as clock:
        yield clock


@pytest.fixture
def quick(monkeypatch):
    """Beats, and what is found out by them, in a tenth of the time."""
    monkeypatch.setattr(beats, "BEAT", 0.2)
    monkeypatch.setattr(beats, "ROUND", 1.0)


@pytest.fixture
def hasty(quick, monkeypatch):
    """Likewise, and a line is given up that soon; maybe one that is only slow."""
    monkeypatch.setattr(beats, "DEAF", 0.7)


def own(url):
    """Return a URL with a prefix that no other test has."""
    return f"{url}{'&' if '?' in url else '?'}prefix=t{next(_prefixes)}:"


def at(port, *query):
    return f"redis://127.0.0.1:{port}?{'&'.join(query)}"


@contextlib.contextmanager
def opened(url, **options):
    broker = open_broker(url, **options)
    try:
        yield broker
    finally:
        broker.close()


@contextlib.contextmanager
def hub_of(url, **options):
    hub = Hub(url, **options)
    try:
        yield hub
    finally:
        hub.close()


class Told:
    """A sink that keeps what it is told."""

    def __init__(self):
        self.entries = []
        self.lost = []
        self.states = []
        self.denied = []

    def deliver(self, channel, entry):
        self.entries.append((channel, entry))

    def resync(self, channels):
        self.lost += channels

    def state(self, is_up, reason):
        self.states.append((is_up, reason))

    def deny(self, name, reason):
        self.denied.append((name, reason))

    def payloads(self):
        return [entry.payload for _, entry in self.entries]


# The contract.

BY_GREENLETS = """
import itertools, sys
from gevent import monkey
monkey.patch_all()
from tests.brokers.redis_nodes import Nodes
from syncstream.brokers.redis import RedisBroker
from syncstream.protocol import sse
from syncstream.testing import check_broker
prefixes = itertools.count()
def url():
    return f"{sys.argv[1]}?prefix={sys.argv[3]}-{next(prefixes)}:"
if sys.argv[2] == "4":
    with Nodes(3, "gevent") as nodes:
        check_broker(lambda: nodes.broker(url()), rounds=50)
else:
    check_broker(lambda: RedisBroker(url()), rounds=100)
    make = lambda: RedisBroker(url(), capacity=100)
    check_broker(make, capacity=100, rounds=100)
    check_broker(lambda: RedisBroker(url(), max_age=0.2), max_age=0.2)
"""


def test_the_contract_by_threads(shared):
    """The whole suite."""

    def remove(broker, channel, id):
        key = broker._servers()[0].key(channel)
        assert shared.command("XDEL", key, id) == 1

    check_broker(lambda: RedisBroker(own(shared.url)), rounds=100, remove=remove)


def test_the_contract_with_little_room(shared):
    """The whole suite, where few events are kept."""
    check_broker(
        lambda: RedisBroker(own(shared.url), capacity=100), capacity=100, rounds=100
    )


def test_the_contract_by_age(shared):
    """What is too old is not kept, and not taken for complete."""
    check_broker(lambda: RedisBroker(own(shared.url), max_age=0.2), max_age=0.2)


def test_the_contract_by_four_processes(shared):
    """The whole suite, where four processes publish in turns."""
    with Nodes(3) as nodes:
        check_broker(lambda: nodes.broker(own(shared.url)), rounds=50)


@pytest.mark.parametrize("processes", [1, 4])
def test_the_contract_by_greenlets(shared, processes):
    """The whole suite, in processes that gevent has patched."""
    pytest.importorskip("gevent")
    check_script(BY_GREENLETS, shared.url, str(processes), f"g{next(_prefixes)}")


def test_the_contract_by_several_servers(shared):
    """The whole suite, where each channel is on one of three."""
    with RedisServer() as second, RedisServer() as third:
        hosts = f"127.0.0.1:{second.port},127.0.0.1:{third.port}"
        check_broker(lambda: RedisBroker(own(f"{shared.url},{hosts}")), rounds=30)
        for one in (shared, second, third):
            assert one.command("DBSIZE") > 50


# URLs.


def test_urls_name_servers(shared):
    """What redis-py takes, ours beside it; nothing is connected to."""
    path = f"unix://{shared.socket}?db=0"
    for url in (shared.url, f"valkey{shared.url[5:]}", f"{shared.url}/3", path):
        with opened(own(url)) as broker:
            told = Told()
            broker.attach(told)
            broker.watch("a")
            (id,) = broker.publish([("a", b"x")])
            assert broker.read("a", "0").head == id
            await_true(lambda told=told: told.payloads() == [b"x"])


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("redis://h?publish_timeout=soon", "publish_timeout must be seconds"),
        ("redis://h?publish_timeout=0", "publish_timeout must be seconds"),
        ("redis://h?colour=red", "colour"),
        ("redis://h?ssl_ca_certs=x", "ssl_ca_certs"),  # it would not be encrypted
        ("redis://h?socket_timeout=inf", "socket_timeout"),
        ("redis://h?decode_responses=1", "decode_responses"),
        ("redis://h?max_connections=0", "max_connections must be"),
        ("redis://h?db=one", "db must be"),
        ("redis://h/one", "url must be redis:"),
        ("redis://a..b", "url must be redis:"),
        (f"redis+sentinel://a,{'b' * 64}/one", "url must be redis:"),
        ("rediss://h?ssl_cert_reqs=maybe", "ssl_cert_reqs"),
        ("redis+sentinel://h", "name the service"),
        ("rediss+sentinel://h/one?sentinel_colour=red", "sentinel_colour"),
    ],
)
def test_urls_are_refused(url, sentence):
    """In the caller's frame, not on the wire."""
    with pytest.raises(ValueError, match=sentence):
        open_broker(url)


@pytest.mark.parametrize(
    "rest",
    [
        "s3cr3t/1@h",
        "123/s3cr3t@h",
        "12?s3cr3t@h",
        "1#s3cr3t@h",
        "s3cr3t[@h",
        "s3cr3t:x",
        "\u2100s3cr3t@h",
        "s3cr3t@h:x",
        "s3cr3t@h?db=s3cr3t",
        "s3cr3t@h?publish_timeout=s3cr3t",
        "s3cr3t@h?max_connections=s3cr3t",
        "s3cr3t@h?ssl_cert_reqs=s3cr3t",
        "s3cr3t@h?socket_keepalive=1&s3cr3t@",
    ],
)
@pytest.mark.parametrize(
    "scheme", ["redis", "rediss", "valkey", "redis+sentinel", "unix"]
)
def test_no_refused_url_shows_its_password(scheme, rest):
    """Whatever is wrong with it, wherever that moves it; in no chained error, too."""
    with pytest.raises(ValueError, match=r"url|options|must be") as caught:
        open_broker(f"{scheme}://me:{rest}")
    assert "s3cr3t" not in "".join(traceback.format_exception(caught.value, limit=0))


def test_no_password_is_told():
    """What is logged and raised names the server, and no more."""
    with opened("redis://me:secret@127.0.0.1:1?publish_timeout=1") as broker:
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1") as caught:
            broker.publish([("a", b"x")])
        assert "secret" not in str(caught.value)


def test_tls_and_passwords(tmp_path):
    """By rediss:, with a user's name; who has none is refused, and told so."""
    cert, key = certificate(tmp_path, "127.0.0.1")
    with RedisServer("--requirepass", "secret", tls=(cert, key)) as server:
        end = f"127.0.0.1:{server.port}?ssl_ca_certs={cert}&ssl_check_hostname=no"
        with opened(own(f"rediss://default:secret@{end}")) as broker:
            told = Told()
            broker.attach(told)
            broker.watch("a")
            payloads = [b"x" * size for size in (1, 20_000, 1 << 20, 0)]
            broker.publish([("a", payload) for payload in payloads])
            await_true(lambda: told.payloads() == payloads)
        with (
            opened(f"rediss://{end}") as broker,
            pytest.raises(Unavailable, match=r"(?i)auth"),
        ):
            broker.publish([("a", b"x")])


def test_tls_is_checked_for_the_host_name(tmp_path, monkeypatch):
    """A certificate of another host is refused, unless the URL does not ask for it."""
    init = redis.SSLConnection.__init__  # before redis-py 6 it did not check by itself
    given = [p for p in signature(init).parameters.values() if p.default is not p.empty]
    old = (False if p.name == "ssl_check_hostname" else p.default for p in given)
    monkeypatch.setattr(init, "__defaults__", tuple(old))
    cert, key = certificate(tmp_path, "example.org")
    with RedisServer(tls=(cert, key)) as server:
        end = f"127.0.0.1:{server.port}"
        master = f"rediss+sentinel://{end}/mine"

        def publish(url, *words):
            query = "&".join([f"ssl_ca_certs={cert}", *words])
            with opened(f"{url}?{query}") as broker:
                broker.publish([("a", b"x")])

        lax = "ssl_check_hostname=no", "ssl_cert_reqs=none"
        # It knows no Sentinel's commands: so one is told by whom it trusts.
        with pytest.raises(Unavailable, match="no Sentinel knows a master"):
            publish(master)
        for word in lax:
            with pytest.raises(Unavailable, match="unknown command"):
                publish(master, word)
        found = "127.0.0.1", server.port
        monkeypatch.setattr(server_module.Sentinel, "discover_master", lambda *_: found)
        for url in (f"rediss://{end}", f"valkeys://{end}", master):
            with pytest.raises(Unavailable, match=r"(?i)certificate"):
                publish(url)
            for word in lax:
                publish(url, word)


def test_databases_do_not_hear_each_other(shared):
    """Keys are a database's own, and so is what is told."""
    prefix = f"prefix=db{next(_prefixes)}:"
    told = Told(), Told()
    with (
        opened(f"{shared.url}/0?{prefix}") as first,
        opened(f"{shared.url}/1?{prefix}") as second,
    ):
        for broker, sink in zip((first, second), told, strict=True):
            broker.attach(sink)
            broker.watch("a")
            broker.watch("#")
        first.publish([("a", b"first")])
        second.publish([("a", b"second")])
        await_true(lambda: all(sink.entries for sink in told))
        assert [sink.payloads() for sink in told] == [[b"first"], [b"second"]]


def test_all_processes_choose_the_same_server(shared):
    """Each channel is on one of several, wherever it is asked for."""
    with RedisServer() as second, Nodes(1) as nodes:
        url = own(f"{shared.url},127.0.0.1:{second.port}")
        names = [f"c:{number}" for number in range(100)]
        with opened(url) as broker:
            told = Told()
            broker.attach(told)
            broker.watch("c:*")
            for name in names:
                nodes.publish(0, url, [(name, name.encode())])
                (entry,) = broker.read(name, "0").entries
                assert entry.payload == name.encode()
            ids = broker.publish([(name, b"2") for name in names])
            assert [broker.read(name, None).head for name in names] == ids
            await_true(lambda: len(told.entries) == 200)
            assert 20 < second.command("DBSIZE") < 80


# Patterns.


def test_patterns_are_ours_not_globs(shared):
    """What Redis' globs would make of a name does not matter."""
    with opened(own(shared.url)) as broker:
        told = Told()
        broker.attach(told)
        for pattern in ("a?[b]:*", "back\\:#", "x]:*"):
            broker.watch(pattern)
        names = ["a?[b]:1", "axb:1", "back\\", "back\\:1:2", "back:1", "x]:1", "ü:1"]
        broker.publish([(name, name.encode()) for name in names])
        broker.watch("ü:*")
        broker.publish([("ü:2", b"last")])
        await_true(lambda: b"last" in told.payloads())
        found = [channel for channel, _ in told.entries]
        assert found == ["a?[b]:1", "back\\", "back\\:1:2", "x]:1", "ü:2"]


def test_each_event_is_told_once(shared):
    """However many watched names bring it."""
    with opened(own(shared.url)) as broker:
        told = Told()
        broker.attach(told)
        for name in ("a:b", "a:*", "a:#", "#", "*"):
            broker.watch(name)
        broker.publish([("a:b", b"1"), ("a:b", b"2"), ("c", b"3"), ("a:b", b"4")])
        await_true(lambda: b"4" in told.payloads())
        assert told.payloads() == [b"1", b"2", b"3", b"4"]
        broker.unwatch("a:b")
        broker.unwatch("#")
        broker.unwatch("*")
        broker.publish([("c", b"5"), ("a:b", b"6")])
        await_true(lambda: b"6" in told.payloads())
        assert b"5" not in told.payloads()[4:] or told.payloads()[4:] == [b"5", b"6"]


# What the server refuses.


def refused(broker, clock, kind=Unavailable, match=None):
    """Check what a publish of one event and of a batch is refused with, and when."""
    for items in ([("a", b"1")], [("a", b"2"), ("b", b"3")]):
        began = clock()
        with pytest.raises(kind, match=match) as caught:
            broker.publish(items)
        assert type(caught.value) is kind
        assert clock() - began < 3
    with pytest.raises(ValueError, match="connection must be None"):
        broker.publish([("a", b"1")], connection=object())


def test_refused_connections(clock):
    """Nobody listens: nothing was stored, and reads say so, too."""
    with RedisServer() as server:
        url = server.url
    with opened(url) as broker:
        refused(broker, clock, match="cannot connect")
        with pytest.raises(Unavailable, match="cannot connect"):
            broker.read("a", None)
        broker.attach(Told())
        began = clock()
        broker.watch("a")
        broker.watch("b")
        assert clock() - began < 3


@pytest.mark.parametrize("reason", ["OOM", "READONLY", "MISCONF", "LOADING", "key"])
def test_refused_publishes(reason, clock):
    """What the server does not store is Unavailable; later it is stored."""
    options = ["--save", "3600 1"] if reason in ("MISCONF", "LOADING") else []
    with RedisServer(*options) as server, opened(server.url) as broker:
        broker.publish([("c", b"0")])
        if reason == "OOM":
            server.command("CONFIG", "SET", "maxmemory", "1")
            refused(broker, clock, match="maxmemory")
            server.command("CONFIG", "SET", "maxmemory", "0")
        elif reason == "READONLY":
            server.command("REPLICAOF", "127.0.0.1", "1")
            refused(broker, clock, match="read only")
            assert broker.read("c", "0").entries
            server.command("REPLICAOF", "NO", "ONE")
        elif reason == "MISCONF":
            (server.folder / "dump.rdb").mkdir()
            server.command("BGSAVE")
            await_true(
                lambda: server.command("INFO")["rdb_last_bgsave_status"] == "err"
            )
            refused(broker, clock, match="MISCONF")
            server.command("CONFIG", "SET", "save", "")
        elif reason == "LOADING":
            fill = "for n = 1, 40000 do redis.call('SET', n, n) end"
            server.command("EVAL", fill, "0")
            server.command("SAVE")
            server.restart_slowly()
            refused(broker, clock, match="(?i)loading")
            server.stop(signal.SIGKILL)
            server.start()
        else:
            server.command("SET", "ss:{a}", "1")
            with pytest.raises(Unavailable, match="WRONGTYPE"):
                broker.publish([("a", b"1")])
            with pytest.raises(Uncertain, match="WRONGTYPE"):  # b was stored
                broker.publish([("a", b"1"), ("b", b"2")])
            server.command("DEL", "ss:{a}", "ss:{b}")
        assert not broker.read("a", "0").entries
        (id,) = broker.publish([("a", b"4")])
        assert [entry.id for entry in broker.read("a", "0").entries] == [id]


def test_a_server_that_became_a_replica(server):
    """Its connections are not used again: its name may lead to the new master."""
    with RedisServer() as other, Proxy(server.port) as proxy:
        with opened(at(proxy.port)) as broker:
            broker.publish([("a", b"1")])
            server.command("REPLICAOF", "127.0.0.1", "1")
            proxy.target = other.port
            with pytest.raises(Unavailable, match="read only"):
                broker.publish([("a", b"2")])
            broker.publish([("a", b"3")])
        assert other.command("XLEN", "ss:{a}") == 1


DOCS = (ROOT / "docs" / "brokers.md").read_text()
RIGHTS = dict(re.findall(r"<!-- redis rights: (\w+) -->\n```\n(.*)\n```", DOCS))


def allow(server, role, *more, user=None, without=()):
    """Give a user the rights that the docs list; return the URL by which he comes."""
    words = RIGHTS[role].replace(">PASSWORD", ">pw").replace(" (", "\n(").split("\n")
    words = [w for word in words for w in ([word] if "(" in word else word.split())]
    words = [word for word in words[3:] if word not in without]
    server.command("ACL", "SETUSER", user or role, *words, *more)
    return f"redis://{user or role}:pw@127.0.0.1:{server.port}"


def test_rights(server, clock):
    """The docs' lists suffice to publish, subscribe, resume and kick, no more."""
    patterns = "&ss:{b:*}", "&ss:{c[:}]*"
    both = allow(server, "both", *patterns)
    heard = allow(server, "subscribe", *patterns)
    with (
        hub_of(both, max_age=60) as hub,
        hub_of(allow(server, "publish"), max_age=None) as publisher,
        hub_of(heard) as listener,
        Reader(hub, "a", "b:*", who=1) as reader,
        Reader(listener, "a", "c:#", who=2) as other,
    ):
        head = listener.head("a")
        hub.publish("a", "1")
        publisher.publish("a", "2")
        hub.publish("b:1", "3")
        publisher.publish("c:1:2", "4")
        await_true(lambda: len(reader.got) == len(other.got) == 3)
        assert sorted(reader.got) == ["1", "2", "3"]
        assert sorted(other.got) == ["1", "2", "4"]
        with contextlib.closing(listener.subscribe("a", after=head)) as late:
            assert [event.data for event in late.read(TIMEOUT)] == ["1", "2"]
        with pytest.raises(Denied, match="rights that a user needs"):
            listener.publish("a", "5")
        publisher.kick(who=2)
        await_true(lambda: not other.is_alive())
        assert reader.is_alive()
        assert hub.stats()["up"]
        assert listener.stats()["up"]
    with opened(allow(server, "both", "-publish", user="mute")) as broker:
        refused(broker, clock, Uncertain, "can't run|no permissions")


@pytest.mark.parametrize("is_later", [False, True], ids=["from the start", "later"])
def test_kicks_that_a_user_may_not_hear(server, quick, monkeypatch, is_later):
    """Streams stay; who kicks is told; kicks in between are heard when they may be."""
    monkeypatch.setattr(control_module, "ASK_AGAIN", 0.2)
    names = [f"ss:{{{name}}}" for name in ("a", "syncstream?presence")]
    few = ["resetchannels", *(f"&{name}" for name in (*names, "ss:ctl:*"))]
    keys = "reset", "on", ">pw", "+@all", "~ss:*"
    right = "&ss:{syncstream?control}"
    server.command("ACL", "SETUSER", "unheard", *keys, *few, *([right] * is_later))
    url = f"redis://unheard:pw@127.0.0.1:{server.port}"
    with (
        hub_of(url) as hub,
        hub_of(url) as other,
        hub_of(server.url) as free,
        Reader(hub, "a", who="ann") as ann,
        Reader(other, "a", who="ann") as far,
    ):
        if is_later:
            server.command("ACL", "SETUSER", "unheard", *few)
            controls = hub.subscribers.control, other.subscribers.control
            await_true(lambda: all(control.refusal for control in controls))
        with pytest.raises((Denied, Uncertain), match="ended in this process: 1"):
            hub.kick(who="ann")
        await_true(lambda: not ann.is_alive())
        hub.publish("a", "1")
        await_true(lambda: far.got == ["1"])
        assert free.kick(who="ann") == 0
        assert far.is_alive()
        server.command("ACL", "SETUSER", "unheard", right)
        await_true(lambda: not far.is_alive())


@pytest.mark.parametrize("is_used", [True, False])
def test_kicks_that_were_evicted(server, quick, caplog, is_used):
    """While nobody listened: all who can be named are kicked, once, and it is said."""
    with hub_of(server.url) as hub, Reader(hub, "a") as nobody:
        if is_used:
            hub.kick(who="somebody")
        with Reader(hub, "a", who="ann") as ann:
            await_true(lambda: not hub.subscribers.control.is_reading)
            server.command("DEL", "ss:{syncstream control}", "ss:empty")
            server.command("CLIENT", "KILL", "TYPE", "pubsub")
            await_true(lambda: not ann.is_alive())
        with Reader(hub, "a", who="ann") as again:
            server.command("CLIENT", "KILL", "TYPE", "pubsub")
            await_true(lambda: len(server.listeners()) == 1 and hub.stats()["up"])
            hub.publish("a", "1")
            await_true(lambda: again.got == nobody.got == ["1"])
            assert again.is_alive()
        journal().flush()
        assert caplog.text.count("kicks are missing") == 1


def test_a_command_that_is_missing_is_said(server, quick):
    """Without any that the docs list, somebody is told at once: nobody waits."""
    words = [word for word in RIGHTS["both"].split() if word.startswith("+")]
    # An answer that refuses a PING is one; what is not unsubscribed is not told.
    # One is for a hundred thousand empty channels.
    unseen = "+ping", "+unsubscribe", "+punsubscribe", "+unlink"
    words = [word for word in words if word not in unseen]
    for number, word in enumerate(words):
        rest = f"&ss:{{{number}:*}}"
        url = allow(server, "both", rest, user=f"u{number}", without=(word,))
        max_age = None if word == "+persist" else 60
        told = Told()
        with opened(url, max_age=max_age) as broker:
            broker.attach(told)
            problems = []
            calls = (
                lambda n=number, b=broker: b.watch(f"a{n}"),
                lambda n=number, b=broker: b.watch(f"{n}:*"),
                lambda n=number, b=broker: b.read(f"{n}", "0"),
                lambda n=number, b=broker: b.newest(f"{n}", 3),
                lambda n=number, b=broker: b.publish(
                    [(f"a{n}", b"x"), (f"a{n}", b"x")]
                ),
                lambda n=number, b=broker: b.read(f"a{n}", "0"),
                lambda n=number, b=broker: b.newest(f"a{n}", 3),
            )
            for call in calls:
                try:
                    call()
                except (Unavailable, Uncertain) as error:
                    problems.append(str(error))
            await_true(
                lambda problems=problems, told=told: (
                    problems or told.states or told.denied
                ),
                lambda word=word: word,
            )
        reasons = [*problems, *(reason for _, reason in told.states + told.denied)]
        assert any("docs/brokers.md" in reason for reason in reasons), (word, reasons)


def test_a_name_that_is_refused_ends_its_subscribers_alone(server, quick):
    """Whether the server says so at first or later, and in one command with others."""
    rights = "&ss:{d:*}"
    url = allow(server, "both", rights)
    few = ("resetchannels", "&ss:ctl:*", "&ss:{a}", "&ss:{c}")
    with opened(url) as broker, opened(server.url) as direct, hub_of(url) as hub:
        told = Told()
        broker.attach(told)
        for name in ("a", "b", "c", "d:*"):
            broker.watch(name)
        with (
            Reader(hub, "a") as reader,
            contextlib.closing(hub.subscribe("b")) as heard,
        ):
            assert heard.read(0) == []
            server.command("ACL", "SETUSER", "both", *few)
            await_true(lambda: len(told.denied) == 2)
            assert sorted(name for name, _ in told.denied) == ["b", "d:*"]
            assert all("docs/brokers.md" in reason for _, reason in told.denied)
            with pytest.raises(Closed, match="denied"):
                heard.read(TIMEOUT)
            await_true(lambda: told.states[-1][0] and hub.stats()["up"])
            for name in ("b", "d:*"):
                with pytest.raises(Denied, match="denies it"):
                    broker.watch(name)
            direct.publish([(name, b"data: 1\n\n") for name in ("b", "a", "c")])
            await_true(lambda: len(told.entries) == 2)
            assert [channel for channel, _ in told.entries] == ["a", "c"]
            await_true(lambda: reader.got == ["1"])
            server.command("ACL", "SETUSER", "both", "&ss:*", rights)
            broker.watch("b")
            broker.watch("d:*")
            direct.publish([(name, b"data: 2\n\n") for name in ("b", "d:1")])
            await_true(lambda: len(told.entries) == 4)


def test_a_key_that_is_refused_hides_no_loss(server, quick):
    """Its subscribers are told, and others' heads are compared as before."""
    url = allow(server, "both")
    with opened(url) as broker, opened(server.url) as direct:
        told = Told()
        broker.attach(told)
        for name in ("a", "b", "c"):
            broker.watch(name)
        direct.publish([(name, b"1") for name in ("a", "b", "c")])
        await_true(lambda: len(told.entries) == 3)
        keys = ("resetkeys", "~ss:empty", "~ss:{a}", "~ss:{c}")
        server.command("ACL", "SETUSER", "both", *keys)
        for call in (
            lambda: broker.read("b", "0"),
            lambda: broker.newest("b", 1),
            lambda: broker.publish([("b", b"2")]),
        ):
            with pytest.raises(Denied, match=r"docs/brokers\.md"):
                call()
        await_true(lambda: [name for name, _ in told.denied] == ["b"])
        for name in ("a", "c"):
            head = direct.read(name, None).head
            fields = ["p", head, "d", "x"]
            server.command("XADD", f"ss:{{{name}}}", f"{int(head[:13]) + 1}-1", *fields)
        await_true(lambda: sorted(set(told.lost)) == ["a", "c"])
        assert told.states == []


@pytest.mark.parametrize("command", ["-eval", "-xrange", "-subscribe"])
def test_what_is_refused_to_all_is_down(server, quick, command):
    """It is said once, by who asks first, and that it is over."""
    url = allow(server, "both")
    with opened(url) as broker:
        told = Told()
        broker.attach(told)
        broker.watch("a")
        broker.publish([("a", b"1")])
        await_true(lambda: told.entries)
        server.command("ACL", "SETUSER", "both", command)
        if command == "-subscribe":
            server.command("CLIENT", "KILL", "TYPE", "pubsub")
        for _ in range(2):
            if command == "-xrange":
                with pytest.raises(Unavailable, match=r"docs/brokers\.md"):
                    broker.read("a", "0")
        await_true(lambda: told.states)
        ((is_up, reason),) = told.states
        assert not is_up
        assert "docs/brokers.md" in reason or command == "-subscribe"
        server.command("ACL", "SETUSER", "both", command.replace("-", "+"))
        if command == "-xrange":
            broker.read("a", "0")
        await_true(lambda: [is_up for is_up, _ in told.states][1:] == [True])


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
        assert told.payloads() == [b"1", b"2", b"3"]
        await_true(lambda: {"a", "b:1"} <= {*told.lost})
        assert [found["id"] for found in server.listeners()] == [listener["id"]]
        assert told.states == []
        journal().flush()
        assert caplog.text.count("is dropped") == 1


def test_a_stream_entry_that_is_no_event_silences_nobody(shared):
    """Nor is it given out: whoever reads it drops it, and resets."""
    with hub_of(own(shared.url)) as hub, shared.client() as client:
        hub.publish("a", "1")
        key = hub.broker._servers()[0].key("a")
        client.xadd(key, {b"x": b"\xff"})
        client.xadd(key, {b"p": b"\xff", b"d": b"data: x\n\n"})
        assert hub.broker.newest("a", 1)
        hub.publish("a", "2")
        with contextlib.closing(hub.subscribe("a", after="start")) as subscription:
            found = [(event.event, event.data) for event in subscription.read(5)]
        assert found[0] == (None, "1")
        assert found[-1] == (None, "2")
        assert (None, "x") not in found


@pytest.mark.parametrize(
    "id",
    ["9999999999999999-0", f"{2**64 - 1}-{2**64 - 1}", f"2000000000000-{2**64 - 1}"],
    ids=["digits", "last", "last number"],
)
def test_an_id_that_leaves_no_room_silences_nobody(shared, id):
    """Its channel begins anew with the next event, by one reset for its readers."""
    with hub_of(own(shared.url)) as hub, shared.client() as client:
        heard = hub.subscribe("a", after="start")
        hub.publish("a", "1")
        assert [event.data for event in heard.read(TIMEOUT)] == ["1"]
        key = hub.broker._servers()[0].key("a")
        client.xadd(key, {b"p": b"7-7", b"d": b"data: x\n\n"}, id=id)
        for text in ("2", "3"):
            after = hub.publish("a", text)
            events = heard.read(TIMEOUT)
            while events[-1].data != text:
                events += heard.read(TIMEOUT)
            # A look at the heads may have found the entry by itself.
            assert [e.event for e in events][-2:] == ["reset", None][text == "3" :]
        assert hub.subscribe("a", after=after).read(0) == []
        assert hub.stats()["up"]


def test_a_kick_that_leaves_no_room_kicks_once(shared):
    """Whom it may have named; those who come later stay."""
    with hub_of(own(shared.url)) as hub, shared.client() as client:
        first = hub.subscribe("a", who="ann")
        assert first.read(0) == []
        key = hub.broker._servers()[0].key(CONTROL)
        client.xadd(key, {b"p": b"0-0", b"d": b"x"}, id="9999999999999999-0")
        hub.sink.resync([CONTROL])
        await_true(lambda: first.is_closed)
        later = hub.subscribe("a", who="ann")
        assert later.read(0) == []
        hub.sink.resync([CONTROL])
        await_true(lambda: not hub.subscribers.control.is_reading)
        assert not later.is_closed


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
        await_true(lambda: told.payloads() == [b"good"] and {*told.lost} == {*names})
        assert told.states == []


DROPPED = """
import gc, sys, threading, time, weakref
if sys.argv[2] == "gevent":
    from gevent import monkey
    monkey.patch_all()
import redis
from syncstream.brokers.redis import RedisBroker
from tests.support.waits import await_true

class Sink:
    def deliver(self, *words): pass
    resync = state = deny = deliver

gc.disable()  # it is freed at once
url = sys.argv[1]
client = redis.Redis.from_url(url)
before = len(client.client_list())
threads = threading.active_count()
found = []
for number in range(5):
    broker = RedisBroker(url)
    broker.attach(Sink())
    if number:
        broker.watch("a")
    broker.publish([("a", b"x")])
    found.append(weakref.ref(broker))
    del broker
assert [reference() for reference in found] == [None] * 5
await_true(
    lambda: len(client.client_list()) <= before
    and threading.active_count() <= threads,
    client.client_list,
)
client.close()
"""


@pytest.mark.parametrize("kind", ["threads", "gevent"])
def test_who_drops_a_broker_leaves_nothing(server, kind):
    """Its connections and its thread end with it, close() or not."""
    if kind == "gevent":
        pytest.importorskip("gevent")
    check_script(DROPPED, server.url, kind)


def test_scripts_that_are_forgotten(server):
    """They are sent anew, one event's and a batch's; reads, too."""
    with opened(server.url) as broker:
        for forget in (True, True, False):
            if forget:
                server.command("SCRIPT", "FLUSH")
            broker.publish([("a", b"1")])
            if forget:
                server.command("SCRIPT", "FLUSH")
            broker.publish([("a", b"2"), ("a", b"3")])
            if forget:
                server.command("SCRIPT", "FLUSH")
            broker.read("a", None)
        payloads = [entry.payload for entry in broker.read("a", "0").entries]
        assert payloads == [b"1", b"2", b"3"] * 3


# What is kept.


def test_capacity_and_age_are_memory(server):
    """So many entries are in the stream, and none for longer than is asked for."""
    with opened(server.url, capacity=50, max_age=100) as broker:
        for _ in range(20):
            broker.publish([("a", b"x" * 100)] * 50)
        assert server.command("XLEN", "ss:{a}") == 50
        assert 290_000 < server.command("PTTL", "ss:{a}") <= 300_000
    with opened(server.url, max_age=None) as broker:
        broker.publish([("a", b"x")])
        assert server.command("PTTL", "ss:{a}") == -1


def test_reads_leave_no_keys(server, quick):
    """Nor need they memory: who came first, while there was none, misses nothing."""
    server.command("CONFIG", "SET", "maxmemory", "1")
    with (
        hub_of(server.url) as hub,
        contextlib.closing(hub.subscribe("a")) as heard,
    ):
        assert all(isinstance(event, Gap) for event in heard.read(0))
        server.command("CONFIG", "SET", "maxmemory", "0")
        hub.publish("a", "1")
        assert account_of(heard) == ["1"]
        for number in range(100):
            assert hub.head(f"unused:{number}")
        assert sorted(server.command("KEYS", "*")) == [b"ss:empty", b"ss:{a}"]


def account_of(heard):
    """Return the next event's data, and what came before it but gaps."""
    got = []
    deadline = time.monotonic() + TIMEOUT
    while not got:
        assert time.monotonic() < deadline
        got = [e.data for e in heard.read(0.1) if not isinstance(e, Gap)]
    return got


def test_who_may_only_read_reads(server):
    """A user without a right to write gets heads, and what is stored."""
    with server.client() as client:
        rights = ["on", ">pw", "~ss:*", "&ss:*", "+@read", "+eval", "+evalsha"]
        rights += ["+time", "+@pubsub", "+ping", "+@connection"]
        client.execute_command("ACL", "SETUSER", "reader", *rights)
    with opened(f"redis://reader:pw@127.0.0.1:{server.port}") as reader:
        assert reader.read("a", None).complete
        assert server.command("DBSIZE") == 0
        with opened(server.url) as broker:
            (id,) = broker.publish([("a", b"1")])
        assert reader.read("a", None).head == id
        head = reader.read("b", None).head
        assert reader.read("b", head).complete


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


@pytest.mark.parametrize("removed", [1, 2, 3, 4])
def test_a_removed_event_breaks_the_chain(removed, shared):
    """What follows it is read, not all anew; and the newest shows, too."""
    with opened(own(shared.url)) as broker:
        ids = broker.publish([("a", b"%d" % number) for number in range(5)])
        key = broker._servers()[0].key("a")
        assert shared.command("XDEL", key, ids[removed]) == 1
        page = broker.read("a", ids[removed - 1])
        assert not page.complete
        assert page.head == ids[4]
        assert [entry.id for entry in page.entries] == ids[removed + 1 :]
        if removed == 4:
            (id,) = broker.publish([("a", b"5")])
            page = broker.read("a", ids[3])
            assert [(e.id, e.prev) for e in page.entries] == [(id, ids[4])]
            assert not page.complete


def test_the_newest_are_found_without_the_rest(shared):
    """An id and the head alone, of as many as there are."""
    with hub_of(own(shared.url)) as hub:
        assert read_for_the_newest(hub) == 1
    with opened(own(shared.url)) as broker:
        head = broker.read("a", None).head
        assert broker.newest("a", 3) == (head, head)
        ids = broker.publish([("a", b"x")] * 250)
        for count, before in ((1, ids[-2]), (120, ids[129]), (250, head), (999, head)):
            assert broker.newest("a", count) == (before, ids[-1])


def test_who_comes_and_goes_evicts_nothing(shared):
    """Each process tells of those of the others; events are kept."""
    url = own(shared.url)
    with hub_of(url, capacity=3) as here, hub_of(url, capacity=3) as there:
        come_and_go(here, there)


def test_ids_do_not_come_of_a_seed(shared):
    """An application that seeds `random` has no id again."""
    marks = set()
    for _ in range(2):
        random.seed(0)
        with opened(own(shared.url)) as broker:
            broker.publish([("a", b"x")])
            marks.add(broker.read("b", None).head)
            marks.add(broker.publish([("c", b"x")])[0].partition("-")[2])
    assert len(marks) == 4


def test_no_private_channel_comes_of_a_seed(shared, quick):
    """Workers that seed `random` alike hear none of each other's beats."""
    url = own(shared.url)
    channels, tokens = set(), set()
    with shared.client() as client, client.pubsub() as beats:
        beats.psubscribe(f"{url.partition('prefix=')[2]}ctl:*")
        assert beats.get_message(timeout=TIMEOUT)["type"] == "psubscribe"
        for _ in range(2):
            random.seed(0)
            with opened(url) as broker:
                broker.attach(Told())
                broker.watch("a")
                while not (beat := beats.get_message(timeout=TIMEOUT))["data"]:
                    pass  # it wakes itself, too
            channels.add(beat["channel"])
            tokens.add(beat["data"])
    random.seed()
    assert len(channels) == len(tokens) == 2


def test_two_formats_share_a_server(shared):
    """Workers of the first format and ours lose nothing of each other's."""
    text = (Path(__file__).parent / "formats" / "redis_1.lua").read_text()
    common, publish, read = re.split("-- publish\n|-- read\n", text)
    nonces = itertools.count(1000)

    with opened(own(shared.url)) as broker:
        server = broker._servers()[0]

        def old_publish(channel):
            words = server.topic(channel), b"old", next(nonces), 1000, 60000, 60000
            key = server.key(channel)
            return shared.command("EVAL", common + publish, 1, key, *words).decode()

        def old_read(channel, after):
            words = after, 1000, next(nonces), 60000, 60000
            key = server.key(channel)
            head, complete, *found = shared.command(
                "EVAL", common + read, 1, key, *words
            )
            return head.decode(), complete, [id.decode() for id in found[::3]]

        # The old one keeps an empty channel's head in its key.
        head, _, _ = old_read("a", "")
        assert broker.read("a", None).head == head
        ids = [*broker.publish([("a", b"new")]), old_publish("a")]
        ids += broker.publish([("a", b"new")])
        page = broker.read("a", head)
        assert page.complete
        assert [entry.id for entry in page.entries] == ids
        assert [entry.prev for entry in page.entries] == [head, *ids[:2]]
        assert old_read("a", head) == (ids[-1], 1, ids)
        # Whose first event follows a head of ours, that is told.
        head = broker.read("b", None).head
        id = old_publish("b")
        page = broker.read("b", head)
        assert [entry.id for entry in page.entries] == [id]
        assert not page.complete
        head = broker.read("c", None).head
        ids = broker.publish([("c", b"new")])
        assert old_read("c", head) == (ids[0], 1, ids)
        # Its key is gone with an event of ours: the head of before does not come back.
        head = broker.read("d", None).head
        old_publish("d")
        broker.publish([("d", b"new")])
        shared.command("DEL", server.key("d"))
        page = broker.read("d", head)
        assert page.head != head
        assert not page.complete


def test_pages_are_bounded_in_bytes(shared):
    """Nobody takes more of one than `JOIN`: a reader's request holds up no server."""
    with opened(own(shared.url)) as broker:
        broker.publish([("a", b"x")] * 40 + [("a", b"x" * 100_000)] * 60)
        found = [*broker.read("a", "0").entries]
        assert 40 < len(found) <= 56
        while found[-1].id != (page := broker.read("a", found[-1].id)).head:
            assert page.complete
            assert sum(len(e.payload) for e in page.entries) < JOIN + 100_000
            found += page.entries
        assert len(found) == 100
        assert [e.prev for e in found[1:]] == [e.id for e in found[:-1]]


def test_who_listens_keeps_an_idle_channel(server, quick, monkeypatch):
    """Its key expires only where nobody does: who is there has missed nothing."""
    monkeypatch.setattr(module, "_MIN_TTL", 1.0)
    with (
        hub_of(server.url, max_age=4.0) as hub,
        contextlib.closing(hub.subscribe("a")) as heard,
    ):
        assert heard.read(0) == []
        hub.publish("a", "1")
        assert [event.data for event in heard.read(TIMEOUT)] == ["1"]
        head = hub.head("idle")
        hub.publish("idle", "2")
        # It was made later than the other one, which is used as little since.
        await_true(lambda: not server.command("EXISTS", "ss:{idle}"))
        assert server.command("EXISTS", "ss:{a}")
        assert heard.read(0.2) == []
        hub.publish("a", "3")
        (event,) = heard.read(TIMEOUT)
        assert event.data == "3"
        assert not hub.broker.read("idle", head).complete


def test_ids_are_not_made_twice(server):
    """Of all events of a second, after the newest are lost, none has a lost id."""
    with opened(server.url) as broker:
        lost = set()
        for _ in range(10):
            lost |= set(broker.publish([("a", b"x")] * 100))
            server.command("FLUSHALL")
        ids = broker.publish([("a", b"x")] * 100)
        assert not lost & set(ids)
        assert len({int(id.partition("-")[2]) for id in [*lost, *ids]}) == 1100


# Lines and servers that fail.


class Reader:
    """A subscriber in a thread; what it has got, and how often it was told of a gap."""

    def __init__(self, hub, *channels, **options):
        self.got = []
        self.gaps = []
        self.errors = []
        self._subscription = hub.subscribe(*channels, **options)
        self._subscription.read(0)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self):
        try:
            while True:
                for event in self._subscription.read():
                    if isinstance(event, Gap):
                        self.gaps.append(event)
                    else:
                        self.got.append(event.data)
        except Closed:
            pass
        except Exception as error:
            self.errors.append(error)

    def close(self):
        self._subscription.close()
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()
        assert self.errors == []

    def is_alive(self):
        return self._thread.is_alive()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()


class Publisher:
    """Publishes numbers, one after the other; notes what became of each."""

    def __init__(self, url, channel="a", clock=time.monotonic):
        self.stored = []
        self.uncertain = []
        self.longest = 0.0
        self._clock = clock
        self._broker = open_broker(url)
        self._channel = channel
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._publish)
        self._thread.start()

    def _publish(self):
        for number in itertools.count():
            began = self._clock()
            payload = f"data: {number}\n\n".encode()
            try:
                self._broker.publish([(self._channel, payload)])
            except Unavailable:
                pass
            except Uncertain:
                self.uncertain.append(str(number))
            else:
                self.stored.append(str(number))
            self.longest = max(self.longest, self._clock() - began)
            if self._stop.wait(0.003):
                return

    def more(self, count=50):
        """Wait until so many more are stored."""
        goal = len(self.stored) + count
        await_true(lambda: len(self.stored) >= goal)

    def close(self):
        self._stop.set()
        self._thread.join(TIMEOUT)
        self._broker.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()


def account(publisher, reader, has_gap=False):
    """All that was stored was got, once and in order; nothing else but what may be."""
    publisher.close()
    last = publisher.stored[-1]
    await_true(lambda: last in reader.got[-3:], lambda: f"{last} {reader.got[-3:]}")
    assert reader.got == sorted(set(reader.got), key=int)
    got = set(reader.got)
    assert got <= {*publisher.stored, *publisher.uncertain}
    missing = [number for number in publisher.stored if number not in got]
    if not has_gap:
        assert reader.gaps == []
        assert missing == []
    return missing


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


def end(server, proxy, hub):
    """The server ends one connection."""
    before = {client["id"] for client in server.listeners()}
    server.command("CLIENT", "KILL", "TYPE", "pubsub")
    await_true(lambda: {client["id"] for client in server.listeners()} - before)


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


def test_a_forgotten_connection_takes_no_event(server, proxy, clock, monkeypatch):
    """What a firewall has dropped without a word is found before it is trusted."""
    monkeypatch.setattr(server_module, "FRESH", 0.05)
    with opened(at(proxy.port)) as broker, opened(server.url) as direct:
        together = threading.Barrier(4)

        def publish():
            together.wait(TIMEOUT)
            broker.publish([("a", b"x")])

        threads = [threading.Thread(target=publish) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        proxy.forget()
        time.sleep(0.1)  # longer than it is trusted
        for payload in (b"1", b"2"):
            began = clock()
            broker.publish([("a", payload)])
            assert clock() - began < 1.5
        found = [entry.payload for entry in direct.read("a", "0").entries]
        assert found == [b"x"] * 4 + [b"1", b"2"]


def test_a_connection_that_answers_is_used_again(server, monkeypatch):
    """One that is proven by an answer; what nobody uses is let go; keepalive is on."""
    monkeypatch.setattr(server_module, "FRESH", 0.0)
    with opened(server.url) as broker:
        connections = server.command("INFO", "stats")["total_connections_received"]
        together = threading.Barrier(8)

        def publish():
            together.wait(TIMEOUT)
            broker.publish([("a", b"x")] * 200)

        threads = [threading.Thread(target=publish) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with server.client() as client:
            before = client.info("clients")["connected_clients"]
            assert before > 3
            options = socket.SOL_SOCKET, socket.SO_KEEPALIVE
            here = broker._process()
            (pool,) = here.servers
            kept = [idle.connection for idle in pool._idle]
            assert kept
            assert all(connection._sock.getsockopt(*options) for connection in kept)
            made = client.info("stats")["total_connections_received"]
            broker.publish([("a", b"x")])
            assert client.info("stats")["total_connections_received"] == made
            assert connections < made
            monkeypatch.setattr(server_module, "IDLE", 0.05)
            time.sleep(0.1)  # longer than it is kept
            broker.publish([("a", b"x")])
            await_true(lambda: client.info("clients")["connected_clients"] == 2)


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


def test_a_publish_that_is_not_answered(server, proxy, clock):
    """It is uncertain, in time, and stored once: nothing is sent again."""
    with (
        opened(at(proxy.port, "publish_timeout=1")) as broker,
        opened(server.url) as direct,
    ):
        broker.publish([("a", b"1")])
        proxy.is_deaf = True
        for items in ([("a", b"2")], [("a", b"3"), ("a", b"4")]):
            began, began_here = time.monotonic(), clock()
            with pytest.raises(Uncertain, match="no answer"):
                broker.publish(items)
            assert time.monotonic() - began > 0.9
            assert clock() - began_here < 2
            # The next one has a connection that answers its greeting.
            proxy.is_deaf = False
            broker.publish([("b", b"x")])
            proxy.is_deaf = True
        payloads = [entry.payload for entry in direct.read("a", "0").entries]
        assert payloads == [b"1", b"2", b"3", b"4"]


@pytest.mark.parametrize("then", ["connect", "send"])
def test_all_that_a_publish_waits_for_has_one_deadline(then, proxy, clock):
    """For its turn, and to connect, or to send what no buffer holds."""
    query = "publish_timeout=2", "max_connections=1"
    with opened(at(proxy.port, *query)) as broker:
        (server,) = broker._process().servers
        if then == "send":
            broker.publish([("a", b"x")])  # by a connection that is kept
        proxy.is_silent = True
        server._free.acquire()
        turn = threading.Timer(1.4, server._free.release)
        turn.start()
        began = clock()
        with pytest.raises(Unavailable):
            broker.publish([("a", b"x" * (1 << 24))])
        assert clock() - began < 2.1
        turn.join()


@pytest.mark.parametrize("how", ["silent", "stopped", "unix"])
def test_a_publish_to_nowhere(server, proxy, how, clock):
    """In time it is known not to be stored, or not to be known."""
    url = at(proxy.port) if how != "unix" else f"unix://{server.socket}?"
    with opened(f"{url}&publish_timeout=1") as broker:
        broker.publish([("a", b"1")])
        if how == "silent":
            proxy.is_silent = True
        else:
            server.send(signal.SIGSTOP)
        for kind in (Uncertain, Unavailable, Unavailable):
            began = clock()
            with pytest.raises((Unavailable, Uncertain)) as caught:
                broker.publish([("a", b"2")])
            assert type(caught.value) is kind
            assert clock() - began < 2
        with pytest.raises(Unavailable):
            broker.read("a", None)
        proxy.is_silent = False
        server.send(signal.SIGCONT)
        broker.publish([("a", b"3")])
        found = [entry.payload for entry in broker.read("a", "0").entries]
        assert found in ([b"1", b"3"], [b"1", b"2", b"3"])


def test_connections_that_have_ended_are_not_used(server):
    """A restart costs no publish: what waits in the pool is looked at first."""
    with opened(server.url) as broker:
        threads = [
            threading.Thread(target=broker.publish, args=([("a", b"x")] * 100,))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        server.restart(signal.SIGKILL)
        for _ in range(10):
            broker.publish([("a", b"x")])
        assert len(broker.read("a", "0").entries) == 10


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
            assert told.states[0][0] is False
            assert "cannot connect" in told.states[0][1]
            with pytest.raises(Unavailable):
                broker.publish([("a", b"0")])
            server.start()
            await_true(lambda: len(told.states) == 2)
            assert told.states[1][0] is True
            await_true(lambda: sorted(told.lost) == ["a", "b:*"])
            broker.publish([("a", b"1"), ("b:1", b"2")])
            await_true(lambda: told.payloads() == [b"1", b"2"])


# Processes.


def test_one_connection_listens(server):
    """For each process one, however many channels and clients it has."""
    hubs = [Hub(server.url) for _ in range(50)]
    subscriptions = []
    try:
        for hub in hubs:
            for number in range(20):
                names = (f"c:{number}", f"d:{number % 3}", "e:*")
                subscriptions.append(hub.subscribe(*names))
                subscriptions[-1].read(0)
        await_true(lambda: len(server.listeners()) == 50)
        hubs[7].publish("d:1", "x")
        for subscription in subscriptions:
            if "d:1" in subscription.channels:
                assert [e.data for e in subscription.read(TIMEOUT)] == ["x"]
    finally:
        for hub in hubs:
            hub.close()
    await_true(lambda: server.listeners() == [])


def descriptors():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no /proc")
def test_nothing_is_left_behind(server):
    """No descriptor, whether it was in use, or never answered."""
    with Proxy(server.port) as proxy:
        before = descriptors()
        for is_silent in (False, True):
            broker = open_broker(at(proxy.port, "publish_timeout=0.4"))
            broker.attach(Told())
            proxy.is_silent = is_silent
            broker.watch("a")
            with contextlib.suppress(Unavailable, Uncertain):
                broker.publish([("a", b"x")])
            broker.close()
            broker.close()
            with pytest.raises(Unavailable, match="closed"):
                broker.publish([("a", b"x")])
        proxy.is_silent = False
        proxy.cut()
        await_true(lambda: descriptors() <= before)


def test_publishers_that_are_killed(server):
    """What they were told is stored is there, once; nobody else is held up."""
    for place in range(4):
        with Nodes(2) as nodes, hub_of(server.url) as hub:
            url, name = server.url, f"k{place}"
            stored = queue.SimpleQueue()

            def publish(who, nodes=nodes, stored=stored, url=url, name=name):
                with contextlib.suppress(ValueError, OSError):
                    for number in range(100_000):
                        payload = f"data: {who} {number}\n\n".encode()
                        nodes.publish(who, url, [(name, payload)])
                        stored.put(f"{who} {number}")

            with Reader(hub, name) as reader:
                threads = [threading.Thread(target=publish, args=(n,)) for n in (0, 1)]
                for thread in threads:
                    thread.start()
                await_true(lambda stored=stored: stored.qsize() > 100)
                nodes.kill(0)
                threads[0].join(TIMEOUT)
                goal = stored.qsize() + 50
                await_true(lambda goal=goal, stored=stored: stored.qsize() > goal)
                nodes.kill(1)
                threads[1].join(TIMEOUT)
                acked = [stored.get() for _ in range(stored.qsize())]
                await_true(lambda acked=acked, got=reader.got: {*acked} <= {*got})
                got = [*reader.got]  # what was not acknowledged may still come
                assert len(got) == len({*got}) <= len(acked) + 2
                assert reader.gaps == []


FORKED = """
import os, sys, time
if sys.argv[2] == "gevent":
    from gevent import monkey
    monkey.patch_all()
from syncstream.brokers.redis import RedisBroker
from tests.support.waits import await_true

class Told(list):
    def deliver(self, channel, entry): self.append(entry.payload)
    def resync(self, channels): lost.append(list(channels))
    def state(self, is_up, reason): raise AssertionError(reason)
    def deny(self, name, reason): raise AssertionError(reason)

lost, told = [], Told()
broker = RedisBroker(sys.argv[1])
broker.attach(told)
broker.watch("a")
broker.publish([("a", b"before")])
await_true(lambda: told == [b"before"])
told_of, listens = os.pipe()
children = []
for number in range(3):
    pid = os.fork()
    if not pid:
        # What it inherits is told of once it asks for anything.
        broker.read("a", None)
        broker.watch("b")
        await_true(lambda: lost == [["a"]])
        os.write(listens, b"x")
        broker.publish([("b", b"mine %d" % number)])
        await_true(lambda: b"mine %d" % number in told)
        await_true(lambda: b"parent's" in told)
        broker.close()
        os._exit(0)
    children.append(pid)
for _ in children:  # or there would be nothing that they have not been told of
    assert os.read(told_of, 1) == b"x"
import redis
with redis.Redis.from_url(sys.argv[1]) as client:
    assert len(client.client_list(_type="pubsub")) == 4
    ids = broker.publish([("a", b"parent's")] * 1)
    await_true(lambda: told[1:] == [b"parent's"])
for pid in children:
    assert os.waitpid(pid, 0)[1] == 0
broker.publish([("a", b"after")])
await_true(lambda: told[1:] == [b"parent's", b"after"])
assert lost == []
broker.close()
"""


@pytest.mark.parametrize("kind", ["threads", "gevent"])
def test_a_child_has_its_own(server, kind):
    """A fork uses nothing of its parent's, who goes on undisturbed."""
    if kind == "gevent":
        pytest.importorskip("gevent")
    check_script(FORKED, server.url, kind)


LATE = """
from gevent import monkey
monkey.patch_all()
import logging, os, signal, sys, time, gevent
from tests.support.clock import Clock
from syncstream import Hub, Unavailable, Uncertain
from syncstream.brokers.redis import beats as redis
redis.DEAF = 60.0  # it would say that the server is silent
hub = Hub(sys.argv[1] + "?publish_timeout=2")
clock = Clock()
turns, moments = [], []
def turn():
    while True:
        gevent.sleep(0.001)
        turns.append(time.thread_time())
        moments.append(clock())
subscription = hub.subscribe("a")
subscription.read(0)
turning = gevent.spawn(turn)

# A flood. By CPU time: what other processes take is not the broker's doing.
def publish():
    for _ in range(300):
        hub.publish("a", "x" * 200)
greenlets = [gevent.spawn(publish) for _ in range(20)]
count = 0
while count < 6000:
    count += len(subscription.read(10))
gevent.joinall(greenlets, raise_error=True)
latest = max(b - a for a, b in zip(turns, turns[1:]))
assert latest < 0.1, latest

# A server that does not answer. By what a thread does meanwhile, for the same reason.
logging.disable()  # it says that the broker is down
os.kill(int(sys.argv[2]), signal.SIGSTOP)
for _ in range(2):
    before = len(moments) - 1
    try:
        hub.publish("a", "x")
    except (Unavailable, Uncertain):
        pass
    found = [*moments[before:], clock()]
    latest = max(b - a for a, b in zip(found, found[1:]))
    assert latest < 0.5, latest
os.kill(int(sys.argv[2]), signal.SIGCONT)
turning.kill()
hub.close()
clock.close()
"""


def test_the_hub_of_gevent_is_not_held_up(server):
    """Not for a tenth of a second by a flood, nor for long by a server's silence."""
    pytest.importorskip("gevent")
    check_script(LATE, server.url, str(server.pid))


THREADS_OF_GEVENT = """
from gevent import monkey
monkey.patch_all()
import os, sys, gevent
from gevent.threadpool import ThreadPool
from syncstream.brokers.redis import RedisBroker

broker = RedisBroker(sys.argv[1])
def publish():
    (id,) = broker.publish([("a", b"x")])
    broker.read("a", None)
    return id
ids = []
pool = ThreadPool(1)
with gevent.Timeout(15):
    for _ in range(40):
        ids += [publish(), pool.apply(publish)]
    assert sorted(ids) == sorted(e.id for e in broker.read("a", "0").entries)
broker.close()
os._exit(0)  # on Python 3.10 gevent's threads crash when they end, sometimes
"""


def test_threads_of_gevent_publish(server):
    """Whichever hub a kept connection waits in: another thread takes another one."""
    pytest.importorskip("gevent")
    check_script(THREADS_OF_GEVENT, server.url)


SUBSCRIBED_IN_A_THREAD = """
from gevent import monkey
monkey.patch_all()
import os, sys, gevent
from gevent.threadpool import ThreadPool
from syncstream import Hub

hub = Hub(sys.argv[1])
subscriptions = [hub.subscribe("a") for _ in range(2)]
pool = ThreadPool(1)
with gevent.Timeout(15):
    pool.apply(subscriptions[0].read, (0,))
    subscriptions[1].read(0)
    hub.publish("a", "x")
    gevent.sleep(0)  # the pool's thread does nothing meanwhile
    assert [e.data for e in subscriptions[1].read(10)] == ["x"]
    got = pool.apply(subscriptions[0].read, (10,))
    assert [e.data for e in got] == ["x"]
    hub.close()
os._exit(0)  # on Python 3.10 gevent's threads crash when they end, sometimes
"""


def test_a_thread_of_gevent_subscribes_first(server):
    """Whichever hub asks first, all of them are told, and may close it."""
    pytest.importorskip("gevent")
    check_script(SUBSCRIBED_IN_A_THREAD, server.url)


# Sentinel.


def test_sentinel_names_the_server(quick):
    """A failover is a reconnect: all who are there stay, and are told what is lost."""
    with RedisServer() as master, RedisServer() as replica:
        replica.command("REPLICAOF", "127.0.0.1", str(master.port))
        with Sentinel("mine", master.port) as sentinel:
            url = f"redis+sentinel://127.0.0.1:{sentinel.port}/mine/0?publish_timeout=1"
            with (
                hub_of(url) as hub,
                Reader(hub, "a") as reader,
                Publisher(url) as publisher,
            ):
                publisher.more()
                await_true(lambda: len(master.listeners()) == 1)
                sentinel.await_replica()
                master.stop(signal.SIGKILL)
                await_true(lambda: replica.command("ROLE")[0] == b"master")
                await_true(lambda: hub.stats()["up"] and replica.listeners())
                publisher.more()
                account(publisher, reader, has_gap=True)
                assert len(reader.gaps) <= 1
