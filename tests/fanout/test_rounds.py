"""The rounds of a loop, and their failures."""

import pytest

from syncstream.fanout import loop as loop_module
from syncstream.runtime.journal import journal
from syncstream.runtime.watch import native_epoll
from tests.support.waits import await_true


class Epoll:
    """An epoll object that can be made to fail."""

    def __init__(self):
        self.error, self.events = None, []
        self._real = native_epoll()()

    def poll(self, pause, most):
        if self.error is not None:
            raise self.error
        return [*self._real.poll(0 if self.events else pause, most), *self.events]

    def __getattr__(self, name):
        return getattr(self._real, name)


@pytest.fixture
def own(monkeypatch):
    """A loop of its own, which may be ended, and its epoll object."""
    made = []

    def make():
        made.append(Epoll())
        return made[0]

    monkeypatch.setattr(loop_module, "native_epoll", lambda: make)
    loop = loop_module.Fanout()
    yield loop, made[0]
    made[0].error, made[0].events = None, []
    loop.quit()
    made[0].close()


FAILED = "the subscribers' loop failed, and goes on"


def count_failures(caplog):
    journal().flush()
    return [record.message for record in caplog.records].count(FAILED)


def test_what_a_loop_was_told_is_done_though_it_ends(own, caplog):
    """By its end at the latest, and at once from then on."""
    (loop, epoll), called = own, []
    loop.call(lambda: called.append("before"))
    await_true(lambda: called == ["before"])
    epoll.error = OSError("no memory")
    loop.call(lambda: None)
    await_true(lambda: FAILED in caplog.text)
    loop.call(lambda: 1 / 0)
    loop.call(lambda: called.append("last"))
    await_true(lambda: called == ["before", "last"])
    await_true(lambda: loop.state == "dead")
    loop.call(lambda: called.append("after"))
    assert called[2:] == ["after"]
    await_true(lambda: "the subscribers' loop has ended: 0 clients" in caplog.text)
    assert count_failures(caplog) == 10


def test_a_loop_ends_after_ten_failures_in_a_row(own, caplog):
    """Not after nine, and nine more: in between it worked."""
    (loop, epoll), called = own, []

    class Some(list):
        """Events of which one cannot be read, for so many rounds."""

        def __iter__(self):
            return iter([self.pop()] if self else [])

    for count in (9, 1, 9):
        epoll.events = Some([(None,)] * count)
        loop.call(lambda: None)
        await_true(lambda: not epoll.events)
        called.clear()
        loop.call(lambda: called.append("works"))
        await_true(lambda: called)
    assert loop.state == "running"
    assert count_failures(caplog) == 19


def test_a_duty_that_fails_hinders_no_other(own, caplog):
    """Of one round: the loop's calls are made while it lasts."""
    (loop, epoll), states = own, []
    epoll.events = [(None,)]
    loop.call(lambda: states.append(loop.state))
    await_true(lambda: states)
    assert states == ["running"]
    epoll.events = []


def test_what_is_guarded_raises_nothing(own, caplog):
    """It concerns its owner alone, which is cut."""
    loop, _ = own
    loop.guard(None, lambda: 1 / 0)
    text = "the loop of the subscribers failed: 0 of them are cut"
    await_true(lambda: text in caplog.text)
