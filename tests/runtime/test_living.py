"""`Living`: objects that come and go while others look at them."""

import gc
import sys

import pytest

from syncstream.runtime.living import Living


class Thing:
    pass


class Between:
    """Calls a function before each bytecode of what is called: threads switch there."""

    def __init__(self, function):
        self.function = function

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.called)

    def __exit__(self, *error):
        sys.settrace(self.before)

    def called(self, frame, event, argument):
        frame.f_trace_opcodes = True
        return self.step

    def step(self, frame, event, argument):
        self.function()
        return self.step


@pytest.mark.parametrize("what", ["come", "go"])
def test_others_may_come_and_go_meanwhile(what):
    """Whatever other threads add or drop in between, those that stay are found."""
    all_of_them = Living()
    stay = [Thing() for _ in range(3)]
    others = [Thing() for _ in range(1000)] if what == "go" else []
    for one in (*stay, *others):
        all_of_them.add(one)
    del one

    def change():
        if what == "come":
            others.append(Thing())
            all_of_them.add(others[-1])
        elif others:
            others.pop()

    before = len(others)
    with Between(change):
        found = all_of_them.all()
    assert len(others) != before
    assert set(stay) <= set(found)


def test_it_keeps_none_alive():
    """What is dropped is gone, even in a cycle, and what has its address is new."""
    all_of_them, stays = Living(), Thing()
    all_of_them.add(stays)
    for _ in range(100):
        one = Thing()
        one.me = one
        all_of_them.add(one)
    del one
    gc.collect()
    assert all_of_them.all() == [stays]
