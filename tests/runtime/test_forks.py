"""What belongs to one process, in the child of a child that has its pid."""

import subprocess
import sys

import pytest

FORKS = {
    "seen": "os.fork",
    "unseen": "ctypes.PyDLL(None).fork",  # as uWSGI's
}
SCRIPT = """
import ctypes, os, threading
from syncstream.brokers.memory import MemoryBroker
from syncstream.brokers.process import PerProcess
from syncstream.runtime.journal import journal
from syncstream.runtime.process import process
from syncstream.runtime.watch import watch

class Broker:
    def __init__(self):
        self.parts = PerProcess(self, lambda part: None)
    def part(self):
        return self.parts.get() or self.parts.begin(object())

def is_done(by):
    done = threading.Event()
    by(done.set)
    return done.wait(15)

def check(pid, before):
    os.getpid = lambda: pid
    found = records()
    assert not [one for one in found if one in before], (found, before)
    assert is_done(journal().do)
    assert is_done(lambda call: watch().call_at(0, call))
    assert process().stats() == {"open": 0, "ended": {}}
    assert memory.read("a", None).head != head

broker, memory = Broker(), MemoryBroker()
records = lambda: [journal(), process(), watch(), broker.part()]
parent, before = os.getpid(), records()
process().count("finished")
memory.publish([("a", b"1")])
head = memory.read("a", None).head
is_done(journal().do)
child = FORK()
if not child:
    status = 1
    try:
        if "FORK" != "os.fork":
            records()  # Python learns of its fork by the pid
        childs = FORK()
        if not childs:
            check(parent, before)
            os._exit(0)
        status = os.waitpid(childs, 0)[1]
    finally:
        os._exit(bool(status))
assert os.waitpid(child, 0)[1] == 0
assert records() == before
os._exit(0)
"""


@pytest.mark.parametrize("fork", FORKS)
def test_a_child_with_the_pid_of_a_dead_ancestor(fork):
    """It has nothing of that process's: its threads are not here."""
    script = SCRIPT.replace("FORK", FORKS[fork])
    command = [sys.executable, "-W", "ignore", "-c", script]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
