"""``redis:``: the contract, between processes and servers too, and patterns."""

import itertools
import random
import re
import weakref
from pathlib import Path

import pytest

from syncstream.brokers.redis import RedisBroker
from syncstream.testing import check_broker
from tests.brokers.redis.clients import hub_of, key_of, opened, own, prefixes
from tests.brokers.redis_nodes import Nodes
from tests.brokers.sinks import Told
from tests.support.pairs import check_script, come_and_go
from tests.support.redis_server import RedisServer
from tests.support.waits import TIMEOUT, await_true

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

    urls = weakref.WeakKeyDictionary()

    def make():
        url = own(shared.url)
        broker = RedisBroker(url)
        urls[broker] = url
        return broker

    def remove(broker, channel, id):
        assert shared.command("XDEL", key_of(urls[broker], channel), id) == 1

    check_broker(make, rounds=100, remove=remove)


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
    check_script(BY_GREENLETS, shared.url, str(processes), f"g{next(prefixes)}")


def test_the_contract_by_several_servers(shared):
    """The whole suite, where each channel is on one of three."""
    with RedisServer() as second, RedisServer() as third:
        hosts = f"127.0.0.1:{second.port},127.0.0.1:{third.port}"
        check_broker(lambda: RedisBroker(own(f"{shared.url},{hosts}")), rounds=30)
        for one in (shared, second, third):
            assert one.command("DBSIZE") > 50


def test_databases_do_not_hear_each_other(shared):
    """Keys are a database's own, and so is what is told."""
    prefix = f"prefix=db{next(prefixes)}:"
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
        assert [sink.payloads for sink in told] == [[b"first"], [b"second"]]


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
        await_true(lambda: b"last" in told.payloads)
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
        await_true(lambda: b"4" in told.payloads)
        assert told.payloads == [b"1", b"2", b"3", b"4"]
        broker.unwatch("a:b")
        broker.unwatch("#")
        broker.unwatch("*")
        broker.publish([("c", b"5"), ("a:b", b"6")])
        await_true(lambda: b"6" in told.payloads)
        assert b"5" not in told.payloads[4:] or told.payloads[4:] == [b"5", b"6"]


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
    text = (Path(__file__).parents[1] / "formats" / "redis_1.lua").read_text()
    common, publish, read = re.split("-- publish\n|-- read\n", text)
    nonces = itertools.count(1000)

    url = own(shared.url)
    with opened(url) as broker:

        def old_publish(channel):
            words = key_of(url, channel), b"old", next(nonces), 1000, 60000, 60000
            key = key_of(url, channel)
            return shared.command("EVAL", common + publish, 1, key, *words).decode()

        def old_read(channel, after):
            words = after, 1000, next(nonces), 60000, 60000
            key = key_of(url, channel)
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
        shared.command("DEL", key_of(url, "d"))
        page = broker.read("d", head)
        assert page.head != head
        assert not page.complete
