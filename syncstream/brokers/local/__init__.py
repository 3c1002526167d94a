"""``local:``, the broker for one machine: its processes share a file, nothing else.

Events are rows of an SQLite database in WAL mode. Who has stored some wakes the
others by a datagram to the Unix socket of each process that listens; a wake that is
lost costs half a second, no event, because everybody looks that often unasked.

The rules:

- One writes at a time, of all processes, under a flock: so ids are in the order of the
  commits, and no reader sees a hole. What wears the log down, checkpoints, and opening
  and closing, too, happens under it: the WAL stays small (unlocked, with readers all
  the time, it grew to 958 MB in 7 s), and checkpoints never overlap a commit
  (https://sqlite.org/wal.html#walresetbug).
- Nothing waits for the disk or for a lock but native threads: a writer, a listener,
  and, for a gevent hub, a reader. What many publish at once is one transaction. (A
  thread that finds nobody else writing does it itself: to hand it over and to be
  woken would take as long again.)
- Nothing is open during a fork, and nobody is in SQLite: what it knows of a file, and
  its locks, a child would have, too, and believe (https://sqlite.org/howtocorrupt.html
  2.6). So a fork waits for the transactions that have begun, and closes; who needs the
  files after that opens them.
- A file that is removed, or replaced, is noticed before it is used: the log's state is
  in three, and a process has one set of them. Who finds another set closes all that it
  has without a checkpoint, which would undo what others have stored since, and says
  so; what it stored in the meantime is `Uncertain`. With a WAL, what was stored last is
  gone: whoever opens the log after that breaks the chains of all channels, once, so
  that nobody goes on over the gap. The files' times are kept fresh, so that what cleans
  temporary directories leaves them alone.
- Files have the folder's group if that has its setgid bit and is the group's (2770),
  and are then of all its members; else they are the owner's only.

Ids are ``<number>-<nonce>`` in hexadecimal digits: the number counts a channel's
events, the nonce is the event's own. A channel without events has the head
``0-<nonce>``, whose nonce is the log's.
"""

from .broker import LocalBroker

__all__ = ["LocalBroker"]
