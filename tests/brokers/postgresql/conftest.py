"""A real server, which the tests start, kill, cut off and restore, and its brokers."""

import itertools

import pytest

from syncstream.brokers.postgresql import PostgreSQLBroker
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
    """What makes brokers of one schema; they are closed in the end."""
    made = []

    def make(url=None, **options):
        broker = PostgreSQLBroker(url or server.url, schema=schema, **options)
        made.append(broker)
        return broker

    yield make
    for broker in made:
        broker.close()


@pytest.fixture
def line(server):
    with Line(server.port) as line:
        yield line
