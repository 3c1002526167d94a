"""``redis:``, the broker for many machines, on Redis or Valkey.

A channel is a stream, ``ss:{channel}``; one script appends to it and publishes what it
has appended, so that both have one order. Who resumes reads the stream; who is there
is told by Pub/Sub, over one connection a process, however many channels and clients.
What Pub/Sub loses with a connection is found by asking for the heads.

Ids are ``<milliseconds>-<number>``, the number random for the first of a millisecond:
a server that has lost its newest events, by a failover, say, makes no id a second time.
An empty channel has a head, too, without a key of its own: publishers keep marks in
one hash, ``ss:empty``, and change a channel's when they make its key. The first event
names the mark as its predecessor, and no mark comes a second time: who has it has
missed nothing, whatever has expired, or was evicted or flushed since. Reads write
nothing but the first mark of a prefix; where they may not, they do without.

What may be lost is what the server loses: see its ``appendfsync``, and ``WAIT``. Keys
that are evicted or flushed show as a reset. Redis 6.2, or any Valkey.
"""

try:
    import redis  # noqa: F401 (so that it is said here)
except ImportError as error:
    raise ImportError(
        "redis: needs the package redis: pip install 'syncstream-wsgi[redis]'"
    ) from error

from .broker import RedisBroker

__all__ = ["RedisBroker"]
