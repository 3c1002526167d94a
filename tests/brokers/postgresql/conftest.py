"""A real server, which the tests start, kill, cut off and restore, and its brokers."""

import itertools

import pytest

from syncstream.brokers.postgresql import PostgreSQLBroker
from tests.brokers.postgresql.waits import LIMIT
from tests.support.postgresql_server import Line, PostgreSQL

_numbers = itertools.count()


@pytest.fixture(scope="session")
def server():
    with PostgreSQL() as server:
        yield server


@pytest.fixture
def schema():
    """A name that no other test uses."""
    return f"s{next(_numbers)}"


@pytest.fixture
def make(server, schema):
    """What makes brokers of one schema; they are closed in the end.

    They are patient: a test's first publish also connects and installs, which takes
    seconds on a busy machine. Tests of what has to end in time give `SHORT`.
    """
    made = []

    def make(url=None, *, publish_timeout=LIMIT, **options):
        options.update(schema=schema, publish_timeout=publish_timeout)
        broker = PostgreSQLBroker(url or server.url, **options)
        made.append(broker)
        return broker

    yield make
    for broker in made:
        broker.close()


@pytest.fixture
def line(server):
    with Line(server.port) as line:
        yield line
