"""`Client`: what it does when it is woken, told, due, and at its end."""

import math
from types import SimpleNamespace

import pytest

from syncstream.channels import limits
from syncstream.fanout import client as client_module
from syncstream.runtime.sockets import GRACE
from tests.fanout.alone import Loop, Recorder, client, subscription


@pytest.fixture
def loop():
    return Loop()


def test_a_connection_has_one_owner(loop):
    """The loop, or whoever has failed to add it: the first that asks."""
    one = client(loop, subscription())
    assert one.claim() is True
    assert one.claim() is False
    assert one.is_given
    one.terms.served.parked.clear()
    assert not one.is_given
    one.reason = "closed"
    assert one.is_given


def test_news_before_the_loop_has_it(loop):
    """Events or an end: either makes the loop look."""
    one = client(loop, subscription())
    assert not one.has_news
    assert one.wake() is True
    assert loop.run() == [one]
    assert one.was_woken
    assert one.has_news
    one.was_woken, one.early = False, "closed"
    assert one.has_news
    one.reason = "closed"
    assert one.wake() is True
    one.turn()
    assert loop.calls == loop.ends.calls == []


@pytest.mark.parametrize(("reason", "told"), [("kicked", "kicked"), ("own", "closed")])
def test_the_end_of_a_subscription_is_its_own(loop, reason, told):
    """An unknown word is none for the log."""
    one = client(loop, subscription(reason=reason))
    one.turn()
    assert loop.ends.calls == [("end", one, told)]
    assert not one.was_woken


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_shared_group_has_turns_of_its_own(loop, is_shared):
    """Its leader is woken; a client alone takes its turn itself."""
    one = client(loop, subscription())
    one.group = Recorder()
    one.group.is_shared = is_shared
    one.turn()
    assert one.group.calls == [("turn",)] * (not is_shared)
    assert not one.was_woken


def test_a_callback_comes_to_the_others_or_is_called(loop):
    """Called, once the client has ended."""
    one = client(loop, subscription(), callbacks=(len,))
    one.on_close(repr)
    assert loop.run() == [one]
    assert one.callbacks == (len, repr)
    one.reason = "closed"
    one.on_close(str)
    loop.run()
    assert one.callbacks == (len, repr)
    assert one.terms.lanes.users.calls == [("do", str)]
    one.stop("kicked")
    loop.run()
    assert loop.ends.calls == [("end", one, "kicked")]


@pytest.mark.parametrize("by_queue", [False, True])
def test_who_takes_nothing_for_its_time_is_stuck(loop, monkeypatch, by_queue):
    """Just then; each byte that it takes begins the time anew."""
    taken = SimpleNamespace(bytes=100)
    for name, is_it in (("acknowledged", not by_queue), ("queued", by_queue)):
        read = (lambda fd: taken.bytes) if is_it else (lambda fd: None)
        monkeypatch.setattr(client_module, name, read)
    one = client(loop, subscription(), send_timeout=8.0)
    one.since = 1000.0
    assert not one.is_stuck(1001.0)
    assert (one.since, one.acknowledged) == (1000.0, 100)
    assert not one.is_stuck(1007.5)
    assert one.is_stuck(1008.0)
    taken.bytes = 101
    assert not one.is_stuck(1008.0)
    assert one.since == 1008.0
    taken.bytes = None  # nobody knows: as if it had taken nothing
    assert not one.is_stuck(1015.5)
    assert one.is_stuck(1016.0)
    one.acknowledged, taken.bytes = None, 7
    assert not one.is_stuck(1100.0)  # we stood still: half of its time is left
    assert one.since == 1096.0
    assert not client(loop, subscription(), send_timeout=None).is_stuck(1e9)


@pytest.fixture
def given_up(monkeypatch):
    calls = []
    monkeypatch.setattr(
        client_module, "give_up_after", lambda *args: calls.append(args)
    )
    return calls


def test_its_next_time_is_the_first_of_all(loop):
    asked = subscription(ask_again_at=30.0)
    one = client(loop, asked, deadline=40.0)
    one.settles_at = 20.0
    assert one.next_time() == 20.0
    one.settles_at = math.inf
    assert one.next_time() == 30.0
    asked.ask_again_at = math.inf
    assert one.next_time() == 40.0


