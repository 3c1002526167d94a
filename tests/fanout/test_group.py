"""`Group`: what it does at its turn, with what a lane has read, and when it is due."""

import errno
import math
from types import SimpleNamespace

import pytest

from syncstream.channels.options import Failed, NotShared
from syncstream.errors import Unavailable
from syncstream.fanout import group as group_module
from syncstream.fanout.group import RETRY_EVERY, STUCK, Group
from tests.fanout.alone import Loop, Recorder, client, subscription


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(group_module, "time", clock)
    return clock


@pytest.fixture
def loop(clock):
    return Loop()


def leading(**options):
    return subscription(**{"is_plain": True, "has_user_code": False} | options)


def group_of(loop, count=1, *, key=None, leader=None, **options):
    """Return a group with clients, whose descriptors are 1, 2, ..."""
    clients = [client(loop, subscription(), **options) for _ in range(count)]
    group = Group(loop, leader or leading(), clients[0], key)
    for fd, one in enumerate(clients, 1):
        one.fd = fd
        group.add(one)
    loop.wheel.take()
    return group, clients


def test_what_a_client_got_is_counted_from_when_it_was_there(loop):
    """Not what its group had before, nor what it has later."""
    group, (first, second) = group_of(loop, 2, events=5, bytes=50)
    group.send(b"x" * 10, 2)
    group.remove(second)
    third = client(loop, subscription())
    third.fd = 3
    group.add(third)
    group.send(b"x" * 7, 1)
    for one in (first, third):
        group.remove(one)
    found = [(one.events, one.bytes) for one in (first, second, third)]
    assert found == [(8, 67), (7, 60), (1, 7)]
    assert [one.group for one in (first, second, third)] == [None] * 3
    assert loop.meeting.calls == [("forget", group)]
    assert group.leader.calls == [("count", 4), ("count", 2)]
    assert group.is_empty


def test_a_group_that_cannot_be_forgotten_is_tried_again(loop):
    """And the failure is told."""
    group, (one,) = group_of(loop)
    loop.meeting.results["forget"] = MemoryError()
    with pytest.raises(MemoryError):
        group.remove(one)
    assert loop.meeting.calls == [("forget", group)] * 2


@pytest.mark.parametrize("key", [None, "place"])
def test_a_group_that_is_let_go_is_woken_no_more(loop, key):
    group, _ = group_of(loop, key=key)
    group.let_go()
    assert group.leader.calls == [("detach", None) if key else ("withdraw",)]
    assert group.wake() is True
    assert loop.take() == [("call", group.turn, group)]


@pytest.mark.parametrize("key", [None, "place"])
def test_a_turn_sends_what_is_there(loop, key):
    """And has another one; without anything it looks for others at its place."""
    group, _ = group_of(loop, 2 if key else 1, key=key)
    group.leader.results["poll"] = (b"data", 1, False)
    group.turn()
    assert loop.take() == [("again", group.turn, group)]
    assert (group.events, group.bytes) == (1, 4)
    group.leader.results["poll"] = (b"", 0, True)
    group.turn()
    assert loop.calls == []
    assert loop.meeting.calls == ([] if key else [("join", group)])


def test_a_turn_waits_for_its_time(loop, clock):
    """Until a broker may be asked again; just then it is."""
    group, _ = group_of(loop)
    group.leader.results["poll"] = (b"", 0, True)
    group.retry_at = 1000.5
    group.turn()
    assert group.leader.calls == []
    clock.now = 1000.5
    group.turn()
    assert group.leader.calls == [("poll",)]


@pytest.mark.parametrize("key", [None, "place"])
def test_who_has_a_rest_to_take_is_sent_nothing_more(loop, key):
    """Alone; of a group, whoever lags leaves it. Nobody is sent nothing."""
    group, (one,) = group_of(loop, key=key)
    group.leader.results["poll"] = (b"", 0, True)
    other = subscription()
    other.results["is_where"] = True
    assert group.is_at(other) is True
    one.rest = memoryview(b"x")
    group.turn()
    assert group.leader.take() == [("poll",)] * (key is not None)
    assert group.is_at(other) is (key is not None)
    del group.clients[1]
    group.turn()
    assert group.leader.calls == []
    assert group.is_at(other) is False


