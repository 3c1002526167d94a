"""Clients of the fan-out loop, as they see themselves."""

import math
import os
import re
import socket
import threading
import time

from syncstream.fanout.client import Client
from syncstream.protocol import sse
from syncstream.runtime.process import Process, Served
from syncstream.streams.ends import REASONS
from tests.support.pairs import tcp_pair
from tests.support.waits import TIMEOUT, await_true

RETRY = re.compile(rb"retry: ([0-9]+)\n\n")
HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


def settle(loop):
    """Wait until the loop, and its lanes, have done what they were told before."""
    lanes = loop.lanes()
    for _ in range(3):
        names = (loop.call, lanes.reads.do, lanes.ends.do, lanes.users.do)
        for call in (*names, lanes.logs.do):
            done = threading.Event()
            call(done.set)
            assert done.wait(TIMEOUT)


class Peer:
    """A client, as it sees itself; its server's end belongs to the loop.

    Attributes:
        ends: The reasons with which its callback was called.
    """

    def __init__(
        self,
        loop,
        hub,
        *channels,
        is_chunked=True,
        is_tcp=False,
        keepalive=None,
        send_timeout=None,
        retry=0,
        deadline=math.inf,
        before_wait=(),
        comment=b": keepalive\n\n",
        finish=b"",
        process=None,
        callbacks=(),
        place=None,
        comes_back=True,
        add=True,
        client=Client,
        **options,
    ):
        if is_tcp:
            with tcp_pair() as (ours, theirs):
                fd, self.socket = os.dup(ours.fileno()), theirs.dup()
        else:
            ours, self.socket = socket.socketpair()
            fd = ours.detach()
        os.set_blocking(fd, False)
        self.socket.settimeout(TIMEOUT)
        self.loop, self.is_chunked = loop, is_chunked
        self.data = b""
        self.ends = []
        self.subscription = hub.subscribe(*(channels or ("a",)), **options)
        self.subscription.begin()
        self.process, self.served = process or Process(), Served(None)
        terms = loop.prepare(
            self.process,
            self.served,
            keepalive=keepalive,
            send_timeout=send_timeout,
            retry=retry,
            comes_back=comes_back,
            reasons=REASONS,
            before_wait=tuple(before_wait),
            comment=comment,
            finish=finish,
        )
        self.client = client(
            loop,
            fd,
            self.subscription,
            terms,
            label="GET '/a'",
            is_chunked=is_chunked,
            began=time.monotonic(),
            deadline=deadline,
            place=place,
            callbacks=(*callbacks, lambda: self.ends.append(self.client.reason)),
        )
        self.subscription.detach(self.client)
        if add:
            loop.add(self.client, HEAD)

    # What has come.

    def read(self, most=1 << 20):
        """Read what is there now, at most so much; return whether there may be more."""
        self.socket.settimeout(0)
        try:
            data = self.socket.recv(most)
        except (BlockingIOError, ConnectionResetError):
            return False
        finally:
            self.socket.settimeout(TIMEOUT)
        self.data += data
        return bool(data)

    def read_until(self, is_done):
        """Read on until something is so of the events that have come."""
        while not is_done(self.events()):
            data = self.socket.recv(1 << 20)
            assert data, f"ended by {self.client.reason}: {self.data[-300:]!r}"
            self.data += data
        return self.events()

    def read_all(self):
        """Read to the end; return the body, and whether it is marked or reset."""
        is_reset = False
        try:
            while data := self.socket.recv(1 << 20):
                self.data += data
        except ConnectionResetError:
            is_reset = True
        body, is_whole = self.body()
        return body, is_whole, is_reset

    def body(self):
        """Return what has come of the body, and whether its end was marked."""
        assert self.data.startswith(HEAD) or not self.data or HEAD.startswith(self.data)
        framed = self.data[len(HEAD) :]
        return unchunked(framed) if self.is_chunked else (framed, False)

    def events(self):
        """Return the whole events that have come."""
        return sse.Decoder().feed(self.body()[0])

    def texts(self):
        return [event.data for event in self.events()]

    def leave(self):
        self.socket.close()


def unchunked(framed):
    """Return the bytes of all chunks, the last may be a part; and whether it ended."""
    body = b""
    while framed:
        size, mark, rest = framed.partition(b"\r\n")
        if not mark:
            return body, False
        length = int(size, 16)
        if not length:
            assert rest in (b"", b"\r", b"\r\n")
            return body, rest == b"\r\n"
        body += rest[:length]
        if len(rest) < length + 2:
            return body, False
        assert rest[length : length + 2] == b"\r\n"
        framed = rest[length + 2 :]
    return body, False


def texts_until(peer, text):
    """Read up to an event with this data; return the data of all."""
    events = peer.read_until(lambda events: any(e.data == text for e in events))
    return [event.data for event in events]


def seen(*peers):
    """Have all of them be where the channel is, those of one kind in one group."""

    def are_together():
        groups = {peer: peer.client.group for peer in peers}
        keys = [group and group.key for group in groups.values()]
        alone = [
            peer
            for peer, group in groups.items()
            if not (is_shared(group) or (group and keys.count(group.key) == 1))
            or group.key is None
        ]
        for peer in alone:
            # Who came before the others had their turn joins them by the next one.
            peer.client.wake()
        return not alone

    await_true(are_together)


def is_shared(group):
    return group is not None and group.is_shared


def full(hub, peer, channel="a"):
    """Publish until a client does not take any more."""
    settle(peer.loop)  # it has its head
    n = 0
    while peer.client.rest is None:
        hub.publish(channel, f"{n} {'x' * 10_000}")
        n += 1
        settle(peer.loop)
        assert n < 2000
    return n


def ended(peer):
    """Wait for a client's end; return why, and all that it has got."""
    body, is_whole, is_reset = peer.read_all()
    await_true(lambda: peer.ends)
    (reason,) = peer.ends
    return reason, body, is_whole, is_reset
