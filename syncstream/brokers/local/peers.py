"""The processes that listen to a log: a socket each in one folder, to wake them by."""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
from contextlib import suppress
from typing import Any

from ...runtime.clock import time
from ...runtime.sockets import native
from ...runtime.waiting import say

__all__ = ["Peers", "datagrams"]

log = logging.getLogger("syncstream.brokers.local")


class Peers:
    """The listening processes, including this one: sockets in one folder."""

    def __init__(self, path: str) -> None:
        self._folder = f"{path}/wake"
        self._socket: Any = None  # made at the first wake
        self._names: list[str] = []
        self._changed: int | None = None
        self._identity: tuple[int, int] | None = None  # the folder's device and inode

    def wake(self) -> None:
        """Wake them all, without blocking."""
        try:
            self._look()
            if self._socket is None:
                self._socket = datagrams()
                self._socket.setblocking(False)
        except OSError:  # the folder was removed, or no descriptor is left
            return
        for name in self._names:
            try:
                self._socket.sendto(b"\0", name)
            except BlockingIOError:
                pass  # its queue is full: it has been woken already
            except ConnectionRefusedError:
                # No process has it open: its process was killed.
                with suppress(OSError):
                    self._remove(os.path.basename(name))
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOBUFS):
                    text = "the listener of %s could not be woken: %s"
                    say(log, logging.DEBUG, text, name, error)

    def _remove(self, name: str) -> None:
        """Remove a socket from the folder, and nothing else.

        Users that share the folder may have replaced it by a link, or put other files
        into it.
        """
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        folder = os.open(self._folder, flags)
        try:
            found = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if stat.S_ISSOCK(found.st_mode):
                os.unlink(name, dir_fd=folder)
        finally:
            os.close(folder)

    def _look(self) -> None:
        found = os.lstat(self._folder)  # do not follow a link
        if not stat.S_ISDIR(found.st_mode):
            raise NotADirectoryError(f"{self._folder} must be a directory")
        changed, folder = found.st_mtime_ns, (found.st_dev, found.st_ino)
        if (changed, folder) == (self._changed, self._identity):
            return
        self._identity = folder
        with os.scandir(self._folder) as entries:
            self._names = [entry.path for entry in entries if _is_socket(entry)]
        # A socket made in the same tick of the clock does not change the folder's time,
        # and some file systems have whole seconds (ext4 with inodes of 128 bytes).
        is_settled = abs(time.time_ns() - changed) > 1_500_000_000
        self._changed = changed if is_settled else None

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()


def _is_socket(entry: os.DirEntry[str]) -> bool:
    try:
        return stat.S_ISSOCK(entry.stat(follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def datagrams() -> Any:
    return native(socket, "socket")(socket.AF_UNIX, socket.SOCK_DGRAM)
