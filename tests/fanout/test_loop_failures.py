"""What could go wrong in the loop, and concerns nobody else."""

import random
import threading
import time

import pytest

from syncstream import BrokerError, Denied, Hub, Subscription, Unavailable
from syncstream.brokers.log import Entry
from syncstream.brokers.memory import MemoryBroker
from syncstream.channels import limits
from syncstream.fanout import group as group_module
from syncstream.fanout import loop as loop_module
from syncstream.fanout.group import Group
from syncstream.runtime.sockets import release
from tests.fanout.peers import (
    HEAD,
    RETRY,
    Peer,
    ended,
    seen,
    settle,
    texts_until,
)
from tests.support.pairs import check_script
from tests.support.waits import TIMEOUT, await_true

pytestmark = pytest.mark.usefixtures("nothing_is_left_behind")


def test_what_comes_while_a_lane_reads(hub, peers):
    """Told between the lane's last look and the loop's hearing of it: not missed."""
    rounds = iter(range(1, 50))

    def publish():
        # The lane runs this when it has read, before it says so.
        for n in rounds:
            hub.publish("a", str(n))
            return

    two = peers(hub, "a", "b", before_wait=[publish], on_gap=list)
    found = texts_until(two, "49")
    assert found == [str(n) for n in range(int(found[0]), 50)]


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_group_whose_timer_is_not_removed_at_once(
    hub, peers, loop, is_shared, monkeypatch
):
    """Its client, that goes to another, is cut; it is forgotten all the same."""
    remove, left = loop.wheel.remove, []

    def fail_once(item):
        is_left = isinstance(item, Group) and not item.clients and item.bucket
        if is_left and item.is_shared == is_shared and not left:
            left.append(item)
            raise MemoryError
        remove(item)

    monkeypatch.setattr(loop.wheel, "remove", fail_once)
    two = [peers(hub, keepalive=TIMEOUT) for _ in range(2)]
    if is_shared:
        seen(*two)
        for _ in range(12):  # more than the kernel takes
            hub.publish("a", "x" * 100_000)
    await_true(lambda: any(peer.ends for peer in two))
    assert sorted(peer.ends for peer in two) == [[], ["error"]]
    (group,) = left
    assert not group.bucket
    await_true(lambda: group.leader.waiter is None)


def test_an_end_that_comes_first(hub, peers, loop):
    """Stopped or kicked by another thread while it is on its way to the loop."""
    for end in (
        lambda peer: peer.client.stop("shutdown"),
        lambda peer: loop.call(peer.client.turn) or peer.subscription.close("kicked"),
    ):
        peer = peers(hub, add=False)
        end(peer)
        settle(loop)
        loop.add(peer.client, HEAD)
        reason, body, is_whole, _ = ended(peer)
        assert reason in ("shutdown", "kicked")
        assert peer.data.startswith(HEAD)
        assert RETRY.fullmatch(body)
        assert is_whole


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_an_application_that_exits_in_a_lane(hub, peers, error, caplog):
    """Its client has an end; the lane goes on for the others."""
    is_quiet = threading.Event()

    def authorize(subscription):
        if is_quiet.is_set():
            raise error
        return True

    def callback():
        raise error

    peer = peers(hub, authorize=(authorize, 0.1), callbacks=[callback])
    settle(peer.loop)
    is_quiet.set()
    assert ended(peer)[0] == "error"
    other = peers(hub, "a", "b")
    settle(other.loop)
    hub.publish("a", "1")
    assert texts_until(other, "1") == ["1"]


def test_an_application_that_blocks(hub, peers):
    """Others get their events, and theirs ends when its time is over."""
    is_blocking, go_on = threading.Event(), threading.Event()
    asked = []

    def authorize(subscription):
        asked.append(1)
        if len(asked) > 1:
            is_blocking.set()
            assert go_on.wait(TIMEOUT)
        return True

    other = peers(hub)
    seen(other)
    # It is asked before that, also behind another's call that hangs: see `Crew.hurry`.
    deadline = time.monotonic() + 0.8 * limits.ANSWER
    peer = peers(hub, authorize=(authorize, 0.1), deadline=deadline)
    try:
        assert is_blocking.wait(TIMEOUT)
        for n in range(10):
            hub.publish("a", str(n))
            assert texts_until(other, str(n))[-1] == str(n)
        body, is_whole, _ = peer.read_all()
        assert is_whole
        assert RETRY.search(body)
    finally:
        go_on.set()
    await_true(lambda: peer.ends)
    assert peer.ends == ["max_duration"]


