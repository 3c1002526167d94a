"""One process's part of a broker: threads, greenlets, forks, its end."""

import contextlib
import os
import queue
import resource
import threading

import pytest

from syncstream.brokers import open_broker
from syncstream.brokers.redis import RedisBroker
from syncstream.channels.hub import Hub
from syncstream.errors import Unavailable, Uncertain
from tests.brokers.redis.clients import Reader, at, hub_of, own
from tests.brokers.redis_nodes import Nodes
from tests.brokers.sinks import Told
from tests.support.descriptors import open_files
from tests.support.pairs import check_script
from tests.support.tcp_proxy import Proxy
from tests.support.waits import TIMEOUT, await_true

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


def test_no_thread_is_left(shared):
    """It is `Unavailable`, and told of when there is one."""
    broker, told = RedisBroker(own(shared.url)), Told()
    broker.attach(told)
    before = threading.stack_size(1 << 46)  # bytes, which no machine has
    try:
        for _ in range(2):
            with pytest.raises(Unavailable, match="cannot start a thread"):
                broker.watch("a")
    finally:
        threading.stack_size(before)
    broker.watch("a")
    broker.publish([("a", b"x")])
    await_true(lambda: told.payloads == [b"x"])
    broker.close()


def test_no_descriptor_is_left(shared):
    """It is `Unavailable`, as the hub expects, and told of when there is one."""
    broker, told = RedisBroker(own(shared.url)), Told()
    broker.attach(told)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    for _ in range(2):  # to begin, and to listen
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            with pytest.raises(Unavailable, match="Too many open files"):
                broker.watch("a")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        broker.read("a", None)
    broker.watch("a")
    broker.publish([("a", b"x")])
    await_true(lambda: told.payloads == [b"x"])
    broker.close()


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


def test_a_pattern_waits_for_all_servers_at_once(shared, clock):
    """None of which may answer; its events are read once they do."""
    with contextlib.ExitStack() as stack:
        proxies = [stack.enter_context(Proxy(shared.port)) for _ in range(6)]
        for proxy in proxies:
            proxy.is_silent = True
        hosts = ",".join(f"127.0.0.1:{proxy.port}" for proxy in proxies)
        broker = open_broker(f"redis://{hosts}?publish_timeout=1")
        broker.attach(Told())
        began = clock()
        broker.watch("a:*")
        assert clock() - began < 2
        broker.close()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no /proc")
def test_nothing_is_left_behind(server):
    """No descriptor, whether it was in use, or never answered."""
    with Proxy(server.port) as proxy:
        before = open_files()
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
        await_true(lambda: not open_files() - before, lambda: open_files() - before)


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


HEIRS = """
import os, sys, threading
from syncstream.brokers.redis import RedisBroker
from syncstream.brokers.redis.process import Process
from tests.brokers.sinks import Told
broker = RedisBroker(sys.argv[1])
broker.attach(Told())
broker.watch("a")
child = os.fork()
if not child:
    watch, both, done = Process.watch, threading.Barrier(2, timeout=20), []
    def watch_together(self, name, timeout):
        both.wait()
        watch(self, name, timeout)
    Process.watch = watch_together
    def read():
        broker.read("a", None)
        done.append(True)
    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os._exit(len(done) != 2)
assert os.waitpid(child, 0)[1] == 0
broker.close()
"""


def test_no_thread_of_a_child_reads_before_its_names_are_watched(shared):
    """What its parent has watched, whichever thread began with that."""
    check_script(HEIRS, own(shared.url))


GRANDCHILD = """
import os, sys
from syncstream.brokers.redis import RedisBroker
from tests.brokers.sinks import Told
from tests.support.waits import await_true
told = Told()
broker = RedisBroker(sys.argv[1])
broker.attach(told)
broker.watch("a")
child = os.fork()
if not child:
    broker.publish([("b", b"the child's")])  # which listens to nothing
    child = os.fork()
    if not child:
        broker.read("b", None)
        await_true(lambda: told.lost == ["a"])  # from now on it listens
        broker.publish([("a", b"the grandchild's")])
        await_true(lambda: b"the grandchild's" in told.payloads)
        broker.close()
        os._exit(0)
    os._exit(os.waitpid(child, 0)[1] != 0)
assert os.waitpid(child, 0)[1] == 0
broker.close()
"""


def test_a_grandchild_is_told_of_what_was_watched_before_both_forks(shared):
    """Even if the child between them has only published."""
    check_script(GRANDCHILD, own(shared.url))


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
