"""`Ends`: the end of a client, once, in steps of which each is tried."""

import os
import socket
import threading

import pytest

from syncstream.errors import Closed
from syncstream.fanout import ends as ends_module
from syncstream.fanout.client import Client
from syncstream.fanout.ends import Ends
from syncstream.runtime.journal import journal
from tests.fanout.alone import Loop, Recorder, client, subscription


class World:
    """A client that the loop has, and all that knows of it."""

    def __init__(self):
        self.near, self.far = socket.socketpair()
        self.near.setblocking(False)
        self.client = client(Loop(), subscription(), is_chunked=True)
        self.client.fd = fd = self.near.detach()
        self.group = self.client.group = Recorder()
        self.group.clients = {fd: self.client, -7: None}
        self.clients, self.lagging = {fd: self.client}, {fd: self.client}
        self.epoll, self.wheel, self.meeting = Recorder(), Recorder(), Recorder()
        self.ends = Ends(
            *(self.clients, self.lagging, self.epoll, self.wheel, self.meeting)
        )

    def close(self):
        self.far.close()
        if self.client.reason is None:
            os.close(self.client.fd)


@pytest.fixture
def world():
    world = World()
    yield world
    world.close()


def is_over(world):
    """Tell whether nothing knows of the client any more, and it is on its way out."""
    fd = world.client.fd
    assert fd not in world.clients
    assert fd not in world.lagging
    assert fd not in world.group.clients
    assert world.epoll.calls == [("unregister", fd)]
    assert world.wheel.calls == [("remove", world.client)]
    assert world.group.calls == [("left", world.client)]
    assert world.client.rest is None
    assert [name for name, *_ in world.client.terms.process.calls] == ["count"]
    assert world.far.recv(1 << 16) in (b"", b"0\r\n\r\n")
    return True


def test_an_end_is_its_only_one(world):
    """Of several, the first says why."""
    world.ends.end(world.client, "kicked")
    assert world.client.reason == "kicked"
    world.ends.end(world.client, "closed")
    world.ends.fail(world.client, LookupError())
    world.ends.cut(world.client)
    assert world.client.reason == "kicked"
    assert b"retry: " in world.far.recv(1 << 16)
    (said,) = world.client.terms.lanes.said
    assert said.startswith("GET '/a' ended: kicked, ")
    assert len(world.client.terms.process.calls) == 1


@pytest.mark.parametrize(
    ("error", "reason", "is_said"),
    [
        (Closed("kicked"), "kicked", False),
        (Closed("own"), "closed", False),
        (LookupError("broken"), "error", True),
    ],
)
def test_what_it_fails_by_is_its_reason(world, error, reason, is_said):
    """The word of a `Closed`, if it is a known one."""
    world.ends.fail(world.client, error)
    assert world.client.reason == reason
    ended, *said = world.client.terms.lanes.said
    assert ended.startswith(f"GET '/a' ended: {reason}, ")
    assert said == ["the source of GET '/a' failed"] * is_said


@pytest.mark.parametrize("is_error", [False, True])
@pytest.mark.parametrize("has_timed_out", [False, True])
def test_who_hangs_up_has_left_or_was_given_up(
    world, monkeypatch, is_error, has_timed_out
):
    """The kernel tells which, where there is an error."""
    monkeypatch.setattr(ends_module, "has_timed_out", lambda fd: has_timed_out)
    world.ends.hung_up(world.client, is_error=is_error)
    is_slow = has_timed_out and is_error
    assert world.client.reason == ("send_timeout" if is_slow else "disconnected")
    assert is_over(world)


def test_an_end_before_the_loop_has_it_waits(world):
    """The first one; it is cut only if its descriptor is the loop's already."""
    one, world.client.group = world.client, None
    world.ends.end(one, "kicked")
    world.ends.end(one, "closed")
    assert (one.early, one.reason) == ("kicked", None)
    one.terms.served.parked.clear()
    world.ends.cut(one)
    assert (one.early, one.reason) == ("error", None)
    one.terms.served.parked.add(one)
    world.ends.cut(one)
    assert one.reason == "error"
    assert world.group.calls == []
    assert world.clients == world.lagging == {}


def test_the_number_of_another_client_is_not_forgotten(world):
    """It may have the descriptor's number by now."""
    other, fd = object(), world.client.fd
    world.clients[fd] = world.lagging[fd] = other
    world.ends.end(world.client, "closed")
    assert world.clients == world.lagging == {fd: other}


class FailsToLeave(Client):
    """As out of memory, in the loop's thread."""

    __slots__ = ()

    def leave(self):
        if threading.current_thread() is threading.main_thread():
            raise MemoryError
        super().leave()


@pytest.mark.parametrize("part", ["epoll", "wheel", "group", "goodbye", "leave"])
def test_a_step_that_fails_hinders_no_other(world, part, monkeypatch, caplog):
    """All are tried; an error of epoll's is none: it knows of closed descriptors."""
    one, error = world.client, MemoryError()
    if part == "epoll":
        world.epoll.results["unregister"] = OSError()
    elif part == "wheel":
        world.wheel.results["remove"] = error
    elif part == "group":
        world.group.results["left"] = error
    elif part == "leave":
        one.__class__ = FailsToLeave
    else:
        world.ends.end(one, "disconnected")  # says no goodbye
        assert is_over(world)
        return
    world.ends.end(one, "max_duration")
    assert one.reason == "max_duration"
    assert world.clients == world.lagging == {}
    assert world.wheel.calls == [("remove", one)]
    assert world.group.calls == [("left", one)]
    assert b"retry: " in world.far.recv(1 << 16)
    journal().flush()
    assert len(one.terms.process.calls) == 1
    said = ["the end of GET '/a' failed"] * (part != "epoll")
    assert [record.message for record in caplog.records] == said
    assert world.meeting.calls == []
    # Its place must not stay taken: another thread has tried again.
    assert one.terms.process.calls[0][:2] == ("count", "max_duration")
    assert one.terms.served.parked == set()


def test_an_empty_group_that_failed_is_forgotten(world):
    world.group.results["left"] = MemoryError()
    del world.group.clients[-7]
    world.ends.end(world.client, "closed")
    assert world.meeting.calls == [("forget", world.group)]
