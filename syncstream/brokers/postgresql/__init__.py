"""``postgresql:``, a broker in your own database, shared by all its clients.

Events are rows. They are numbered under a row lock that is held until the commit is
visible. (Ids from a sequence become visible out of order, and readers that follow them
lose events: measured.) Ids are ``<number>-<nonce>`` in hexadecimal digits; numbers
count a channel's events without holes, and each row contains its predecessor's nonce:
the chain.

Events published with ``connection=`` go into a table that is empty outside of
transactions; a deferred trigger appends them at the commit. A rollback removes them,
and an open transaction holds no lock that others wait for.

A channel's newest event, deleted before a process has read it, leaves no trace in the
chain until a newer one comes. So a trigger records how far deletions went, and a
process that is behind that point has all its channels read.

A process has one listening connection. ``NOTIFY`` only says that there are new events:
the listener reads the table from its last position, also every two seconds and after a
reconnect, so that a lost notification does no harm.

Calls that may block run in native threads, for which greenlets wait (`gevent`'s thread
pool). Only psycopg's ``pq``, which is libpq itself, is used: psycopg's own waits would
block a hub if psycopg was imported before gevent patched.

``python -m syncstream.brokers.postgresql [--sql] [URL]`` installs the schema, or prints
it. docs/brokers.md lists the rights of a role that only uses it.
"""

try:
    import psycopg  # noqa: F401 (only for the error message)
except ImportError as error:
    raise ImportError(
        "postgresql: needs the package psycopg,"
        " run pip install 'syncstream-wsgi[postgresql]'"
    ) from error

from .broker import PostgreSQLBroker
from .schema import install, install_sql

__all__ = ["PostgreSQLBroker", "install", "install_sql"]
