"""Kicks by name: all processes of a hub, and what becomes of those that are missed."""

import gc
import json
from contextlib import closing, suppress

import pytest

from syncstream import Closed, Hub, Unavailable, Uncertain
from syncstream.brokers.memory import MemoryBroker
from syncstream.brokers.names import matches
from syncstream.channels import control
from syncstream.channels.control import CONTROL, Kick
from syncstream.runtime.journal import journal
from tests.brokers.sinks import MuteBroker
from tests.support.pairs import Threads, check_script
from tests.support.postgresql_server import PostgreSQL
from tests.support.redis_server import RedisServer
from tests.support.waits import await_true

PLACE = Threads()


class Shared(MuteBroker):
    """Other processes have it, too, as far as a hub can tell.

    Attributes:
        failure: What publishing a kick raises.
    """

    scope = "machine"

    def __init__(self, **options):
        super().__init__(**options)
        self.failure, self.reads = None, []

    def publish(self, items, *, connection=None):
        if self.failure is not None and items[0][0] == CONTROL:
            raise self.failure
        return super().publish(items, connection=connection)

    def read(self, channel, after, limit=1000):
        self.reads.append(channel)
        return super().read(channel, after, limit)

    def kick(self, who=None, tags=None):
        """Do what another process does."""
        self.publish([(CONTROL, Kick(who, tags).encoded("another"))])


@pytest.fixture
def broker():
    return Shared()


@pytest.fixture
def hub(broker):
    hub = Hub(broker=broker)
    yield hub
    hub.close()


def test_kicks_that_cannot_be_read_are_named(hub, broker, monkeypatch, caplog):
    """Once; who could be kicked is served when they can be."""

    def read(channel, after, limit=1000):
        if channel == CONTROL:
            raise Unavailable("no stream")
        return MemoryBroker.read(broker, channel, after, limit)

    def lines():
        return caplog.text.count(f"{CONTROL!r} cannot be read: no stream")

    monkeypatch.setattr(broker, "read", read)
    hub.publish("a", "1")
    for _ in range(2):
        assert hub.subscribe("a", who="ann", after="start").read(0) == []
    await_true(lines)
    assert lines() == 1
    monkeypatch.undo()
    assert hub.subscribe("a", who="ann", after="start").read(0)


def begun(hub, *channels, **options):
    subscription = hub.subscribe(*(channels or ("a",)), **options)
    # In a thread: ours may have a gevent hub, of other tests, which does not run.
    PLACE.start(lambda: subscription.read(0))()
    return subscription


def await_end(subscription):
    await_true(lambda: subscription.is_closed)
    assert subscription.reason == "kicked"


@pytest.fixture(params=["local", "redis", "postgresql"])
def url(request, tmp_path):
    """An engine's, for hubs that stand for several processes."""
    if request.param == "local":
        yield f"local:{tmp_path}"
    else:
        with RedisServer() if request.param == "redis" else PostgreSQL() as server:
            yield server.url


def test_by_name_in_all_processes(url):
    """Of one name, of a tag, or both; whoever is at another hub is ended there."""
    with closing(Hub(url)) as here, closing(Hub(url)) as there:
        ann, bob = begun(here, who="ann"), begun(here, who="bob", tags=["staff", "x"])
        far = [
            begun(there, who="ann"),
            begun(there, "*", who="bob", tags=["staff"]),
            begun(there, "a", "b", who={"id": 7, "name": "ann"}),
        ]
        nobody = begun(there)
        assert here.kick(who="ann") == 1
        await_end(ann)
        await_end(far[0])
        assert here.kick(who="ann", tags=["staff"]) == 0
        assert here.kick(tags=[]) == 0
        assert here.kick(tags=["staff", "others"]) == 1
        await_end(bob)
        await_end(far[1])
        assert there.kick(who={"name": "ann", "id": 7}) == 1
        assert far[2].is_closed
        again = begun(here, who="ann")  # not by a kick of before
        assert here.kick(who="nobody") == 0
        there.publish("a", "1")
        assert [event.data for event in again.read(5)] == ["1"]
        assert not nobody.is_closed


class Nameless:
    """What becomes `null`, as a lazy user that is nobody does."""


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, ValueError),
        ({"who": None}, ValueError),
        ({"who": None, "tags": ["x"]}, ValueError),
        ({"tags": "staff"}, TypeError),
        ({"who": Nameless()}, ValueError),
        ({"who": object()}, TypeError),
        ({"who": "x" * (2 << 20)}, ValueError),
        ({"predicate": bool, "who": "ann"}, ValueError),
        ({"predicate": "ann"}, TypeError),
    ],
)
def test_names_that_are_none(broker, options, error):
    """Refused, and nobody is ended: `None` is the name of all who have none."""

    def dumps(value):
        return json.dumps(None if isinstance(value, Nameless) else value)

    with closing(Hub(broker=broker, dumps=dumps)) as hub:
        subscriptions = begun(hub, who=object(), tags=["s"]), begun(hub)
        with pytest.raises(error):
            hub.kick(**options)
        assert not any(subscription.is_closed for subscription in subscriptions)


