"""`Meeting`: who joins whom, and how one leaves."""

import pytest

from syncstream.fanout.group import Group
from syncstream.fanout.meeting import Meeting
from tests.fanout.alone import Loop, client, lanes, subscription


class Own(Loop):
    """A loop whose meeting is the one under test."""

    def __init__(self):
        super().__init__()
        self.meeting = Meeting(self)


@pytest.fixture
def loop():
    return Own()


SHARED = lanes()


def alone(loop, fd, *, place=1, kind="a", **options):
    """Return the group of one client, at a place."""
    found = subscription(is_plain=True, has_user_code=False, kind=(kind,), place=place)
    found.is_where = lambda other: found.place == other.place
    found.results["poll"] = (b"", 0, True)

    def twin():
        leader = subscription(is_plain=True, has_user_code=False, place=found.place)
        leader.is_where = lambda other: leader.place == other.place
        leader.results["poll"] = (b"", 0, True)
        return leader

    found.twin = twin
    one = client(loop, found, **{"lanes": SHARED} | options)
    one.fd = fd
    group = Group(loop, found, one)
    group.add(one)
    return group


def groups(loop):
    return [sorted(group.clients) for group in loop.meeting.groups.values()]


def test_who_is_at_one_place_is_one_group(loop):
    """The second one makes it; the first is alone until then."""
    made = [alone(loop, fd) for fd in (1, 2, 3)]
    clients = [client for group in made for client in group.clients.values()]
    loop.meeting.join(made[0])
    assert groups(loop) == [[1]]
    assert not made[0].is_shared
    loop.meeting.join(made[0])
    assert groups(loop) == [[1]]
    loop.meeting.join(made[1])
    assert groups(loop) == [[1, 2]]
    loop.meeting.join(made[2])
    assert groups(loop) == [[1, 2, 3]]
    (shared,) = loop.meeting.groups.values()
    assert shared.is_shared
    assert {one.group for one in clients} == {shared}
    assert [one.feed.calls[-1] for one in clients] == [("lean_on", shared.leader)] * 3
    assert shared.leader.calls[0] == ("detach", shared)
    assert all(group.is_empty for group in made)


@pytest.mark.parametrize(
    "other",
    [
        {"kind": "b"},
        {"is_chunked": True},
        {"keepalive": 1.0},
        {"comment": b":\n"},
        {"lanes": lanes()},
    ],
    ids=lambda other: next(iter(other)),
)
def test_who_differs_is_not_of_that_group(loop, other):
    """In the channel or the tags, the framing, the comments, or the lanes."""
    loop.meeting.join(alone(loop, 1))
    loop.meeting.join(alone(loop, 2, **other))
    assert groups(loop) == [[1], [2]]


def test_who_is_elsewhere_takes_the_name(loop):
    """The one before is not waited for: it will come to the newer place."""
    loop.meeting.join(alone(loop, 1, place=1))
    second = alone(loop, 2, place=2)
    loop.meeting.join(second)
    assert groups(loop) == [[2]]
    third = alone(loop, 3, place=2)
    loop.meeting.join(third)
    assert groups(loop) == [[2, 3]]
    late = alone(loop, 4, place=1)
    loop.meeting.join(late)
    assert groups(loop) == [[2, 3]]
    assert late.clients


def test_who_lags_or_is_of_a_kind_of_its_own_stays_alone(loop):
    group = alone(loop, 1)
    (one,) = group.clients.values()
    one.rest = memoryview(b"x")
    loop.meeting.join(group)
    one.rest, one.feed.is_plain = None, False
    loop.meeting.join(group)
    assert groups(loop) == []
    one.feed.is_plain = True
    loop.meeting.join(group)
    assert groups(loop) == [[1]]


def test_who_parts_goes_on_from_the_same_place(loop):
    """The last one's group is forgotten."""
    made = [alone(loop, fd) for fd in (1, 2)]
    clients = [client for group in made for client in group.clients.values()]
    for group in made:
        loop.meeting.join(group)
    (shared,) = loop.meeting.groups.values()
    for one in clients:
        own = loop.meeting.part(one)
        assert one.group is own
        assert not own.is_shared
        assert own.leader is one.feed
        assert one.feed.calls[-1] == ("go_where", shared.leader)
    assert groups(loop) == []
    assert shared.leader.calls[-1] == ("detach", None)
    assert loop.wheel.calls.count(("remove", shared)) == 1


def test_a_group_that_a_lane_reads_for_is_let_go_later(loop):
    """By what the lane tells; nobody finds it any more."""
    made = [alone(loop, fd) for fd in (1, 2)]
    for group in made:
        loop.meeting.join(group)
    (shared,) = loop.meeting.groups.values()
    shared.is_asking = True
    for one in [*shared.clients.values()]:
        shared.remove(one)
    assert groups(loop) == []
    assert ("detach", None) not in shared.leader.calls


def test_another_group_of_that_name_stays(loop):
    first, second = alone(loop, 1), alone(loop, 2, place=2)
    loop.meeting.join(first)
    loop.meeting.join(second)
    loop.meeting.forget(first)
    assert groups(loop) == [[2]]


def test_an_empty_group_is_nobodys_place(loop):
    """It was left by a failure."""
    first = alone(loop, 1)
    loop.meeting.join(first)
    first.clients.clear()
    second = alone(loop, 2)
    loop.meeting.join(second)
    assert groups(loop) == [[2]]
    assert not second.is_shared


def test_a_move_that_fails_cuts_its_client(loop):
    """The others go on; a group that nobody has come to is forgotten."""
    first, second = alone(loop, 1), alone(loop, 2)
    (one,) = second.clients.values()
    error = one.feed.results["lean_on"] = MemoryError()
    loop.meeting.join(first)
    loop.meeting.join(second)
    assert groups(loop) == [[1]]
    assert loop.calls[-1] == ("cut", one, error)


def test_the_first_that_cannot_be_moved_leaves_no_group(loop):
    first, second = alone(loop, 1), alone(loop, 2)
    (one,) = first.clients.values()
    error = one.feed.results["lean_on"] = MemoryError()
    loop.meeting.join(first)
    loop.meeting.join(second)
    assert ("cut", one, error) in loop.calls
    assert all(fds != [1] for fds in groups(loop))
