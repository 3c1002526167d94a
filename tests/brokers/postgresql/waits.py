"""What several tests of ``postgresql:`` wait for."""

import time
from pathlib import Path

from syncstream.errors import (
    Unavailable,
)

FORMATS = Path(__file__).parents[1] / "formats"


LIMIT = 20.0  # seconds for what must happen; not what it may take
SHORT = 2.0  # the default of ``publish_timeout``, for what has to end in time


def read_until(subscription, data):
    """Return what a subscription has up to an event with this data."""
    found = []
    while not found or found[-1].data != data:
        events = subscription.read(LIMIT)
        assert events, f"waited {LIMIT} s in vain, after {found}"
        found += events
    return found


def publish_until_it_works(broker, item, limit=LIMIT):
    deadline = time.monotonic() + limit
    while True:
        try:
            return broker.publish([item])
        except Unavailable:
            assert time.monotonic() < deadline, "it must come back by itself"
            time.sleep(0.05)


def backends(server, name="syncstream", query="%"):
    """Count the connections of an application's name and last query."""
    ((count,),) = server.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
        " AND query ILIKE %s",
        name,
        query,
    )
    return count


def waiting(server, name="syncstream"):
    """Count those connections that wait for a lock."""
    ((count,),) = server.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
        " AND wait_event_type = 'Lock'",
        name,
    )
    return count


REVISION_1 = (FORMATS / "postgresql_1.sql").read_text()
