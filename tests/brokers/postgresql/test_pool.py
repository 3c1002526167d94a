"""Connections that publish and read: lent, kept, and closed."""

import threading

from syncstream.brokers.postgresql import listener, pool
from syncstream.errors import (
    Unavailable,
    Uncertain,
)
from tests.brokers.postgresql.waits import LIMIT, backends, waiting
from tests.brokers.sinks import listening
from tests.support.waits import await_true


def test_busy_connections_are_waited_for(make, server, schema):
    """No more than allowed are opened; who gets none in time is told."""
    broker = make(connections=2)
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