def test_it_settles_once(loop, given_up):
    """Then the kernel knows for how long it may take nothing."""
    one = client(loop, subscription(), send_timeout=8.0, deadline=40.0)
    one.settles_at = 20.0
    one.due(19.5)
    assert given_up == []
    one.due(20.0)
    one.due(21.0)
    assert given_up == [(-1, 8.0 + GRACE)]
    assert loop.wheel.calls == [("add", one, 20.0), *[("add", one, 40.0)] * 2]


@pytest.mark.parametrize("asked_at", [math.inf, 30.0])
def test_it_ends_at_its_deadline(loop, asked_at):
    """Whatever else it is due for."""
    one = client(loop, subscription(ask_again_at=asked_at), deadline=40.0)
    one.due(40.0)
    assert loop.ends.calls == [("end", one, "max_duration")]
    assert loop.wheel.calls == loop.calls == []
    one.reason = "max_duration"
    one.due(50.0)
    assert len(loop.ends.calls) == 1


def test_authorize_is_asked_again_at_its_time(loop):
    """Its answer is looked for four times, and then it is denied."""
    asked = subscription(ask_again_at=30.0)
    one = client(loop, asked, deadline=200.0)
    one.due(29.5)
    assert loop.wheel.take() == [("add", one, 30.0)]
    assert one.answer_by is None
    one.due(30.0)
    assert one.answer_by == 30.0 + limits.ANSWER
    (job,) = loop.take()
    assert job[:2] == ("do", one.terms.lanes.asks)
    assert loop.wheel.take() == [("add", one, 30.0 + limits.ANSWER / 4)]
    one.due(32.0)
    assert one.terms.lanes.asks.take() == [("hurry",)]
    assert loop.wheel.take() == [("add", one, 32.0 + limits.ANSWER / 4)]
    one.due(34.5)
    assert loop.wheel.take() == [("add", one, 30.0 + limits.ANSWER)]
    one.deadline = 34.75
    one.due(34.5)
    assert loop.wheel.take() == [("add", one, 34.75)]
    one.deadline = 200.0
    assert loop.ends.calls == one.terms.lanes.said == []
    one.due(35.0)
    assert loop.ends.take() == [("end", one, "denied")]
    (said,) = one.terms.lanes.said
    assert said.startswith("authorize of GET '/a' has not answered within 5 s")
    assert loop.wheel.calls == []
    one.answer_by = None
    loop.take()
    one.deadline = 30.25
    one.due(30.0)
    assert loop.wheel.take() == [("add", one, 30.25)]


def test_an_answer_in_time_lets_it_go_on(loop):
    """It is due at its next time, and looks for what has come."""
    given = []
    asked = subscription(ask_again_at=30.0)
    one = client(loop, asked, before_wait=(lambda: given.append(1),))
    one.due(30.0)
    loop.wheel.take()
    asked.ask_again_at = 90.0
    assert loop.run() == [one]
    assert asked.calls == [("ask",)]
    assert given == [1]
    assert loop.run() == [one]
    assert one.answer_by is None
    assert loop.wheel.calls == [("add", one, 90.0)]
    assert one.was_woken


def test_an_answer_that_comes_too_late_changes_nothing(loop):
    """Nor is one asked for that has ended."""
    asked = subscription(ask_again_at=30.0)
    one = client(loop, asked)
    one.due(30.0)
    loop.run()
    one.reason = "denied"
    loop.wheel.take()
    loop.run()
    assert loop.wheel.calls == []
    assert one.answer_by == 35.0
    other = client(loop, asked)
    other.due(30.0)
    other.reason = "closed"
    asked.take()
    loop.run()
    assert asked.calls == loop.calls == []


@pytest.mark.parametrize("error", [ZeroDivisionError(), SystemExit()])
def test_an_authorize_that_raises_is_its_end(loop, error):
    given = []
    asked = subscription(ask_again_at=30.0)
    asked.results["ask"] = error
    one = client(loop, asked, before_wait=(lambda: given.append(1),))
    one.due(30.0)
    loop.run()
    assert given == [1]
    loop.run()
    assert loop.ends.calls == [("fail", one, error)]


# Its end.


