"""Senders: the same promises for each, whatever the peers do."""

import contextlib
import errno
import os
import select
import socket
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fanout.sending import (
    EBADF,
    EPIPE,
    MANY,
    NAMES,
    NO_FD,
    OPENERS,
    WAYS,
    fill,
    socket_pairs,
    to_all,
    waiting,
)
from tests.support.pairs import leave, tcp_pair
from tests.support.waits import TIMEOUT

pytestmark = pytest.mark.usefixtures("no_variable")


# What is sent.


def test_all_bytes_in_order_to_many(sender, room, send):
    """1,500 descriptors, more than a batch has: each gets each send whole, in order."""
    sent = [b"event %d;" % n for n in range(5)]
    with socket_pairs(MANY) as pairs:
        fds = [near.fileno() for near, _ in pairs]
        for data in sent:
            assert send(sender, fds, data) == []
        assert {waiting(far) for _, far in pairs} == {b"".join(sent)}


@pytest.mark.parametrize("kind", [list, tuple, dict.fromkeys, iter, set])
def test_any_iterable_will_do(sender, kind):
    """A list, a dictionary's keys, an iterator: of pairs."""
    with socket_pairs(40) as pairs:
        fds = [near.fileno() for near, _ in pairs]
        pairs_of = kind(to_all([*fds, NO_FD], b"a"))
        assert sorted(sender.send(pairs_of)) == [(NO_FD, EBADF)]
        assert {waiting(far) for _, far in pairs} == {b"a"}


def test_nothing_to_send(sender, send):
    """No descriptors, or no bytes: nothing happens, but that bad ones are told."""
    with socket_pairs(20) as pairs:
        fds = [near.fileno() for near, _ in pairs]
        assert sender.send([]) == []
        assert send(sender, fds, b"") == []
        assert send(sender, [*fds, NO_FD], b"") == [(NO_FD, EBADF)]
        assert {waiting(far) for _, far in pairs} == {b""}


def test_each_its_own(sender, room):
    """Channels of one user each: bytes of their own, of all sizes, in one send."""
    with socket_pairs(700) as pairs:
        for turn in range(3):
            sent = [b"%d/%d;" % (turn, n) * (n % 50) for n in range(len(pairs))]
            fds = [near.fileno() for near, _ in pairs]
            several = list(zip(fds, sent, strict=True))
            several.insert(300, (NO_FD, b"lost"))
            assert sender.send(several) == [(NO_FD, EBADF)]
            assert [waiting(far) for _, far in pairs] == sent


def test_each_its_own_in_part(sender):
    """Each is told of its own: some are full, some take a part, some are gone."""
    with socket_pairs(60, size=10_000) as pairs:
        for near, _ in pairs[::3]:
            fill(near)
        for n, (_, far) in enumerate(pairs):
            if n % 6:  # every other of the full ones has room again
                waiting(far)
        sent = [os.urandom(200 + 1_000 * n) for n in range(len(pairs))]
        fds = [near.fileno() for near, _ in pairs]
        rest = dict(sender.send(zip(fds, sent, strict=True)))
        for n, (fd, (_, far)) in enumerate(zip(fds, pairs, strict=True)):
            taken = rest.get(fd, len(sent[n]))
            came = waiting(far)
            assert came[len(came) - taken :] == sent[n][:taken]
            if n % 6 == 0:
                assert taken == 0
            else:
                assert taken > 0
                assert len(came) == taken


def test_each_size_of_a_batch(sender, room, send):
    """Around AIO's 8 and its 256, none is left out or doubled."""
    sizes = (1, 2, 6, 7, 8, 9, 63, 64, 255, 256, 257, 262, 263, 264, 511, 513, 3, 1500)
    with socket_pairs(MANY) as pairs:
        for size in sizes:
            data = b"%d" % size
            some = pairs[-size:]
            fds = [near.fileno() for near, _ in some]
            assert send(sender, [*fds, NO_FD], data) == [(NO_FD, EBADF)]
            assert {waiting(far) for _, far in some} == {data}
        assert {waiting(far) for _, far in pairs} == {b""}


def test_a_descriptor_twice(sender, send):
    """It gets the bytes twice: nobody looks whether they are distinct."""
    with socket_pairs(1) as [(near, far)]:
        assert send(sender, [near.fileno()] * 40, b"ab") == []
        assert waiting(far) == b"ab" * 40


def test_large_data(sender, send):
    """1 MiB: what each took is told, and is its beginning; the rest can follow."""
    data = os.urandom(1 << 20)
    with socket_pairs(40, size=50_000) as pairs:
        fds = {near.fileno(): far for near, far in pairs}
        taken = dict(send(sender, fds, data))
        assert taken.keys() == fds.keys()
        for fd, far in fds.items():
            assert 0 < taken[fd] < len(data)
            assert waiting(far) == data[: taken[fd]]


def test_large_data_over_tcp(sender):
    """Some read meanwhile, and get all of it by repeated sends of what is left."""
    data = os.urandom(1 << 20)
    with tcp_pair() as (near, client):
        near.setblocking(False)
        came = []
        reader = threading.Thread(target=lambda: came.append(read_all(client)))
        reader.start()
        rest = data
        while rest:
            told = sender.send([(near.fileno(), rest)])
            [(_, taken)] = told or [(0, len(rest))]
            assert taken >= 0
            rest = rest[taken:]
            if rest:
                select.select([], [near], [], TIMEOUT)
        near.shutdown(socket.SHUT_WR)
        reader.join(TIMEOUT)
        assert came == [data]


