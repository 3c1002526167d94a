"""Whatever call of the loop, of a lane or of the watch raises: the others go on."""

import gc
import logging
import os
import sys
import threading
import time
from contextlib import suppress

import pytest
from werkzeug.test import create_environ, run_wsgi_app

import syncstream.runtime.watch
from syncstream import Hub, SSEResponse, Unavailable, sleep
from syncstream.brokers.memory import MemoryBroker
from syncstream.fanout import (
    client,
    connection,
    ends,
    group,
    lanes,
    loop,
    meeting,
    wheel,
)
from syncstream.fanout.loop import fanout
from syncstream.runtime.journal import MOST, Journal, journal
from syncstream.runtime.process import Process
from syncstream.runtime.waiter import wake_all
from tests.fanout.faults import Faults
from tests.fanout.peers import HEAD, Peer, settle
from tests.support.pairs import Line, Threads, check_script, serve, stream_of
from tests.support.waits import TIMEOUT, await_true

PLACE = Threads()
ERRORS = [MemoryError, SystemExit]
SPOKEN = ("one", "two", "many", "down", "own", "slowly", "asked")
LEAVE = {"two 2", "gone", "timed", "broken 1", "broken 2", "vanished", "denied"}
EVENTS = 3  # a channel's, while a call may raise


@pytest.fixture
def quiet(monkeypatch):
    """Every line is made, and none is kept."""
    log = logging.getLogger("syncstream")
    monkeypatch.setattr(log, "propagate", False)
    monkeypatch.setattr(log, "handlers", [logging.NullHandler()])
    level = log.level
    log.setLevel(logging.DEBUG)
    yield
    journal().flush()
    log.setLevel(level)


class Flaky(MemoryBroker):
    """Cannot be read, for a moment, now and then."""

    is_down = False

    def read(self, channel, after, limit=1000):
        if self.is_down and channel == "down":
            raise Unavailable("down")
        return super().read(channel, after, limit)


def calm(loop):
    """Wait until the loop and its lanes have done what they were told before, once."""
    lanes = loop.lanes()
    for call in (loop.call, lanes.reads.do, lanes.users.do, loop.call):
        done = threading.Event()
        call(done.set)
        assert done.wait(TIMEOUT)