@pytest.mark.parametrize("kind", [Unavailable, Uncertain])
def test_others_that_cannot_be_told(hub, broker, kind):
    """It says so, after those of this process were ended."""
    subscription = begun(hub, who="ann")
    broker.failure = kind("gone")
    with pytest.raises(kind, match=r"ended in this process: 1.*gone"):
        hub.kick(who="ann")
    assert subscription.is_closed


def test_what_a_deaf_listener_has_missed(hub, broker):
    """It is read when the listener is back."""
    ann, bob = begun(hub, who="ann"), begun(hub, who="bob")
    broker.is_mute = True
    broker.kick('"ann"')
    broker.is_mute = False
    hub.sink.resync(None)
    await_end(ann)
    assert not bob.is_closed


@pytest.mark.parametrize("is_whole", [True, False])
def test_kicks_that_are_gone_end_all_whom_they_may_have_named(is_whole, caplog):
    """Their views decide anew; who has no name and no tag is none of them."""
    with closing(Hub(broker=(broker := Shared(capacity=3)))) as hub:
        named, tagged = begun(hub, who="ann"), begun(hub, tags=["x"])
        plain = begun(hub)
        broker.is_mute = True
        for _ in range(3 if is_whole else 4):
            broker.kick('"nobody"')
        broker.is_mute = False
        broker.kick('"ann"') if is_whole else hub.sink.resync([CONTROL])
        await_end(named)
        await_end(tagged)
        assert not plain.is_closed
        await_true(lambda: "kicks are missing" in caplog.text)


def test_a_malformed_kick_ends_all_whom_it_may_have_named(hub, broker):
    """Nobody knows whom it means."""
    named = begun(hub, who="ann")
    broker.publish([(CONTROL, b"data: nope\n\n")])
    await_end(named)


@pytest.mark.parametrize("is_here", [True, False])
def test_who_is_kicked_after_a_yes_is_ended(hub, broker, is_here):
    """`authorize` has just been asked, and nothing was read yet."""

    def authorize(subscription):
        hub.kick(who="ann") if is_here else broker.kick('"ann"')
        return True

    ann = hub.subscribe("a", who="ann", authorize=authorize)
    with suppress(Closed):
        PLACE.start(lambda: ann.read(0))()
    await_end(ann)


def test_a_kick_that_fails_for_one_reaches_the_others(broker):
    """Whoever is asked first; what came with it, or later, is not forgotten."""

    def dumps(value):  # of whatever is neither text nor a number
        raise ZeroDivisionError

    with closing(Hub(broker=broker, dumps=dumps)) as hub:
        others = [begun(hub, who=who) for who in (object(), "ann", "bob", "eve")]
        broker.is_mute = True
        broker.kick('"ann"')
        broker.kick('"bob"')
        broker.is_mute = False
        hub.sink.resync([CONTROL])
        await_end(others[1])
        await_end(others[2])
        broker.kick('"eve"')
        await_end(others[3])


def test_a_name_that_is_no_json_is_named_by_no_kick(hub):
    """It hinders no other one; by its tags it can be ended."""
    strange, ann = begun(hub, who=object(), tags=["x"]), begun(hub, who="ann")
    assert hub.kick(who="ann") == 1
    assert ann.is_closed
    assert hub.kick(tags=["x"], who="ann") == 0
    assert hub.kick(tags=["x"]) == 1
    assert strange.is_closed


def test_a_kick_nested_too_deeply_hides_no_other(hub, broker):
    """It ends all whom what came with it may have named."""
    ann = begun(hub, who="ann")
    broker.is_mute = True
    broker.kick('"ann"')
    deep = b"[" * 200_000 + b"]" * 200_000
    broker.publish([(CONTROL, b'data: {"who": %b}\n\n' % deep)])
    broker.is_mute = False
    hub.sink.resync([CONTROL])
    await_end(ann)


def test_who_came_as_the_last_left_is_kicked_if_not_heard(hub, broker, monkeypatch):
    """They were told that they are listened for."""
    first, heard = begun(hub, who="ann"), []
    watch, unwatch = Shared.watch, Shared.unwatch

    def come_first(self, channel):
        if channel == CONTROL and not heard:
            monkeypatch.setattr(Shared, "watch", watch)
            heard.append(begun(hub, who="bob"))
            monkeypatch.setattr(Shared, "watch", refuse)
        unwatch(self, channel)

    def refuse(self, channel):
        raise Unavailable("gone")

    monkeypatch.setattr(Shared, "unwatch", come_first)
    first.close()
    await_end(heard[0])


