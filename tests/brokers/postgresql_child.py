"""A process that publishes and subscribes, and accounts for it at the end.

    python -m tests.brokers.postgresql_child KIND URL SCHEMA PUBLISHERS SUBSCRIBERS

KIND is threads or gevent. The process says "ready", and begins with the first line that
it reads. With the second one it stops to publish; the third one is JSON, the newest id
of each channel: when all its subscribers have come to there it prints what they have
got, as JSON.
"""

import sys

if sys.argv[1] == "gevent":
    from gevent import monkey

    monkey.patch_all()

import json
import os
import random
import threading
import time

from syncstream import Gap, Hub
from syncstream.brokers.postgresql import PostgreSQLBroker
from syncstream.errors import BrokerError, Unavailable, Uncertain
from tests.support.clock import Clock

CHANNELS = ("a", "b:1", "b:2")
LIMIT = 40.0  # seconds in which all must be got


class Account:
    def __init__(self, hub, clock):
        self.hub = hub
        self.clock = clock
        self.is_stopping = False
        self.heads = None
        self.acked = []
        self.maybe = []
        self.refused = 0
        self.slowest = 0.0  # publish
        self.latest = 0.0  # how late a timer was
        self.got = []

    def publish(self, number):
        count = 0
        while not self.is_stopping:
            channel = CHANNELS[count % len(CHANNELS)]
            data = f"{os.getpid()}-{number}-{count}"
            count += 1
            began = self.clock()
            try:
                self.acked.append((channel, self.hub.publish(channel, data), data))
            except Unavailable:
                self.refused += 1
                time.sleep(0.02)
            except Uncertain:
                self.maybe.append(data)
            self.slowest = max(self.slowest, self.clock() - began)
            time.sleep(0.002)

    def subscribe(self, number):
        channel = CHANNELS[number % len(CHANNELS)]
        choose = random.Random(number)
        got = []
        self.got.append((channel, got))
        last, deadline = "start", None
        while True:
            subscription = self.hub.subscribe(channel, after=last)
            try:
                drop_at = time.monotonic() + choose.uniform(0.1, 1.0)
                while time.monotonic() < drop_at:
                    events = subscription.read(0.05)
                    # Cut off anywhere.
                    for event in events[: choose.randrange(1, len(events) + 2)]:
                        last = event.id
                        is_gap = isinstance(event, Gap)
                        got.append((None if is_gap else event.id, event.data))
                    if len(got) and events and last != events[-1].id:
                        break
            except BrokerError:
                time.sleep(0.05)
            finally:
                subscription.close()
            if self.heads is not None:
                deadline = deadline or time.monotonic() + LIMIT
                is_over = time.monotonic() > deadline
                ids = [id for id, _ in got]
                head = self.heads.get(channel)
                if head in ids:  # what came later was in doubt, or a killed process's
                    del got[ids.index(head) + 1 :]
                if is_over or head is None or head in ids:
                    return

    def tick(self):
        while not self.is_stopping:
            began = self.clock()
            time.sleep(0.01)
            self.latest = max(self.latest, self.clock() - began)


def start(function, *words):
    thread = threading.Thread(target=function, args=words)
    thread.start()
    return thread


def line():
    if sys.argv[1] != "gevent":
        return sys.stdin.readline()
    import gevent

    return gevent.get_hub().threadpool.apply(sys.stdin.readline)


def main():
    _, mode, url, schema, publishers, subscribers = sys.argv
    broker = PostgreSQLBroker(url, 100_000, schema=schema)
    hub = Hub(broker=broker)
    clock = Clock()
    account = Account(hub, clock)
    for channel in CHANNELS:
        hub.head(channel)
    print("ready", flush=True)
    line()
    readers = [start(account.subscribe, n) for n in range(int(subscribers))]
    writers = [start(account.publish, n) for n in range(int(publishers))]
    if mode == "gevent":
        writers.append(start(account.tick))
    line()
    account.is_stopping = True
    for thread in writers:
        thread.join()
    print("stopped", flush=True)
    account.heads = json.loads(line())
    for thread in readers:
        thread.join()
    began = clock()
    hub.close()
    names = ("acked", "maybe", "refused", "slowest", "latest", "got")
    found = {name: getattr(account, name) for name in names}
    found["closing"] = clock() - began
    clock.close()
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
