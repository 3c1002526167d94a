"""``postgresql:``, a broker in your own database, shared by all its clients.

Events are rows. They are numbered while a row is locked until the commit is visible
(ids drawn from a sequence become visible out of order, and readers that go by them
lose some: measured). Ids are ``<number>-<nonce>`` in hexadecimal digits; numbers are
of the channel and without holes, and a row names the nonce before its own: the chain.

What is published with a ``connection=`` goes into a table that is empty outside of
transactions; a deferred trigger appends it at the commit. Rolled back, it never was;
and an open transaction holds nothing that others wait for.

What was deleted before a process had read it, and is its channel's newest, leaves no
trace in the chain until there is a newer one: a trigger notes how far deletions went,
and who is behind that has all read anew.

A process has one connection that listens. ``NOTIFY`` says that there is something,
not what: the listener reads the table from where it was, and does so every two seconds
anyway, and after a reconnect. So nothing hangs on a notification.

All that may block runs in native threads; greenlets wait for them (`gevent`'s
thread pool). Only psycopg's ``pq``, libpq itself, is used: its own waits would hold up
a hub if psycopg was imported before gevent has patched.

``python -m syncstream.brokers.postgresql [--sql] [URL]`` installs the schema, or prints
it. What a role needs that only uses it is in docs/brokers.md.
"""

try:
    import psycopg  # noqa: F401 (so that it is said here)
except ImportError as error:
    raise ImportError(
        "postgresql: needs the package psycopg,"
        " run pip install 'syncstream-wsgi[postgresql]'"
    ) from error

from .broker import PostgreSQLBroker
from .schema import install, install_sql

__all__ = ["PostgreSQLBroker", "install", "install_sql"]