@pytest.mark.parametrize("has_code", [False, True])
@pytest.mark.parametrize("is_plain", [False, True])
def test_what_may_block_is_read_by_a_lane(loop, clock, is_plain, has_code):
    """By that of the application if it calls its code; with one job at a time."""
    given = []
    leader = leading(is_plain=is_plain, has_user_code=has_code)
    leader.results |= {"poll": None, "step": (b"data", 1, None)}
    hook = (lambda: given.append(1),)
    group, (one,) = group_of(loop, leader=leader, before_wait=hook)
    lanes = one.terms.lanes
    lane = lanes.users if has_code else lanes.reads
    lane.began = 1000.0
    group.turn()
    assert leader.take() == [("poll",)] * is_plain
    ((name, where, job, owner),) = loop.take()
    assert (name, where, owner) == ("do", lane, group)
    assert (group.is_asking, group.is_woken, group.lane) == (True, False, lane)
    assert not group.is_empty
    assert loop.wheel.take() == [("add", group, 1000.0 + STUCK)]
    group.turn()
    assert group.is_woken
    assert loop.calls == leader.calls == []
    job()
    assert leader.take() == [("step",)]
    assert given == [1] * has_code
    loop.run()
    assert not group.is_asking
    assert group.events == 1
    assert loop.take() == [("again", group.turn, group)]


def told(loop, result, *, woken=False, **options):
    """Have a lane tell what it has read."""
    leader = leading(is_plain=False)
    leader.results["step"] = result
    group, clients = group_of(loop, leader=leader, **options)
    clients[0].terms.lanes.reads.began = 0.0
    group.turn()
    if woken:
        group.turn()
    loop.run()
    loop.wheel.take()
    loop.run()
    return group, clients


def test_nothing_new_is_waited_for(loop):
    """Among others at its place."""
    group, _ = told(loop, (b"", 0, None))
    assert loop.meeting.calls == [("join", group)]
    assert not group.is_asking


def test_what_came_while_a_lane_read_is_read(loop):
    """In another turn, at once."""
    group, _ = told(loop, (b"", 0, None), woken=True)
    assert loop.meeting.calls == []
    assert group.is_asking


def test_a_throttle_is_waited_for(loop, clock):
    """Until the time that was told; then it has its turn."""
    group, _ = told(loop, (b"", 0, 1003.0))
    assert group.retry_at == 1003.0
    assert loop.wheel.take() == [("add", group, 1003.0)]
    group.due(1002.5)
    assert not group.is_asking
    clock.now = 1003.0
    group.due(1003.0)
    assert group.retry_at == 0.0
    assert group.is_asking


def test_a_broker_that_is_down_is_asked_again(loop):
    """A moment later; nobody's stream ends."""
    group, (one,) = told(loop, Unavailable("no route"))
    assert group.retry_at == 1000.0 + RETRY_EVERY
    assert loop.wheel.calls == [("add", group, 1000.0 + RETRY_EVERY)]
    assert one.terms.lanes.said == ["a channel cannot be read yet: no route"]
    assert loop.ends.calls == []


@pytest.mark.parametrize("is_applications", [False, True])
def test_what_cannot_be_read_is_the_end_of_all(loop, is_applications):
    """An application's own `Unavailable`, too."""
    error = Unavailable("mine") if is_applications else LookupError("broken")
    result = Failed(error) if is_applications else error
    _, clients = told(loop, result, count=3, key="place")
    assert loop.ends.calls == [("fail", one, error) for one in clients]


def test_a_gap_is_each_clients_own(loop):
    """Each leaves the group, and reads by itself."""
    alone = Recorder()
    loop.meeting.results["part"] = alone
    _, clients = told(loop, NotShared(), count=3, key="place")
    assert loop.meeting.calls == [("part", one) for one in clients]
    assert [(name, owner) for name, _, owner in loop.take()] == [("again", alone)] * 3


def test_a_group_that_all_have_left_is_let_go(loop):
    """Once its lane has told what it has read."""
    leader = leading(is_plain=False)
    leader.results["step"] = (b"data", 1, None)
    group, (one,) = group_of(loop, leader=leader)
    one.terms.lanes.reads.began = 0.0
    group.turn()
    group.remove(one)
    assert not group.is_empty
    loop.run()
    leader.take()
    loop.run()
    assert leader.calls == [("withdraw",)]
    assert group.is_empty
    assert loop.calls == []