def read_all(client):
    client.settimeout(TIMEOUT)
    return b"".join(iter(lambda: client.recv(65536), b""))


# Peers that do not take it.


def test_full_ones_are_told(sender, send):
    """A full buffer: 0 bytes; one with some room: as many as went in."""
    data = b"x" * 100_000
    with socket_pairs(40, size=20_000) as pairs:
        full = {near.fileno(): fill(near) for near, _ in pairs[::2]}
        rest = dict(send(sender, [near.fileno() for near, _ in pairs], data))
        for near, far in pairs:
            taken = rest[near.fileno()]
            before = full.get(near.fileno())
            if before is None:
                assert 0 < taken < len(data)
            else:
                assert taken == 0
            assert len(waiting(far)) == (before or 0) + taken


def test_closed_and_gone_ones_are_told(sender, send):
    """EBADF and EPIPE, ENOTSOCK or EBADF for what is no socket to send to."""
    with socket_pairs(40) as pairs:
        for _, far in pairs[::4]:
            far.close()
        fds = [near.fileno() for near, _ in pairs]
        gone = [(fd, EPIPE) for fd in fds[::4]]
        bad = [(-1, EBADF), (NO_FD, EBADF)]
        rest = send(sender, [-1, *fds, NO_FD], b"bytes")
        assert sorted(rest) == sorted(gone + bad)
        alive = [far for _, far in pairs if far.fileno() >= 0]
        assert [waiting(far) for far in alive] == [b"bytes"] * 30


PLACES = [(0,), (39,), (0, 39), (7, 8, 9), range(20), range(1, 40, 2), range(40)]


@pytest.mark.parametrize("places", PLACES, ids=str)
def test_a_closed_descriptor_stops_nobody_else(sender, places, send):
    """Wherever it is in a batch, the others get theirs, once."""
    with socket_pairs(40) as pairs:
        fds = [near.fileno() for near, _ in pairs]
        for place in places:
            pairs[place][0].close()
        for data in (b"one", b"two"):
            assert sorted(send(sender, fds, data)) == [
                (fds[place], EBADF) for place in places
            ]
            for n, (_, far) in enumerate(pairs):
                assert waiting(far) == (b"" if n in places else data)


@pytest.mark.parametrize("how", ["RST", "FIN"])
def test_reset_peers(sender, how, send):
    """A reset is told at once, then EPIPE; a plain end once its reset has come back."""
    with tcp_pair() as (near, client):
        near.setblocking(False)
        fds = [near.fileno()] * 40  # so many that it is AIO
        leave(client, how)
        poll = select.poll()
        poll.register(near, select.POLLRDHUP)
        assert poll.poll(TIMEOUT * 1000)
        if how == "FIN":
            send(sender, [near.fileno()], b"bytes")
            poll.register(near, 0)
            assert poll.poll(TIMEOUT * 1000)  # POLLERR, POLLHUP
        results = [result for _, result in send(sender, fds, b"bytes")]
        first = -errno.ECONNRESET if how == "RST" else EPIPE
        assert results == [first] + [EPIPE] * 39


STATES = st.sampled_from(["ready", "full", "some", "gone", "bad"])
# bytes; how; whether all are read after it
STEPS = st.tuples(st.integers(1, 40_000), st.sampled_from(list(WAYS)), st.booleans())


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60)
@given(states=st.lists(STATES, max_size=40), steps=st.lists(STEPS, max_size=5))
def test_like_a_model(name, states, steps):
    """Random mixtures: each is told of as many bytes as came, or of its own error."""
    with contextlib.ExitStack() as stack:
        sender = stack.enter_context(contextlib.closing(OPENERS[name]()))
        pairs = stack.enter_context(socket_pairs(len(states), size=10_000))
        fds, streams = [], []
        for state, (near, far) in zip(states, pairs, strict=True):
            held = fill(near) if state == "full" else 0
            if state == "some":
                held = near.send(b"." * 3_000)
            if state == "gone":
                far.close()
            fds.append(NO_FD + len(fds) if state == "bad" else near.fileno())
            streams.append(b"." * held)
        is_read = False
        for size, way, reads in steps:
            data = os.urandom(size)
            rest = WAYS[way](sender, fds, data)
            told = dict(rest)
            assert len(told) == len(rest)
            assert set(told) <= set(fds)
            for n, state in enumerate(states):
                result = told.get(fds[n], size)
                if state in ("gone", "bad"):
                    assert result == (EPIPE if state == "gone" else EBADF)
                    continue
                assert 0 <= result <= size
                if state == "full" and not is_read:
                    assert result == 0
                if not streams[n]:
                    assert result == size or result > 1_000
                streams[n] += data[:result]
            if reads:
                is_read = True
                for n, (_, far) in enumerate(pairs):
                    if far.fileno() >= 0:
                        assert waiting(far) == streams[n]
                        streams[n] = b""
        for n, (_, far) in enumerate(pairs):
            if far.fileno() >= 0:
                assert waiting(far) == streams[n]