def test_nobody_sees_the_channel(hub, broker):
    """Not by a pattern, nor in the counts; nor can it be named."""
    watcher = begun(hub, "*", "#", who="ann")
    before = hub.stats()
    broker.kick('"bob"')
    hub.publish("a", "1")
    assert {event.data for event in watcher.read(5)} == {"1"}
    assert hub.stats()["channels"] == before["channels"] + 1
    for call in (
        lambda name: hub.publish(name, "x"),
        hub.subscribe,
        hub.head,
        hub.channel,
    ):
        with pytest.raises(ValueError, match="channel"):
            call(CONTROL)
    assert b'\0{"only": []}\n' in Kick("1", None).encoded("x")  # older workers
    assert matches("#", CONTROL)


def test_it_is_listened_for_while_there_is_somebody(hub, broker):
    """Nobody with a name or tags costs nothing; nor does the second one."""
    begun(hub)
    assert CONTROL not in broker.watched
    first, second = begun(hub, who="ann"), begun(hub, tags=["x"])
    await_true(lambda: not hub.subscribers.control.is_reading)
    reads = broker.reads.count(CONTROL)
    for n in range(20):
        hub.publish("a", str(n))
    first.close()
    assert CONTROL in broker.watched
    second.close()
    assert CONTROL not in broker.watched
    broker.kick('"ann"')
    assert not begun(hub, who="ann").is_closed
    assert reads <= 2


def test_a_collected_subscription_is_listened_for_no_more(hub, broker):
    """As if it had been closed; by the next one that comes."""
    subscription = begun(hub, who="ann")
    assert CONTROL in broker.watched
    del subscription
    gc.collect()
    begun(hub)
    assert CONTROL not in broker.watched


def test_kicks_are_read_again_where_they_could_not_be(hub, broker, monkeypatch):
    """A moment later, without another kick."""
    monkeypatch.setattr(control, "RETRY", 0.01)
    subscription, failed = begun(hub, who="ann"), []
    await_true(lambda: not hub.subscribers.control.is_reading)

    def read(channel, after, limit=1000):
        if channel == CONTROL and not failed:
            failed.append(after)
            raise Unavailable("for a moment")
        return MemoryBroker.read(broker, channel, after, limit)

    monkeypatch.setattr(broker, "read", read)
    broker.kick('"ann"')
    await_end(subscription)
    assert failed


def test_a_hub_passes_over_its_own_kicks(hub, broker):
    """It has done them at once: who has come since is not meant."""
    other = begun(hub, who="bob")
    await_true(lambda: not hub.subscribers.control.is_reading)
    broker.is_mute = True
    hub.kick(who="ann")
    newcomer = begun(hub, who="ann")
    broker.is_mute = False
    broker.kick('"bob"')  # told after it
    await_end(other)
    assert not newcomer.is_closed


def test_a_predicate_that_raises_ends_the_others_all_the_same(hub):
    """Then it is raised."""
    first, broken, last = (begun(hub, who=who) for who in (1, 0, 2))

    def predicate(subscription):
        return 1 / subscription.who

    with pytest.raises(ZeroDivisionError):
        hub.kick(predicate)
    assert [s.is_closed for s in (first, broken, last)] == [True, False, True]


def test_an_end_of_a_kick_reads_nothing_more(hub):
    """Kicked between two reads: what has come meanwhile is not given out."""
    ann = begun(hub, who="ann")
    hub.publish("a", "1")
    hub.kick(who="ann")
    with pytest.raises(Closed, match="kicked"):
        ann.read(0)


POOL_OF_GEVENT = """
from gevent import monkey
monkey.patch_all()
import os, sys, gevent
from gevent.threadpool import ThreadPool
from syncstream import Hub

here, there = Hub(sys.argv[1]), Hub(sys.argv[1])
pool = ThreadPool(1)
ann, bob = here.subscribe("a", who="ann"), here.subscribe("a", who="bob")
with gevent.Timeout(15):
    pool.apply(ann.read, (0,))
    bob.read(0)
    there.kick(who="bob")
    while not bob.is_closed:
        gevent.sleep(0.01)
    assert not ann.is_closed
here.close()
there.close()
os._exit(0)  # on Python 3.10 gevent's threads crash when they end, sometimes
"""


def test_who_was_read_first_in_a_thread_of_gevents_pool_hides_no_kick(tmp_path):
    """That thread's hub runs no more: kicks are read elsewhere."""
    pytest.importorskip("gevent")
    check_script(POOL_OF_GEVENT, f"local:{tmp_path}")


def test_others_that_are_not_told_of_a_kick_that_fails_are_named(hub, broker, caplog):
    """The failure is raised; that the others may go on is in the log."""

    def unwatch(channel):
        raise OSError("no route")

    subscription = begun(hub, who="ann")
    broker.unwatch, broker.failure = unwatch, Unavailable("gone")
    with pytest.raises(OSError, match="no route"):
        hub.kick(who="ann")
    assert subscription.is_closed
    journal().flush()
    assert "a kick may not have reached the other processes: gone" in caplog.text
    del broker.unwatch


def test_a_closed_hub_kicks_nobody(hub):
    """Neither by name nor by a function: it raises, as documented."""
    hub.close()
    for options in ({"who": "ann"}, {"predicate": lambda s: True}):
        with pytest.raises(ValueError, match="kick"):
            hub.kick(**options)
