"""What a broker has in each process."""

import subprocess
import sys
import threading

import pytest

from syncstream.brokers.process import PerProcess

FORKS = {
    "seen": "os.fork",
    "unseen": "ctypes.PyDLL(None).fork",  # as uWSGI's
}
CHILD = """
import ctypes, os, sys
from syncstream.brokers.process import PerProcess
class Broker:
    def __init__(self, *forget):
        self.parts = PerProcess(self, self.log("dropped"), *forget)
    @staticmethod
    def log(word):
        return lambda part: print(word, part, flush=True)
"""


def run(program, fork):
    text = CHILD + program.replace("FORK", FORKS[fork])
    ran = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


class Broker:
    def __init__(self, drop):
        self.parts = PerProcess(self, drop)


def test_a_process_has_one_part():
    """Of several threads that begin one, all get the same."""
    broker = Broker(print)
    assert broker.parts.get() is None
    barrier, found = threading.Barrier(8), []

    def begin():
        barrier.wait()
        found.append(broker.parts.begin(object()))

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {broker.parts.get()}
    assert broker.parts.end() is found[0]
    assert broker.parts.get() is broker.parts.end() is None


def test_a_dropped_brokers_part_is_dropped():
    """It is told to end, at once; one that was ended is not, nor one never begun."""
    dropped = []
    broker = Broker(dropped.append)
    broker.parts.begin("it")
    del broker
    assert dropped == ["it"]
    ended, unused = Broker(dropped.append), Broker(dropped.append)
    ended.parts.begin("none")
    ended.parts.end()
    del ended, unused
    assert dropped == ["it"]


@pytest.mark.parametrize("fork", FORKS)
def test_a_child_forgets_its_parents(fork):
    """It is told what that was, once, and begins its own; the parent keeps its own."""
    program = """
broker = Broker(lambda broker, part: print("forgot", part, flush=True))
broker.parts.begin("the parent's")
child = FORK()
if not child:
    print(broker.parts.get(), broker.parts.begin("the child's"), flush=True)
    print(broker.parts.get(), flush=True)
    del broker
    os._exit(0)
os.waitpid(child, 0)
print(broker.parts.get(), flush=True)
os._exit(0)
"""
    assert run(program, fork) == [
        "forgot the parent's",
        "None the child's",
        "the child's",
        "dropped the child's",
        "the parent's",
    ]


def test_a_fork_is_told_of_without_a_part():
    """The broker itself may have locks that another thread has held."""
    program = """
broker = Broker(lambda broker, part: print("forgot", part, flush=True))
child = FORK()
if not child:
    os._exit(0)
os.waitpid(child, 0)
"""
    assert run(program, "seen") == ["forgot None"]


@pytest.mark.parametrize("fork", FORKS)
def test_a_part_that_nobody_forgets_is_kept_untouched(fork):
    """In a child it is not ended: to drop it may close what the parent has, too."""
    program = """
class Part:
    def __del__(self):
        print("collected", flush=True)
broker = Broker()
broker.parts.begin(Part())
child = FORK()
if not child:
    print(broker.parts.get(), broker.parts.begin("the child's"), flush=True)
    print(broker.parts.end(), broker.parts.get(), flush=True)
    os._exit(0)
os.waitpid(child, 0)
print("in the parent", flush=True)
os._exit(0)
"""
    assert run(program, fork) == [
        "None the child's",
        "the child's None",
        "in the parent",
    ]
