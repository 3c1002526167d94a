"""Whatever happens to the loop's clients: in order, once, or told."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from syncstream import Hub
from syncstream.brokers import log as log_module
from syncstream.channels import limits
from syncstream.fanout import connection as connection_module
from syncstream.fanout.loop import fanout
from tests.fanout.peers import (
    Peer,
    settle,
    texts_until,
)
from tests.support.waits import await_true

pytestmark = pytest.mark.usefixtures("nothing_is_left_behind")


OPS = st.one_of(
    st.tuples(st.just("publish"), st.integers(1, 12), st.sampled_from([1, 50, 3000])),
    st.tuples(st.just("publish"), st.integers(1, 12), st.sampled_from([1, 50, 3000])),
    st.tuples(st.just("tagged"), st.integers(0, 2), st.integers(1, 50)),
    st.tuples(st.just("join"), st.integers(0, 7), st.integers(0, 40)),
    st.tuples(st.just("join"), st.integers(0, 7), st.integers(0, 40)),
    st.tuples(st.just("read"), st.integers(0, 30), st.sampled_from([10, 3000, 10**6])),
    st.tuples(st.just("leave"), st.integers(0, 30), st.just(0)),
    st.tuples(st.just("kick"), st.integers(0, 30), st.just(0)),
    st.tuples(st.just("resync"), st.just(0), st.just(0)),
    st.tuples(st.just("settle"), st.just(0), st.just(0)),
)


class Story:
    """A channel, what was published to it, and who was there for how long."""

    def __init__(self, loop):
        self.loop = loop
        self.hub = Hub(capacity=20)
        self.published = []  # (id, tags only, or None)
        self.here = []
        self.all = []

    def publish(self, count, size):
        start = len(self.published)
        items = [f"{start + k} {'x' * size}" for k in range(count)]
        self.published += [(id, ()) for id in self.hub.publish_many("a", items)]

    def tagged(self, kind, size):
        only = [None, ("t",), ("nobody",)][kind]
        text = f"{len(self.published)} {'x' * size}"
        id = self.hub.publish("a", text, only=only)
        self.published.append((id, only))

    def join(self, kind, back):
        place = max(0, len(self.published) - back)
        options, first = {}, len(self.published)
        if kind & 1 and place:
            options["after"], first = self.published[place - 1][0], place
        if kind & 2:
            options["tags"] = ["t"]
        if kind & 4:
            options["is_chunked"] = False
        peer = Peer(self.loop, self.hub, **options)
        peer.first, peer.tags = first, options.get("tags", [])
        self.here.append(peer)
        self.all.append(peer)

    def read(self, which, most):
        if self.here:
            self.here[which % len(self.here)].read(most)

    def leave(self, which, _):
        if self.here:
            peer = self.here.pop(which % len(self.here))
            peer.read()
            peer.leave()

    def kick(self, which, _):
        if self.here:
            peer = self.here.pop(which % len(self.here))
            assert self.hub.kick(lambda s: s is peer.subscription) == 1

    def resync(self, *_):
        self.hub.sink.resync(None)

    def settle(self, *_):
        settle(self.loop)

    def check(self, peer, is_whole):
        """It was given, or told of, all; in order; once."""
        places = {id: place for place, (id, _) in enumerate(self.published)}
        expected = peer.first
        for event in peer.events():
            if event.event == "reset":
                reason = json.loads(event.data)["reason"]
                # A resume may be too old; else only who is slow loses anything.
                assert reason in ("unknown", "lagged")
                after = places[event.id] + 1 if event.id in places else 0
                assert after > expected
                expected = after
                continue
            place = places[event.id]
            assert event.data.startswith(f"{place} ")
            missed = self.published[expected:place]
            assert place >= expected, (place, expected)
            assert not [only for _, only in missed if is_for(only, peer.tags)]
            assert is_for(self.published[place][1], peer.tags)
            expected = place + 1
        if is_whole:
            assert expected == len(self.published)


def is_for(only, tags):
    return not only or bool(set(only) & set(tags))


@pytest.mark.parametrize("seed", [0])
@settings(max_examples=60)
@given(st.lists(OPS, min_size=5, max_size=60))
def test_whatever_happens(seed, ops):
    """Given or announced is what was published: in order, once, by whatever way."""
    loop = fanout()
    before = {
        (connection_module, "SEND_BUFFER"): 4096,
        (limits, "WINDOW"): 8,
        (limits, "READ"): 5,
        (log_module, "JOIN"): 6000,
    }
    kept = {key: getattr(*key) for key in before}
    for key, value in before.items():
        setattr(*key, value)
    story = Story(loop)
    try:
        for name, *words in ops:
            getattr(story, name)(*words)
        story.publish(1, 1)  # for all, and the last
        last = len(story.published) - 1
        for peer in story.here:
            texts_until(peer, f"{last} x")
        for peer in story.here:
            peer.leave()
        for peer in story.all:
            await_true(lambda peer=peer: peer.ends)
            if peer.socket.fileno() >= 0:
                peer.read_all()
                peer.leave()
            story.check(peer, peer in story.here)
    finally:
        for peer in story.all:
            peer.leave()
        story.hub.close()
        for key, value in kept.items():
            setattr(*key, value)
        for peer in story.all:
            await_true(lambda peer=peer: peer.ends)
