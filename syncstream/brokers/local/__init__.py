"""``local:``, the broker for one machine: its processes share a file and nothing else.

Events are rows of an SQLite database in WAL mode. A process that has stored some wakes
the others with a datagram to the Unix socket of each listener. A lost wake delays its
events by up to half a second, because each listener also looks that often unasked.

The rules:

- Of all processes, one writes at a time, under a flock: ids are in the order of the
  commits, and no reader sees a hole. Trimming, checkpoints, opening and closing also
  happen under the lock: the WAL stays small (unlocked, with constant readers, it grew
  to 958 MB in 7 s), and checkpoints never overlap a commit
  (https://sqlite.org/wal.html#walresetbug).
- Only native threads wait for the disk or for a lock: a writer, a listener, and, for a
  gevent hub, a reader. Simultaneous publishes become one transaction. (A thread writes
  itself if no other one does: passing the job on and waiting takes as long again.)
- Nothing is open during a fork, and no thread is inside SQLite: a child would inherit
  SQLite's knowledge of the file and its locks, and trust it
  (https://sqlite.org/howtocorrupt.html 2.6). So a fork waits for the transactions that
  have begun, and closes the files; later uses open them again.
- A removed or replaced file is noticed before it is used: the log consists of three
  files, and a process uses one set of them. A process that finds another set closes its
  own without a checkpoint, which would overwrite newer events, and logs it; events that
  it stored meanwhile are `Uncertain`. Removing a WAL loses the last events: the next
  process to open the log breaks the chains of all channels once, so that no reader
  continues over the gap. The files' times are kept fresh, so that cleaners of temporary
  directories spare them.
- Files belong to the folder's group if the folder has the setgid bit and all rights for
  the group (2770), and all members may use them; otherwise only the owner may.

Ids are ``<number>-<nonce>`` in hexadecimal digits (see `ids`), with a number that
counts a channel's events. A channel without events has the head ``0-<nonce>``, with one
nonce for the whole log.
"""

from .broker import LocalBroker

__all__ = ["LocalBroker"]