class Failing(MemoryBroker):
    """One that is down for a while."""

    is_down = False
    refused = ""
    failure = None

    def read(self, channel, after, limit=1000):
        if self.is_down:
            raise Unavailable("down")
        if channel == self.refused:
            raise Denied("no permission")
        if self.failure is not None:
            raise self.failure
        return super().read(channel, after, limit)


@pytest.mark.parametrize("channels", ["a", "ab"])
def test_a_broker_that_is_down_for_a_while(peers, channels, monkeypatch):
    """Its clients wait; then they get what they have missed."""
    monkeypatch.setattr(group_module, "RETRY_EVERY", 0.1)
    broker = Failing()
    hub = Hub(broker=broker)
    try:
        here = [peers(hub, *channels) for _ in range(2)]
        hub.publish("a", "0")
        for peer in here:
            texts_until(peer, "0")
        broker.is_down = True
        hub.sink.resync(None)
        hub.publish("a", "1")
        settle(here[0].loop)
        hub.publish("a", "2")
        settle(here[0].loop)
        broker.is_down = False
        for peer in here:
            assert texts_until(peer, "2") == ["0", "1", "2"]
    finally:
        hub.close()


@pytest.mark.parametrize("channels", ["a", "ab"])
def test_what_is_malformed_silences_nobody(hub, peers, channels):
    """Told, it is dropped; stored, it is a reset; what follows it comes."""
    here = [peers(hub, *channels) for _ in range(2)]
    hub.publish("a", "0")
    for peer in here:
        texts_until(peer, "0")
    for payload in (b"\0nope", b"", b"event: reset\ndata: {}\n\n"):
        hub.sink.deliver("a", Entry("7-7", hub.head("a"), payload))
        settle(here[0].loop)
    hub.publish("a", "1")
    for peer in here:
        assert texts_until(peer, "1") == ["0", "1"]
    hub.broker.publish([("a", b"\0nope")])
    hub.publish("a", "2")
    for peer in here:
        events = peer.read_until(lambda events: events[-1].data == "2")
        assert [event.event for event in events] == [None, None, "reset", None]
    late = peers(hub, *channels, after=events[1].id)
    late.read_until(lambda events: [e.event for e in events] == ["reset", None])


@pytest.mark.parametrize("what", ["poll", "step"])
@pytest.mark.parametrize("channels", ["a", "ab"])
def test_a_turn_that_raises_ends_its_clients(hub, peers, channels, what, monkeypatch):
    """They come back; others go on, and so does whoever comes then."""
    here = [peers(hub, *channels) for _ in range(3)]
    other = peers(hub, "c")
    hub.publish("a", "0")
    hub.publish("c", "0")
    for peer in (*here, other):
        texts_until(peer, "0")
    found = getattr(Subscription, what)

    def fail(subscription):
        if "a" in subscription.channels and (what == "step" or subscription.is_plain):
            raise ZeroDivisionError
        return found(subscription)

    is_asked = what == "step" or channels == "a"
    monkeypatch.setattr(Subscription, what, fail)
    if what == "step":
        hub.sink.resync(["a"])
    hub.publish("a", "1")
    for peer in here if is_asked else ():
        await_true(lambda peer=peer: peer.ends)
        assert peer.ends == ["error"]
        _, is_whole, _ = peer.read_all()
        assert not is_whole
    hub.publish("c", "1")
    assert texts_until(other, "1") == ["0", "1"]
    monkeypatch.undo()
    again = peers(hub, *channels, after="start")
    texts_until(again, "1")


class Hanging(MemoryBroker):
    """One that does not answer of one channel, until it is let."""

    def __init__(self):
        super().__init__()
        self.hung = ""
        self.is_asked, self.go_on = threading.Event(), threading.Event()

    def read(self, channel, after, limit=1000):
        if channel == self.hung:
            self.is_asked.set()
            assert self.go_on.wait(TIMEOUT)
        return super().read(channel, after, limit)


