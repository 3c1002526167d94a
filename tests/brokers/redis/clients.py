"""Brokers and hubs of a URL, for several tests of ``redis:``."""

import contextlib
import itertools
import threading
import time

import pytest

from syncstream.brokers import open_broker
from syncstream.channels.gap import Gap
from syncstream.channels.hub import Hub
from syncstream.errors import Closed, Unavailable, Uncertain
from tests.support.waits import TIMEOUT, await_true

prefixes = itertools.count()


def own(url):
    """Return a URL with a prefix that no other test has."""
    return f"{url}{'&' if '?' in url else '?'}prefix=t{next(prefixes)}:"


def key_of(url, channel):
    """Return the key of a channel, as it has been since the first release."""
    return f"{url.partition('prefix=')[2] or 'ss:'}{{{channel}}}"


def at(port, *query):
    return f"redis://127.0.0.1:{port}?{'&'.join(query)}"


@contextlib.contextmanager
def opened(url, **options):
    broker = open_broker(url, **options)
    try:
        yield broker
    finally:
        broker.close()


@contextlib.contextmanager
def hub_of(url, **options):
    hub = Hub(url, **options)
    try:
        yield hub
    finally:
        hub.close()


def refused(broker, clock, kind=Unavailable, match=None):
    """Check what a publish of one event and of a batch is refused with, and when."""
    for items in ([("a", b"1")], [("a", b"2"), ("b", b"3")]):
        began = clock()
        with pytest.raises(kind, match=match) as caught:
            broker.publish(items)
        assert type(caught.value) is kind
        assert clock() - began < 3
    with pytest.raises(ValueError, match="connection must be None"):
        broker.publish([("a", b"1")], connection=object())


class Reader:
    """A subscriber in a thread; what it has got, and how often it was told of a gap."""

    def __init__(self, hub, *channels, **options):
        self.got = []
        self.gaps = []
        self.errors = []
        self._subscription = hub.subscribe(*channels, **options)
        self._subscription.read(0)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self):
        try:
            while True:
                for event in self._subscription.read():
                    if isinstance(event, Gap):
                        self.gaps.append(event)
                    else:
                        self.got.append(event.data)
        except Closed:
            pass
        except Exception as error:
            self.errors.append(error)

    def close(self):
        self._subscription.close()
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()
        assert self.errors == []

    def is_alive(self):
        return self._thread.is_alive()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()


class Publisher:
    """Publishes numbers, one after the other; notes what became of each."""

    def __init__(self, url, channel="a", clock=time.monotonic):
        self.stored = []
        self.uncertain = []
        self.longest = 0.0
        self._clock = clock
        self._broker = open_broker(url)
        self._channel = channel
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._publish)
        self._thread.start()

    def _publish(self):
        for number in itertools.count():
            began = self._clock()
            payload = f"data: {number}\n\n".encode()
            try:
                self._broker.publish([(self._channel, payload)])
            except Unavailable:
                pass
            except Uncertain:
                self.uncertain.append(str(number))
            else:
                self.stored.append(str(number))
            self.longest = max(self.longest, self._clock() - began)
            if self._stop.wait(0.003):
                return

    def more(self, count=50):
        """Wait until so many more are stored."""
        goal = len(self.stored) + count
        await_true(lambda: len(self.stored) >= goal)

    def close(self):
        self._stop.set()
        self._thread.join(TIMEOUT)
        self._broker.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()


def account(publisher, reader, has_gap=False):
    """All that was stored was got, once and in order; nothing else but what may be."""
    publisher.close()
    last = publisher.stored[-1]
    await_true(lambda: last in reader.got[-3:], lambda: f"{last} {reader.got[-3:]}")
    assert reader.got == sorted(set(reader.got), key=int)
    got = set(reader.got)
    assert got <= {*publisher.stored, *publisher.uncertain}
    missing = [number for number in publisher.stored if number not in got]
    if not has_gap:
        assert reader.gaps == []
        assert missing == []
    return missing


def end(server, proxy, hub):
    """The server ends one connection."""
    before = {client["id"] for client in server.listeners()}
    server.command("CLIENT", "KILL", "TYPE", "pubsub")
    await_true(lambda: {client["id"] for client in server.listeners()} - before)
