"""What several tests of ``local:`` do: read all that is kept, and run programs."""

import contextlib
import itertools
import os
import sqlite3
import subprocess
import sys

from syncstream import Gap
from tests.support.waits import TIMEOUT


def kept(broker, channel="a"):
    """Return what is kept of a channel, which must be one chain."""
    found, last = [], "0"
    while True:
        entries = broker.read(channel, last).entries
        for before, entry in itertools.pairwise([*found[-1:], *entries]):
            assert entry.prev == before.id
        if not entries:
            return found
        found += entries
        last = entries[-1].id


def payloads(broker, channel="a"):
    return [entry.payload for entry in kept(broker, channel)]


def run(script, *words, **options):
    """Start a script in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error", "-c", script, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        **options,
    )


@contextlib.contextmanager
def running(script, *words, **options):
    """Run a script beside us; it is killed in the end."""
    with run(script, *words, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def read_to(subscription, last):
    """Return the data of events, up to these; resets are left out."""
    found = []
    while last not in found:
        events = subscription.read(TIMEOUT)
        assert events
        assert len(found) < 100
        found += [e.data for e in events if not isinstance(e, Gap)]
    return found


def change(folder, sql):
    """As an operator does, by SQLite's own tool."""
    with contextlib.closing(sqlite3.connect(f"{folder}/log/log.db")) as connection:
        connection.execute(sql)
        connection.commit()