def test_a_lane_that_hangs_keeps_nobody_for_ever(peers, monkeypatch):
    """Who waits for it, or behind it, is ended, and may come back; it is said."""
    broker = Hanging()
    hub = Hub(broker=broker)
    try:
        hung, behind = [peers(hub) for _ in range(2)], peers(hub, "b")
        other = peers(hub, "c")
        for name in "abc":
            hub.publish(name, "0")
        for peer in (*hung, behind, other):
            texts_until(peer, "0")
        seen(other)  # at the end of its channel: nothing is to be read for it
        settle(other.loop)
        # Not before: on a busy machine any lane takes longer now and then.
        monkeypatch.setattr(group_module, "STUCK", 0.2)
        broker.hung = "a"
        hub.sink.resync(["a"])
        assert broker.is_asked.wait(TIMEOUT)
        hub.sink.resync(["b"])
        for peer in (*hung, behind):
            await_true(lambda peer=peer: peer.client.reason == "error")
        hub.publish("c", "1")
        assert texts_until(other, "1") == ["0", "1"]
        assert other.client.reason is None
    finally:
        broker.go_on.set()
        hub.close()


def test_a_group_that_all_leave_while_a_lane_reads(peers):
    """After the lane's answer no event wakes it any more."""
    broker = Hanging()
    hub = Hub(broker=broker)
    try:
        here = [peers(hub) for _ in range(2)]
        hub.publish("a", "0")
        for peer in here:
            texts_until(peer, "0")
        seen(*here)
        group = here[0].client.group
        broker.hung = "a"
        hub.sink.resync(["a"])
        assert broker.is_asked.wait(TIMEOUT)
        for peer in here:
            peer.leave()
            await_true(lambda peer=peer: peer.ends)
        assert group.leader.waiter is group
        broker.go_on.set()
        await_true(lambda: group.leader.waiter is None)
    finally:
        broker.go_on.set()
        hub.close()


def test_a_broker_that_fails_is_not_one_that_is_away(peers, monkeypatch):
    """An error that does not pass by waiting ends those who would wait for it."""
    broker = Failing()
    hub = Hub(broker=broker)
    try:
        peer = peers(hub)
        hub.publish("a", "0")
        texts_until(peer, "0")
        monkeypatch.setattr(broker, "failure", BrokerError("another version's"))
        hub.sink.resync(None)
        await_true(lambda: peer.ends)
        assert peer.ends == ["error"]
    finally:
        hub.close()


@pytest.mark.parametrize("how", ["told", "read"])
@pytest.mark.parametrize("channels", ["a", "ab"])
def test_a_name_that_is_refused_ends_its_clients(peers, channels, how):
    """Those of that name alone, and they come back late; it is not asked again."""
    broker = Failing()
    hub = Hub(broker=broker)
    try:
        here = [peers(hub, *channels) for _ in range(2)]
        other = peers(hub, "c")
        hub.publish("a", "0")
        for peer in here:
            texts_until(peer, "0")
        if how == "told":
            hub.sink.deny("a", "NOPERM")
        else:
            broker.refused = "a"
            hub.sink.resync(["a"])
        for peer in here:
            await_true(lambda peer=peer: peer.ends)
            assert peer.ends == ["denied"]
            assert RETRY.search(peer.read_all()[0])
        hub.publish("c", "1")
        assert texts_until(other, "1") == ["1"]
        assert hub.presence("a") == []
    finally:
        hub.close()


