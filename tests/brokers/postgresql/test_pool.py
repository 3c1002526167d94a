"""Connections that publish and read: lent, kept, and closed."""

import logging
import threading
import time

from syncstream.brokers.health import Health
from syncstream.brokers.postgresql import listener, pool
from syncstream.brokers.postgresql.connection import parse_url
from syncstream.brokers.postgresql.schema import Schema
from syncstream.errors import (
    Unavailable,
    Uncertain,
)
from tests.brokers.postgresql.waits import LIMIT, SHORT, backends, waiting
from tests.brokers.sinks import listening
from tests.support.waits import await_true


def test_busy_connections_are_waited_for(make, server, schema):
    """No more than allowed are opened; who gets none in time is told."""
    make().read("a", None)  # installs, however long that takes
    broker = make(connections=2, publish_timeout=SHORT)
    broker.publish([("a", b"1")])
    with server.connect() as other, other.transaction():
        other.execute(f"LOCK TABLE {schema}.channel")
        errors = []

        def publish():
            try:
                broker.publish([("a", b"x")])
            except (Unavailable, Uncertain) as error:  # maybe the answer came late
                errors.append(error)

        threads = [threading.Thread(target=publish) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)
    assert len(errors) == 6
    assert sum(isinstance(error, Unavailable) for error in errors) >= 2
    # As many as before can be lent.
    with server.connect() as other, other.transaction():
        other.execute(f"LOCK TABLE {schema}.channel")
        threads = [threading.Thread(target=publish) for _ in range(2)]
        for thread in threads:
            thread.start()
        await_true(lambda: waiting(server) == 2)
    for thread in threads:
        thread.join(LIMIT)
    broker.publish([("a", b"2")])


def test_connections_that_are_not_used_are_closed(server, schema, make, monkeypatch):
    """Some time after a burst, by whoever listens or publishes."""
    monkeypatch.setattr(listener, "HEARTBEAT", 0.05)
    broker = make(connections=4)
    listening(broker, "a")
    broker.publish([("a", b"1")])
    with server.connect() as other, other.transaction():
        other.execute(f"LOCK TABLE {schema}.channel")
        threads = [
            threading.Thread(target=broker.publish, args=([("a", b"x")],))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        await_true(lambda: waiting(server) == 4)
    for thread in threads:
        thread.join(LIMIT)
    assert backends(server) == 5
    monkeypatch.setattr(pool, "IDLE", 0.0)
    await_true(lambda: backends(server) == 1)  # who listens


def test_a_connection_that_comes_back_during_the_end_is_closed(
    server, schema, monkeypatch
):
    """However late the end came: nobody would close it later."""
    actions = []

    class Clock:
        def monotonic(self):
            if actions:
                actions.pop()()
            return time.monotonic()

    monkeypatch.setattr(pool, "time", Clock())
    dsn = parse_url(f"{server.url}?application_name=late")
    health = Health(logging.getLogger("syncstream.brokers"))
    connections = pool.Pool(dsn, Schema(schema, True), health, 1)
    with connections.lent(time.monotonic() + LIMIT):
        actions.append(connections.close)
    assert actions == []
    await_true(lambda: backends(server, "late") == 0)
