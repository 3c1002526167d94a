"""``redis:``, the broker for many machines, on Redis or Valkey.

A channel is a stream, ``ss:{channel}``. One script appends an event and publishes it,
so that stream and Pub/Sub have the same order. Resuming clients read the stream;
present ones are served from Pub/Sub, over one connection for each process, however many
channels and clients there are. Events that Pub/Sub loses with a connection are found by
comparing the channels' heads.

Ids are ``<milliseconds>-<number>``, with a random number for the first of a
millisecond: a server that has lost its newest events, for example in a failover, never
repeats an id. An empty channel has a head without a key of its own: publishers keep
marks in one hash, ``ss:empty``, and change a channel's mark when they create its key.
The first event names the mark as its predecessor, and no mark is used twice: a client
that has the mark has missed nothing, whatever has expired, or was evicted or flushed
since. Reads write only the first mark of a prefix, and do without it if they may not.

Events are as durable as the server makes them: see its ``appendfsync``, and ``WAIT``.
Evicted or flushed keys show as a reset. Redis 6.2, or any Valkey.
"""

try:
    import redis  # noqa: F401 (only for the error message)
except ImportError as error:
    raise ImportError(
        "redis: needs the package redis, run pip install 'syncstream-wsgi[redis]'"
    ) from error

from .broker import RedisBroker

__all__ = ["RedisBroker"]