def test_joins_and_leaves_while_others_publish(loop):
    """Four threads publish, four come and go: nothing lost, doubled, out of order."""
    hub = Hub(capacity=1_000_000)
    stop = threading.Event()
    problems, visits = [], []

    def publish(k):
        n = 0
        while not stop.is_set():
            hub.publish("a", f"{k} {n}")
            n += 1
            if n % 20 == 0:
                time.sleep(0.001)

    def visit():
        while not stop.is_set():
            peer = Peer(loop, hub, is_chunked=random.random() < 0.5)
            try:
                wanted = random.randrange(1, 40)
                events = peer.read_until(lambda e, wanted=wanted: len(e) >= wanted)
                visits.append([event.id for event in events])
            except BaseException as error:
                problems.append(error)
                return
            finally:
                peer.leave()

    threads = [threading.Thread(target=publish, args=(k,)) for k in range(4)]
    threads += [threading.Thread(target=visit) for _ in range(4)]
    for thread in threads:
        thread.start()
    least = time.monotonic() + 2
    try:
        await_true(lambda: problems or (visits[20:] and time.monotonic() > least))
    finally:
        stop.set()
    while any(thread.is_alive() for thread in threads):
        hub.publish("a", "for those who still wait")
        threads[-1].join(0.01)
    assert problems == []
    ids, last = [], "0"
    while entries := hub.broker.read("a", last).entries:
        ids += [entry.id for entry in entries]
        last = ids[-1]
    places = {id: place for place, id in enumerate(ids)}
    for visit in visits:
        first = places[visit[0]]
        assert visit == ids[first : first + len(visit)]
    await_true(lambda: not hub.presence("a"))
    hub.close()


def test_a_child_lets_go():
    """Once: a child's child closes nothing, and clients see an end by the parent's."""
    out = check_script(
        """
import os, socket, time
from tests.fanout.peers import HEAD, Peer, settle
from syncstream import Hub
from syncstream.fanout.loop import fanout

hub, loop = Hub(), fanout()
peer = Peer(loop, hub)
settle(loop)
fd = peer.client.fd
reader, writer = os.pipe()
pid = os.fork()
if not pid:
    status = 1
    try:
        # Its numbers are free here; somebody else takes them.
        null = os.open(os.devnull, os.O_RDONLY)
        taken = [null]
        for number in (fd, loop._event_fd):
            if number > 0 and number not in taken:
                taken.append(os.dup2(null, number))
        inner = os.fork()
        if not inner:
            for number in taken:
                os.fstat(number)
            own = fanout()
            assert own is not loop
            here = Hub()
            mine = Peer(own, here)
            settle(own)
            here.publish("a", "child")
            mine.read_until(lambda events: events)
            os._exit(0)
        assert os.waitpid(inner, 0)[1] == 0
        os.write(writer, b"x")
        time.sleep(60)
    finally:
        os._exit(status)
assert os.read(reader, 1) == b"x"
hub.publish("a", "parent")
peer.read_until(lambda events: events)
peer.client.stop("shutdown")
body, is_whole, _ = peer.read_all()
assert is_whole, body
os.kill(pid, 9)
os.waitpid(pid, 0)
peer.leave()
print("done")
"""
    )
    assert out == "done\n"


@pytest.mark.parametrize("where", ["in a swap", "on its way"])
def test_a_child_lets_go_of_who_is_not_there_yet(where):
    """Of a connection that has left its server, and is in no table of the loop's."""
    out = check_script(
        """
import os, sys, threading
from tests.fanout.peers import Peer, settle
from syncstream import Hub
from syncstream.fanout.loop import fanout
from syncstream.runtime.sockets import hold

hub, loop = Hub(), fanout()
settle(loop)
peer = Peer(loop, hub, add=False)
fd, go_on = peer.client.fd, threading.Event()
if sys.argv[1] == "in a swap":
    hold(fd)
else:
    is_held = threading.Event()
    loop.call(lambda: is_held.set() or go_on.wait(15))
    assert is_held.wait(15)
    loop.add(peer.client, b"")
pid = os.fork()
if not pid:
    try:
        os.fstat(fd)
    except OSError:
        os._exit(0)
    os._exit(1)
assert os.waitpid(pid, 0)[1] == 0
os.fstat(fd)
go_on.set()
if sys.argv[1] == "in a swap":
    loop.add(peer.client, b"")
peer.leave()
settle(loop)
print("done")
""",
        where,
    )
    assert out == "done\n"


def test_a_child_with_the_number_of_a_dead_parent():
    """It has a loop of its own, not the one that its parent's fork left behind."""
    out = check_script(
        """
import os, threading
from syncstream.fanout.loop import fanout

parent, loop = os.getpid(), fanout()
pid = os.fork()
if not pid:
    status = 1
    try:
        os.getpid = lambda: parent
        assert fanout() is not loop
        is_done = threading.Event()
        fanout().call(is_done.set)
        assert is_done.wait(15)
        status = 0
    finally:
        os._exit(status)
assert os.waitpid(pid, 0)[1] == 0
assert fanout() is loop
print("done")
"""
    )
    assert out == "done\n"