class Scene:
    """Clients of all kinds, in groups that have nothing to do with each other."""

    def __init__(self, faults):
        self.faults = faults
        self.modules = faults.modules
        self.loop = self.modules["loop"].fanout()
        self.hub = Hub(broker=Flaky())
        self.peers = {}  # by name, which begins with the group's
        self.asked = 0
        self.join("one 1", "one")
        self.join("one 2", "one", is_chunked=False)
        self.join("two 1", "two", keepalive=0.05)
        self.join("two 2", "two", keepalive=0.05)
        self.join("many", "many", "more", before_wait=[lambda: None])
        self.join("down", "down", "more")
        self.join("own", "own", on_gap=lambda: ["snapshot"], after="unknown")
        self.join("slowly", "slowly", throttle=0.02)
        self.join(
            "asked",
            "asked",
            authorize=(self.authorize, 0.05),
            before_wait=[lambda: 1 / 0],
        )
        self.join("slow", "slow", send_timeout=30.0)
        self.join("broken 1", "broken")
        self.join("broken 2", "broken")
        self.join("vanished", "vanished")
        self.join("denied", "denied", authorize=(self.allow_once, 0.05))
        calm(self.loop)
        self.fill("slow")

    def authorize(self, subscription):
        self.asked += 1
        return True

    def allow_once(self, subscription):
        allowed = not self.allowed_once
        self.allowed_once = True
        return allowed

    allowed_once = False

    def join(self, name, *channels, **options):
        client = self.modules["client"].Client
        with suppress(*ERRORS):  # whoever asked is told
            peer = Peer(self.loop, self.hub, *channels, client=client, **options)
            self.peers[name] = peer

    def fill(self, name):
        """Send more than the kernel takes."""
        for _ in range(12):
            self.hub.publish(name, "x" * 100_000)

    def act(self):
        """Do all that happens to clients, some of it in the same round."""
        is_there, go_on = threading.Event(), threading.Event()
        with suppress(*ERRORS):
            self.loop.call(lambda: is_there.set() or go_on.wait(TIMEOUT))
            is_there.wait(0.1)
            client = self.peers["broken 1"].client
            self.loop.call(lambda: 1 / 0, client.group or client)
        self.peers["vanished"].leave()
        for n in range(EVENTS):
            for channel in (*SPOKEN, "vanished"):
                with suppress(*ERRORS):
                    self.hub.publish(channel, str(n))
        self.hub.broker.is_down = True
        self.hub.sink.resync(["down"])
        go_on.set()
        self.join("one late", "one", after="start")
        self.join("gone", "gone", callbacks=[lambda: 1 / 0], who="ann", announce=True)
        self.join("timed", "timed", deadline=time.monotonic() + 0.05)
        with suppress(*ERRORS):
            self.peers["one 2"].client.on_close(lambda: None)
            self.peers["two 2"].client.stop("kicked")
        if "gone" in self.peers:
            self.peers["gone"].leave()
        self.peers["slow"].read()
        # Until all has happened, or what was to fail has failed.
        deadline = time.monotonic() + 0.3
        while time.monotonic() < deadline and not self.faults.is_hit:
            names = {name for name in LEAVE if name in self.peers}
            left = all(self.peers[name].client.reason for name in names)
            if left and self.asked > 1:
                break
            time.sleep(0.002)
        self.hub.broker.is_down = False
        with suppress(*ERRORS):
            calm(self.loop)

    def last(self, text):
        """Publish it to everybody; return the groups of which some were cut."""
        for channel in (*SPOKEN, "slow"):
            self.hub.publish(channel, text)
        return {
            name.partition(" ")[0]
            for name, peer in self.peers.items()
            if name not in LEAVE and not self.gets(name, peer, text)
        }

    def gets(self, name, peer, text):
        """Tell whether it gets this, after all else; ``False``: it was cut."""
        data = bytearray(peer.data)
        end = f"data: {text}\n".encode()
        while end not in data:
            try:
                part = peer.socket.recv(1 << 20)
            except ConnectionResetError:
                return False
            except TimeoutError:
                raise AssertionError(f"{name} waits for ever") from None
            if not part:
                return False
            data += part
        peer.data = bytes(data)
        expected = [*map(str, range(EVENTS))] * (name != "slow") + [text]
        assert [data for data in peer.texts() if data in expected] == expected, name
        return True

    def close(self):
        for peer in self.peers.values():
            peer.leave()
        calm(self.loop)
        for peer in self.peers.values():
            with suppress(OSError):
                peer.socket.close()
        self.hub.close()

    def check_nothing_is_left(self):
        """Nobody is counted, no group is kept, no timer.

        The loop's tables are private: what is left there is in no count of ``stats``.
        """
        loop, left = self.loop, {}

        def is_clean():
            left.update(
                parked=[name for name, p in self.peers.items() if p.served.parked],
                clients=list(loop._clients),
                lagging=list(loop._lagging),
                meeting=list(loop.meeting.groups),
                timers=[bucket for bucket in loop.wheel._buckets.values() if bucket],
            )
            return not any(left.values())

        try:
            await_true(is_clean)
        except AssertionError as failure:
            raise AssertionError(f"{left} is left") from failure