def test_its_end_is_counted_and_told(loop, monkeypatch):
    """Once, by what it was from its beginning; then nothing of it is left."""
    monkeypatch.setattr(
        client_module, "time", SimpleNamespace(monotonic=lambda: 1000.0)
    )
    told, place, ended = [], Recorder(), subscription()
    one = client(
        *(loop, ended),
        **{"began": 990.0, "events": 3, "bytes": 70, "place": place},
        callbacks=(lambda: told.append(1), lambda: 1 / 0, lambda: told.append(2)),
        before_wait=(lambda: told.append("given back"),),
    )
    one.reason = "kicked"
    one.leave()
    lanes = one.terms.lanes
    assert place.calls == [("release",)]
    assert one.terms.process.calls == [("count", "kicked", 10.0, 3, 70)]
    assert ended.calls == [("part", "kicked"), ("detach", None)]
    assert one in one.terms.served.parked
    assert lanes.said == lanes.reads.calls == []
    ((_, job),) = lanes.users.take()
    job()
    assert told == [1, 2, "given back"]
    assert one.callbacks == ()
    assert one.terms.served.parked == set()
    assert lanes.said == [
        "an on_close callback of GET '/a' failed",
        "GET '/a' ended: kicked, 10.000 s, 3 events, 70 bytes",
    ]


def test_a_leave_is_announced_by_a_lane(loop):
    """A broker may be slow, and it counts as open until then."""
    one = client(loop, subscription(announcement="{}"))
    one.reason = "closed"
    one.leave()
    assert one.feed.calls == []
    assert one in one.terms.served.parked
    ((_, job),) = one.terms.lanes.reads.take()
    job()
    assert one.feed.calls == [("part", "closed"), ("detach", None)]
    assert one not in one.terms.served.parked
    assert one.terms.lanes.users.calls == []
    assert len(one.terms.lanes.said) == 1


@pytest.mark.parametrize("error", [None, MemoryError()])
def test_what_the_broker_is_told_is_told_by_a_lane(loop, error):
    """It may be slow, and holds up neither the loop nor the client's end."""
    one, told = client(loop, subscription()), []
    one.feed.results["part"] = lambda: told.append("idle")
    one.terms.lanes.ends.results["do"] = error
    one.reason = "closed"
    one.leave()
    assert told == []
    ((_, rest),) = one.terms.lanes.ends.take()
    rest()
    assert told == ["idle"]
    assert one.terms.served.parked == set()
    assert ("detach", None) in one.feed.calls


def broken(name, error):
    """Return a client one part of which fails at its end."""
    found = subscription(announcement="{}" if name == "reads" else None)
    one = client(
        *(Loop(), found), place=Recorder(), callbacks=(len,) if name == "users" else ()
    )
    lane = {"reads": one.terms.lanes.reads, "users": one.terms.lanes.users}.get(name)
    if lane is not None:
        lane.results["do"] = error
    elif name == "process":
        one.terms.process.results["count"] = error
    elif name == "place":
        one.place.results["release"] = error
    else:
        found.results[name] = error
    return one


@pytest.mark.parametrize("error", [MemoryError(), SystemExit()])
@pytest.mark.parametrize(
    "name", ["place", "process", "part", "detach", "reads", "users"]
)
def test_whatever_fails_it_has_left(name, error):
    """Its place is free, it is counted, and counts as open no more."""
    one = broken(name, error)
    one.reason = "closed"
    one.leave()
    assert one.place.calls == [("release",)]
    assert len(one.terms.process.calls) == 1
    assert one.terms.served.parked == set()
    assert [text for text in one.terms.lanes.said if "ended: closed" in text]


@pytest.mark.parametrize("lane", ["reads", "users"])
def test_a_job_of_its_end_that_fails_is_its_end(lane):
    """As out of memory: it counts as open no more."""
    one = client(
        *(Loop(), subscription(announcement="{}" if lane == "reads" else None)),
        callbacks=(len,) if lane == "users" else (),
    )
    one.reason = "closed"
    one.leave()
    assert one in one.terms.served.parked
    ((_, job),) = getattr(one.terms.lanes, lane).take()
    job.failed(MemoryError())
    assert one.terms.served.parked == set()


def test_a_hook_that_fails_hinders_no_other(loop):
    given = []
    hooks = (lambda: 1 / 0, lambda: given.append(1))
    one = client(loop, subscription(), before_wait=hooks)
    one.terms.give_back()
    assert given == [1]
    assert one.terms.lanes.said == [
        "a before_wait hook failed: connections may stay occupied"
    ]