def test_a_loop_that_cannot_begin_leaves_no_descriptor(loop, monkeypatch):
    """Each client that comes tries again."""

    class Full:
        def register(self, fd, mask):
            raise OSError("no space left on device")

        def close(self):
            pass

    monkeypatch.setattr(loop_module, "native_epoll", lambda: Full)
    with pytest.raises(OSError, match="no space"):
        loop_module.Fanout()


def test_a_signal_while_a_client_is_given_leaves_it_to_its_server(hub, loop):
    """Its descriptor has one owner at each moment."""

    class Interrupted(set):
        def add(self, client):
            super().add(client)
            raise KeyboardInterrupt

    peer = Peer(loop, hub, add=False)
    peer.served.parked = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        loop.add(peer.client, HEAD)
    assert not peer.client.is_given
    release(peer.client.fd)
    peer.subscription.close()
    peer.leave()


GREENLETS = """
import gevent
from gevent import monkey
monkey.patch_all()
import threading
from syncstream.fanout.loop import fanout
from syncstream.runtime.sockets import native
"""


def test_lanes_of_a_hub():
    """A greenlet each: one that waits holds up neither the others nor the hub."""
    out = check_script(
        GREENLETS
        + """
from gevent.event import Event

lanes, go_on, order = fanout().lanes(), Event(), []
assert fanout().lanes() is lanes
is_waiting, are_done = Event(), [Event(), Event(), Event()]
lanes.users.do(lambda: is_waiting.set() or go_on.wait(15) or order.append("late"))
lanes.users.do(lambda: order.append("users") or are_done[0].set())
assert is_waiting.wait(15)
lanes.reads.do(lambda: order.append("reads") or are_done[1].set())
assert are_done[1].wait(15)
lanes.ends.do(lambda: order.append("ends") or are_done[2].set())
assert are_done[2].wait(15)
assert not are_done[0].is_set()
go_on.set()
assert are_done[0].wait(15)
print(*order)
"""
    )
    assert out == "reads ends users\n"


def test_the_crew_of_a_hub():
    """One that hangs holds up no other, though all are greenlets of one hub."""
    out = check_script(
        GREENLETS
        + """
from gevent.event import Event

crew, go_on, hung, done = fanout().lanes().asks, Event(), Event(), Event()
crew.do(lambda: hung.set() or go_on.wait(15) or done.clear())
assert hung.wait(15)
crew.do(done.set)
gevent.sleep(0)
assert not done.is_set()
import _thread
native(_thread, "start_new_thread")(crew.hurry, ())
assert done.wait(15)
go_on.set()
while crew._greenlets:
    gevent.sleep(0.001)
print("done")
"""
    )
    assert out == "done\n"


def test_lanes_of_a_hub_that_was_destroyed():
    """Threads do what is left: the ends of its clients are counted."""
    out = check_script(
        """
import threading
import gevent
from syncstream.fanout.loop import fanout

found, ready, is_over = [], threading.Event(), threading.Event()

def serve():
    def begin():
        found.append(fanout().lanes())

    gevent.spawn(begin).join()
    ready.set()
    gevent.get_hub().destroy()
    is_over.set()

threading.Thread(target=serve).start()
assert is_over.wait(15)
(lanes,) = found
assert lanes is not fanout().lanes()
for lane in (lanes.ends, lanes.reads, lanes.users):
    done = threading.Event()
    lane.do(done.set)
    assert done.wait(15)
print("done")
"""
    )
    assert out == "done\n"


@pytest.mark.parametrize("kind", [Unavailable, Denied])
def test_what_the_application_raises_cuts_its_client(hub, peers, kind):
    """Its `Unavailable` is not the broker's, which the loop would wait for."""

    def conflate(event):
        raise kind("not the broker")

    peer = peers(hub, conflate=conflate)
    hub.publish("a", "0")
    await_true(lambda: peer.ends)
    assert peer.ends == ["error"]