PARTS = 6  # of the walk: they run beside each other


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.timeout(300)  # some 200 scenes in all
@pytest.mark.matrix  # the calls are the same on each Python
@pytest.mark.parametrize("part", range(PARTS))
def test_every_call_of_the_loop_raises(quiet, part):
    """In turn: those whom it concerns are cut, everybody else gets every event."""
    faults = Faults(wheel, lanes, connection, group, client, meeting, ends, loop)
    scene = Scene(faults)
    faults.seen.clear()
    scene.act()
    assert scene.last("last") == set()
    reached = sorted(faults.seen)
    scene.close()
    scene.check_nothing_is_left()
    assert len(reached) > 200, f"the scene makes {len(reached)} calls"
    for site in reached[part::PARTS]:
        what, scene = faults.sites[site], Scene(faults)
        faults.arm(site, ERRORS[site % 2])
        try:
            scene.act()
            faults.disarm()
            cut = scene.last("last")
            assert len(cut) <= 1, (what, cut)
            assert scene.loop.state == "running", what
            scene.close()
            scene.check_nothing_is_left()
        except AssertionError as failure:
            raise AssertionError(f"where {what} raises") from failure
        finally:
            faults.disarm()
            scene.close()
    del scene
    gc.collect()  # of peers that could not join: what is said of it is ignored here


# One thing that fails, by itself.


def broken(*args):
    raise ZeroDivisionError("broken")


@pytest.fixture
def broken_log(monkeypatch):
    """Every line raises, as where a filter reads a request that is not there."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    level = logging.getLogger("syncstream").level
    logging.getLogger("syncstream").setLevel(logging.DEBUG)
    for name in ("fanout", "watch", "process", "hub", "waiting", "stream", "journal"):
        log = logging.getLogger(f"syncstream.{name}")
        monkeypatch.setattr(log, "filters", [broken])
    yield
    journal().flush()
    logging.getLogger("syncstream").setLevel(level)


@pytest.fixture
def channel():
    hub, loop = Hub(), fanout()
    settle(loop)
    yield hub, loop
    hub.close()


def test_a_log_that_raises_ends_nobody(broken_log, channel, capsys):
    """Whatever has to be said: a failed call, a source's failure, an end."""
    hub, loop = channel
    here, failing = Peer(loop, hub), Peer(loop, hub)
    loop.call(broken)
    loop.call(broken, failing.client)
    assert failing.read_all()[1] is False  # it is cut
    failing.leave()
    hub.publish("a", "after")
    here.read_until(lambda events: events)
    here.leave()
    settle(loop)
    assert "not logged" in capsys.readouterr().err


def test_a_log_that_takes_its_time_holds_up_nobody(channel, monkeypatch):
    """Not the loop, nor its lanes, nor the watch."""
    hub, loop = channel
    is_logging, go_on = threading.Event(), threading.Event()
    log = logging.getLogger("syncstream")

    class Slow(logging.Handler):
        def emit(self, record):
            is_logging.set()
            go_on.wait(TIMEOUT)

    handler = Slow(logging.DEBUG)
    log.addHandler(handler)
    try:
        here, other = Peer(loop, hub), Peer(loop, hub)
        loop.call(broken)
        assert is_logging.wait(TIMEOUT)
        watched = threading.Event()
        syncstream.runtime.watch.watch().call_at(0, broken)
        syncstream.runtime.watch.watch().call_at(0, watched.set)
        assert watched.wait(TIMEOUT)
        hub.publish("a", "meanwhile")
        here.read_until(lambda events: events)
        other.client.stop("kicked")
        await_true(lambda: not other.served.parked)
        assert not go_on.is_set()
    finally:
        go_on.set()
        here.leave()
        other.leave()
        settle(loop)
        journal().flush()
        log.removeHandler(handler)
        handler.close()


def test_a_log_that_takes_its_time_holds_up_no_keepalive(monkeypatch):
    """A source that is named, of one stream, by the watch of all."""
    monkeypatch.setattr("syncstream.streams.monitor.GHOST", 0.02)
    monkeypatch.setattr("syncstream.streams.monitor.STUCK", 0.02)
    is_logging, go_on, left = (threading.Event() for _ in range(3))

    class Slow(logging.Handler):
        def emit(self, record):
            is_logging.set()
            go_on.wait(TIMEOUT)

    def source():
        yield "a"
        left.set()
        go_on.wait(TIMEOUT)

    handler = Slow(logging.WARNING)
    log = logging.getLogger("syncstream")
    log.addHandler(handler)
    stream = stream_of(source(), Line())
    join = PLACE.start(lambda: serve(stream))
    try:
        assert left.wait(TIMEOUT)
        stream.stop()
        assert is_logging.wait(TIMEOUT)
        watched = threading.Event()
        syncstream.runtime.watch.watch().call_at(0, watched.set)
        assert watched.wait(5)
    finally:
        go_on.set()
        join()
        journal().flush()
        log.removeHandler(handler)
        handler.close()