# Sending.


@pytest.mark.parametrize("is_chunked", [False, True])
def test_what_was_not_taken_is_sent_later(loop, clock, is_chunked):
    """To each its own rest; who has gone is ended."""
    group, clients = group_of(loop, 5, is_chunked=is_chunked)
    framed = b"4\r\ndata\r\n" if is_chunked else b"data"
    rest = [(1, 3), (2, 0), (3, -errno.EAGAIN), (4, -errno.EPIPE)]
    loop.sender.results["send_to_all"] = rest
    clock.now = 1001.0
    group.send(b"data", 1)
    assert loop.sender.calls == [("send_to_all", group.clients, framed)]
    assert [*group.clients] == [1, 2, 3, 4, 5]
    assert group.moved == 1001.0
    lags = [(name, one, bytes(left)) for name, one, left in loop.take()]
    assert lags == [
        ("lag", clients[0], framed[3:]),
        ("lag", clients[1], framed),
        ("lag", clients[2], framed),
    ]
    assert loop.ends.calls == [("hung_up", clients[3])]
    loop.sender.results["send_to_all"] = [(1, -errno.ENOBUFS)]
    group.send(b"data")
    assert loop.take()[0][:2] == ("lag", clients[0])
    assert (group.events, group.bytes) == (1, 8)


def test_a_sender_that_raises_cuts_its_clients(loop):
    """What they got is unknown; another sender takes its place."""
    group, _ = group_of(loop, 2)
    error = OSError("no results")
    loop.sender.results["send_to_all"] = error
    group.send(b"data", 1)
    assert loop.calls == [("cut", group, error), ("replace_sender",)]


def test_a_client_that_cannot_be_moved_is_cut_alone(loop):
    group, clients = group_of(loop, 2)
    error = loop.ends.results["hung_up"] = MemoryError()
    loop.sender.results["send_to_all"] = [(1, -errno.EPIPE), (2, -errno.EPIPE)]
    group.send(b"data", 1)
    assert loop.calls == [("cut", one, error) for one in clients]


# Its times.


def test_a_keepalive_is_due_after_silence(loop, clock):
    """Just then; what is sent in between begins the time anew."""
    group, (one,) = group_of(loop, keepalive=10.0, comment=b":\n")
    assert group.next_time() == 1010.0
    group.due(1009.5)
    assert loop.sender.calls == []
    assert loop.wheel.take() == [("add", group, 1010.0)]
    clock.now = 1010.0
    group.due(1010.0)
    assert loop.sender.take() == [("send_to_all", {1: one}, b":\n")]
    assert loop.wheel.take() == [("add", group, 1020.0)]
    one.rest = memoryview(b"x")  # no comment falls into a chunk
    group.due(1020.0)
    assert loop.sender.calls == []
    assert group.next_time() == 1030.0
    del group.clients[1]
    loop.wheel.take()
    group.due(2000.0)
    assert loop.sender.calls == loop.wheel.calls == []


def test_without_a_keepalive_nothing_is_due(loop):
    group, _ = group_of(loop)
    assert group.next_time() == math.inf
    group.due(1e9)
    assert loop.sender.calls == []
    assert loop.wheel.calls == [("add", group, math.inf)]


def test_its_beginning_may_be_earlier(loop):
    """That of a client whose head was sent before."""
    one = client(loop, subscription(), keepalive=10.0)
    assert Group(loop, leading(), one, moved=995.0).next_time() == 1005.0
    assert Group(loop, leading(), one).next_time() == 1010.0


def test_a_lane_that_hangs_is_waited_for_no_longer(loop, clock):
    """Its time begins when the lane has begun what was before it."""
    leader = leading(is_plain=False)
    group, clients = group_of(loop, 2, leader=leader, key="place", keepalive=None)
    lane = clients[0].terms.lanes.reads
    lane.began = 900.0
    group.turn()
    assert group.next_time() == 1000.0 + STUCK
    lane.began = 1030.0
    assert group.next_time() == 1030.0 + STUCK
    group.due(1030.0 + STUCK - 0.5)
    assert loop.ends.calls == []
    group.due(1030.0 + STUCK)
    assert loop.ends.calls == [("end", one, "error") for one in clients]
    (said,) = clients[0].terms.lanes.said
    assert said.startswith("events for 2 subscribers could not be read within 60 s")
