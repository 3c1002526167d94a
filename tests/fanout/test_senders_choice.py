"""Which sender is opened, on each machine and behind each filter."""

import contextlib
import ctypes
import errno
import io
import os
import re
import struct
import sys

import pytest

from syncstream.fanout import sender as sender_module
from syncstream.fanout.sender import open_sender
from tests.fanout.sending import CALLED, aio
from tests.support.pairs import check_script

pytestmark = pytest.mark.usefixtures("no_variable")


@aio
def test_aio_is_chosen():
    """Where it works; it has os.write for the few."""
    with contextlib.closing(open_sender()) as sender:
        assert sender.name == "aio"


@pytest.mark.parametrize("name", ["write", pytest.param("aio", marks=aio)])
def test_the_variable_forces_one(monkeypatch, name):
    """SYNCSTREAM_SENDER, unless the caller names one."""
    monkeypatch.setenv("SYNCSTREAM_SENDER", name)
    for sender in (open_sender(), open_sender(None)):
        assert type(sender) is type(open_sender(name))
        assert sender.name == name
        sender.close()
    assert open_sender("write").name == "write"


def test_wrong_names(monkeypatch):
    """They are refused, and the two are named."""
    for name in ("epoll", "uring", "pydll", "", "AIO"):
        text = f"name must be write or aio, got {name!r}"
        with pytest.raises(ValueError, match=re.escape(text)):
            open_sender(name)
    monkeypatch.setenv("SYNCSTREAM_SENDER", "fast")
    text = "SYNCSTREAM_SENDER must be write or aio, got 'fast'"
    with pytest.raises(ValueError, match=text):
        open_sender()
    monkeypatch.setenv("SYNCSTREAM_SENDER", "")  # as if it were not there
    open_sender().close()


def a_machine(name):
    return lambda: os.uname_result(("Linux", "host", "6.1", "#1", name))


MACHINES = {
    "i686": (os, "uname", a_machine("i686")),
    "armv7l": (os, "uname", a_machine("armv7l")),
    "ppc64le": (os, "uname", a_machine("ppc64le")),
    "s390x": (os, "uname", a_machine("s390x")),
    "32 bits": (struct, "calcsize", lambda code: {"P": 4}[code]),
    "big endian": (sys, "byteorder", "big"),
    "darwin": (sys, "platform", "darwin"),
}


@pytest.mark.parametrize("where", MACHINES)
def test_other_machines(monkeypatch, where):
    """No system call is made by a number that is another call's there."""

    def library(name, **options):
        raise AssertionError("a system call is near")

    monkeypatch.setattr(ctypes, "CDLL", library)
    monkeypatch.setattr(ctypes, "PyDLL", library)
    monkeypatch.setattr(*MACHINES[where])
    with pytest.raises(OSError, match=r"the system calls of .* are not known") as found:
        open_sender("aio")
    assert found.value.errno == errno.ENOSYS
    assert open_sender().name == "write"


FORBID = """
import ctypes, struct

def forbid(call, error):
    # seccomp(2), as containers do: this system call fails, all others are let through.
    # Without an error it kills.
    LOAD, IS, RETURN, ALLOW = 0x20, 0x15, 6, 0x7FFF0000
    FAIL = 0x50000 | error if error else 0x80000000  # SECCOMP_RET_KILL_PROCESS
    steps = [(LOAD, 0, 0, 0), (IS, 0, 1, call)]
    steps += [(RETURN, 0, 0, FAIL), (RETURN, 0, 0, ALLOW)]
    program = b"".join(struct.pack("=HBBI", *step) for step in steps)
    buffer = ctypes.create_string_buffer(program, len(program))
    filters = struct.pack("HP", len(steps), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, ctypes.c_char_p(filters)) == 0  # PR_SET_SECCOMP
"""

FORBIDDING = """
import logging, os, socket, sys
from syncstream.fanout.sender import open_sender

call, error = int(sys.argv[1]), int(sys.argv[2])
forbid(call, error)
before = sorted(os.listdir("/proc/self/fd"))
try:
    open_sender("aio")
except OSError as found:
    assert found.errno == error, found
    print(found.strerror)
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout, format="%(levelname)s")
sender = open_sender()
assert sorted(os.listdir("/proc/self/fd")) == before
near, far = socket.socketpair()
with near, far:
    near.setblocking(False)
    assert sender.send([(near.fileno(), b"a")] * 20) == []
    assert far.recv(99) == b"a" * 20
from syncstream.runtime.journal import journal

journal().flush()
print(sender.name)
"""


NEEDED = {"io_setup": CALLED[0], "io_getevents": CALLED[2], "io_submit": CALLED[3]}
ERRORS = {name: getattr(errno, name) for name in ("EPERM", "ENOSYS", "EAGAIN")}


@aio
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("call", NEEDED)
def test_a_kernel_that_forbids_it(call, error):
    """Asked for, it is an OSError that says so; else os.write, silently."""
    out = check_script(FORBID + FORBIDDING, str(NEEDED[call]), str(error))
    assert out.splitlines() == [f"{call}: {os.strerror(error)}", "DEBUG", "write"]


KILLING = """
import logging, signal, socket, sys, threading
from syncstream.fanout.loop import fanout
from syncstream.fanout.sender import open_sender

forbid(int(sys.argv[1]), 0)
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout, format="%(message)s")
calls = []
signal.signal(signal.SIGCHLD, lambda *_: calls.append("SIGCHLD"))
loop = fanout()
started = threading.Event()
loop.call(started.set)
assert started.wait(10)
from syncstream.runtime.journal import journal

journal().flush()
print(loop.sender.name)
try:
    open_sender("aio")
except PermissionError:
    pass
else:
    print("opened")
assert calls == []
"""


@aio
@pytest.mark.parametrize("number", CALLED)
def test_a_filter_that_kills(number):
    """seccomp may kill for a call that it does not know: a child tries it first."""
    out = check_script(FORBID + KILLING, str(number))
    text = f"system call {number} is forbidden here (seccomp), on pain of death"
    assert out == f"sending by os.write: [Errno 1] {text}\nwrite\n"


@aio
def test_a_filter_that_lets_it_pass():
    """As container runtimes do, which forbid io_uring: it is used."""
    script = """
from syncstream.fanout.sender import open_sender
forbid(425, 0)
print(open_sender().name)
"""
    assert check_script(FORBID + script) == "aio\n"


@aio
@pytest.mark.parametrize(
    ("status", "trials"),
    [
        (b"Seccomp:\t0\nSeccomp_filters:\t0\n", 0),
        (b"Name:\tpython\n", 0),
        (b"Seccomp:\t2\n", 4),
        (None, 4),
    ],
    ids=["none", "an old kernel", "one", "no proc"],
)
def test_only_where_there_is_a_filter_a_child_tries_it(monkeypatch, status, trials):
    """For each of the four calls; nobody is forked for nothing."""
    waits = []

    def opened(*args):
        if status is None:
            raise FileNotFoundError
        return io.BytesIO(status)

    def native(module, name):
        waits.append(name)
        return getattr(module, name)

    monkeypatch.setattr(sender_module, "open", opened, raising=False)
    monkeypatch.setattr(sender_module, "native", native)
    open_sender("aio").close()
    assert waits == ["waitpid"] * trials