def test_a_descriptor_that_could_sleep(channel, caplog):
    """Without O_NONBLOCK one write would hold up all: its client is cut at once."""
    hub, loop = channel
    other, peer = Peer(loop, hub), Peer(loop, hub, add=False)
    os.set_blocking(peer.client.fd, True)
    loop.add(peer.client, HEAD)
    await_true(lambda: peer.ends)
    assert peer.ends == ["error"]
    hub.publish("a", "1")
    other.read_until(lambda events: events)
    assert journal().flush()
    assert "must have O_NONBLOCK" in caplog.text
    peer.leave()
    other.leave()
    settle(loop)


def test_a_sender_that_raises(channel):
    """Nobody knows who has got it: these are cut, and the next ones get all."""
    hub, loop = channel
    here, others = [Peer(loop, hub) for _ in range(2)], Peer(loop, hub, "b")
    settle(loop)

    class Failing:
        def send_to_all(self, fds, data):
            raise MemoryError

        def close(self):
            broken()

    loop.sender = Failing()
    hub.publish("a", "lost")
    for peer in here:
        body, is_whole, _ = peer.read_all()
        assert not is_whole, body
        assert peer.texts() == []
        await_true(lambda peer=peer: peer.ends)
        assert peer.ends == ["error"]
        peer.leave()
    assert loop.sender.name == "write"
    hub.publish("b", "1")
    others.read_until(lambda events: events)
    others.leave()
    settle(loop)


def test_a_hook_that_raises_strands_nobody(channel, caplog):
    """Of one that was handed over: it is asked, and told, as before."""
    hub, loop = channel
    asked = []
    peer = Peer(
        loop,
        hub,
        before_wait=[broken],
        authorize=(lambda subscription: asked.append(1) or True, 0.05),
    )
    await_true(lambda: len(asked) > 3)
    hub.publish("a", "1")
    peer.read_until(lambda events: events)
    peer.leave()
    settle(loop)
    assert "a before_wait hook failed" in caplog.text


def test_a_hook_that_raises_ends_no_generator(caplog):
    """Attached: said once, with its traceback."""

    def source():
        for n in range(3):
            sleep(0.001)
            yield str(n)

    environ = create_environ()
    environ["syncstream.before_wait"] = [broken]
    body = run_wsgi_app(SSEResponse(source()), environ)
    assert b"".join(body[0]).count(b"data: ") == 3
    assert caplog.text.count("ZeroDivisionError: broken") == 1


def test_a_loop_that_cannot_go_on(channel, caplog, monkeypatch):
    """It says so; who is there is cut, and who comes gets another loop."""
    hub, loop = channel
    here = [Peer(loop, hub), Peer(loop, hub, "b", "c")]
    late = Peer(loop, hub, add=False)
    settle(loop)
    monkeypatch.setattr(loop, "_pause", broken)
    loop.call(int)
    for peer in here:
        assert peer.read_all()[1] is False
        await_true(lambda peer=peer: peer.ends == ["error"])
        peer.leave()
    await_true(lambda: loop.state == "dead")
    loop.add(late.client, b"")  # it was on its way
    assert late.socket.recv(10) == b""
    late.leave()
    another = fanout()
    assert another is not loop
    text = "the subscribers' loop has ended: 2 clients are cut"
    await_true(lambda: text in caplog.text)
    peer = Peer(another, hub)
    hub.publish("a", "1")
    peer.read_until(lambda events: events)
    peer.leave()
    settle(another)


