"""The loop of this process, and clients of it."""

import contextlib
import gc
import resource

import pytest

from syncstream import Hub
from syncstream.fanout.loop import fanout
from syncstream.runtime.watch import watch
from tests.fanout.peers import Peer, settle
from tests.fanout.sending import MANY, NAMES, OPENERS, WAYS
from tests.support.descriptors import open_files
from tests.support.programs import lack
from tests.support.waits import await_true


@pytest.fixture(scope="module")
def loop():
    """The process's own; its thread has begun, and its lanes', and the watch's."""
    watch()
    loop = fanout()
    settle(loop)
    return loop


@pytest.fixture
def nothing_is_left_behind(loop):
    """No descriptor, no client, no group, no timer."""
    gc.collect()
    before = open_files()
    yield
    settle(loop)
    assert (loop._clients, loop._lagging, loop.meeting.groups) == ({}, {}, {})
    assert not any(loop.wheel._buckets.values())
    gc.collect()
    assert open_files() - before == {}


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture
def peers(loop):
    """Make clients; whoever is left at the end is hung up."""
    made = []

    def join(hub, *channels, **options):
        peer = Peer(loop, hub, *channels, **options)
        made.append(peer)
        return peer

    yield join
    for peer in made:
        peer.leave()
        await_true(lambda peer=peer: peer.ends)


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def send(request):
    """Each way to send many descriptors the same bytes."""
    return request.param


@pytest.fixture
def no_variable(monkeypatch):
    """The environment of the test run forces nothing."""
    monkeypatch.delenv("SYNCSTREAM_SENDER", raising=False)


@pytest.fixture(params=NAMES)
def sender(request):
    """Each sender, in the test's thread."""
    sender = OPENERS[request.param]()
    with contextlib.closing(sender):
        yield sender


@pytest.fixture
def room():
    """Descriptors for `MANY` pairs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MANY + 200
    if 0 <= hard < wanted:
        lack(f"ulimit -Hn is {hard}, this needs {wanted}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
