"""The loop of this process, and clients of it."""

import gc

import pytest

from syncstream import Hub
from syncstream.fanout.loop import fanout
from syncstream.runtime.watch import watch
from tests.fanout.peers import Peer, settle
from tests.support.descriptors import open_files
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