@pytest.mark.parametrize("seconds", [30 * 86400.0, 1e12, 1e300, 1.7e308])
def test_durations_that_overflow_nothing(channel, seconds):
    """epoll takes 24 days, an int no infinity: months are as good as ever."""
    hub, loop = channel
    deadline = time.monotonic() + seconds
    peer = Peer(loop, hub, deadline=deadline, send_timeout=seconds, keepalive=seconds)
    settle(loop)
    assert loop._pause() > 0
    hub.publish("a", "1")
    peer.read_until(lambda events: events)
    peer.leave()
    settle(loop)
    timer = syncstream.runtime.watch.watch().call_at(deadline, int)
    syncstream.runtime.watch.watch().cancel(timer)


def test_a_stream_that_cannot_be_stopped_keeps_no_other():
    """Nor does a server that cannot be asked."""

    class Stubborn:
        def __init__(self, shut_down=broken):
            self.shut_down = shut_down

    record, stopped = Process(), []
    streams = [
        Stubborn(),
        Stubborn(lambda *times: stopped.append("shutdown")),
        Stubborn(),
    ]
    is_stopping = []
    for key, stream in enumerate(streams):
        record.opened(stream, None, key, lambda: lambda: is_stopping[0])
    record.look()
    assert stopped == []
    is_stopping.append(0.0)
    record.look()
    assert stopped == ["shutdown"]
    record.at_exit(lambda: stopped.append("exit"))
    record.at_exit(broken)
    record.leave()
    assert stopped == ["shutdown", "exit"]


def test_a_timer_that_raises_comes_again(monkeypatch):
    """A fault of a moment does not end a stream's keepalives, or its time-out."""
    monkeypatch.setattr(syncstream.runtime.watch, "AGAIN", 0.01)
    calls = []

    def call():
        calls.append(1)
        if len(calls) < 3:
            broken()

    syncstream.runtime.watch.watch().call_at(0, call)
    await_true(lambda: len(calls) == 3)


def test_a_waiter_that_cannot_be_woken():
    """The others are; and it is tried twice, for nobody else would wake it."""

    class Waiting:
        gevent_hub = None

        def __init__(self, failures):
            self.failures, self.calls = failures, 0

        def wake(self):
            self.calls += 1
            if self.calls <= self.failures:
                broken()

    waiters = [Waiting(0), Waiting(1), Waiting(9), Waiting(0)]
    wake_all(waiters)
    assert [waiter.calls for waiter in waiters] == [1, 2, 2, 1]


def test_a_greenlet_that_fails_keeps_no_other_waiting():
    """Of those that one publish wakes, whatever the hub makes of its error."""
    out = check_script(
        """
import gevent, logging, sys
logging.raiseExceptions = False
logging.lastResort = None
from syncstream.runtime.waiter import Waiter, wake_all
order = []

class Failing:
    gevent_hub = gevent.get_hub()

    def __init__(self, error):
        self.error = error

    def switch(self):
        raise self.error

class Fine(Failing):
    def switch(self):
        order.append(1)

def handle_error(*args):
    raise RuntimeError("so does this")

Failing.gevent_hub.handle_error = handle_error
wake_all([Fine(0), Failing(ZeroDivisionError()), Fine(0), Failing(KeyError()), Fine(0)])
gevent.sleep(0.01)
gevent.sleep(0.01)
print(len(order))
"""
    )
    assert out.startswith("3\n")


def test_lines_that_come_too_fast():
    """So many wait, and no more; what raises, or exits, ends no journal."""
    own, seen = Journal(), []
    go_on = threading.Event()
    own.do(lambda: go_on.wait(TIMEOUT))
    for n in range(MOST + 10):
        own.do(lambda n=n: seen.append(n))
    go_on.set()
    assert own.flush()
    assert seen[:3] == [0, 1, 2]
    assert MOST - 1 <= len(seen) <= MOST
    own.do(sys.exit)
    own.do(lambda: seen.append("last"))
    assert own.flush()
    assert seen[-1] == "last"
