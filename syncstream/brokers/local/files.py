"""The log's folder: paths, owners, modes, and the lock."""

from __future__ import annotations

import fcntl
import os
import re
import stat
import tempfile
from contextlib import suppress
from math import inf

from ...errors import BrokerError, Unavailable
from ...runtime.clock import time
from ...runtime.sockets import native
from .. import shown

__all__ = [
    "FileTimes",
    "LOCK_TRY",
    "Lock",
    "SAFE",
    "SUFFIXES",
    "file_mode",
    "make_file",
    "make_wake",
    "network_kind",
    "path_of",
    "said",
    "settle",
]
FRESHEN = 60.0  # seconds between two updates of the files' times
SUFFIXES = "", "-wal", "-shm"  # of the database's files
LOCK_TRY = 0.002  # seconds between two tries to lock
SAFE = os.O_CLOEXEC | os.O_NOFOLLOW  # the folder may be a group's
_SHARED = stat.S_ISGID | stat.S_IRWXG  # the mode of a folder shared by a group
_MAX_PATH = 80  # bytes: sun_path takes 104 (macOS), with /wake/<pid>-<random>
_MOUNTS = "/proc/self/mounts"
# On these, locks and shared memory do not work between machines, or not reliably.
_NETWORK = (
    *("9p", "afs", "beegfs", "ceph", "cifs", "coda", "fuse", "glusterfs", "gpfs"),
    *("gfs2", "lustre", "ncpfs", "nfs", "nfs4", "ocfs2", "orangefs", "prl_fs"),
    *("smb3", "smbfs", "vboxsf", "virtiofs"),
)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,39}")
_RANDOM = re.compile(r"[0-9a-f]{8}")


# Where the files are.


def path_of(url: str) -> tuple[str, bool]:
    """Return the folder that a URL names, and whether it is in a private one."""
    scheme, _, rest = url.partition(":")
    if scheme != "local" or rest.startswith("//"):
        raise ValueError(
            f"url must be local:, local:NAME or local:/PATH, got {shown(url)}"
        )
    if rest.startswith("/"):
        path = os.path.normpath(rest)
        if path == "/" or "\0" in path:
            raise ValueError(
                f"url must name a folder below /, as in local:/PATH, got {path!r}"
            )
    elif not rest or _NAME.fullmatch(rest):
        # Not XDG_RUNTIME_DIR: logins have it, services and cron do not, and they would
        # not share a folder.
        name = f"syncstream-{os.geteuid()}"
        path = os.path.join(tempfile.gettempdir(), name, rest or "default")
    else:
        raise ValueError(
            "url must be local:NAME, with at most 40 letters, digits and . _ -, or"
            f" local:/PATH, got {shown(url)} with other text"
        )
    if len(os.fsencode(path)) > _MAX_PATH:
        raise ValueError(
            f"url must have a path of {_MAX_PATH} bytes at most, as Unix sockets are in"
            f" it, got {path!r}"
        )
    return path, not rest.startswith("/")


def _make(path: str, is_private: bool) -> None:
    """Make a folder if it is missing; refuse an unsafe one.

    Raises:
        Unavailable: The folder is unsafe, or on a network file system.
    """
    if is_private:
        parent = os.path.dirname(path)
        with suppress(FileExistsError):
            os.mkdir(parent, 0o700)
        found = os.lstat(parent)  # do not follow a link
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise Unavailable(
                f"{parent} must be a directory of user {os.geteuid()}: use another"
                " folder, with local:/PATH"
            )
        if found.st_mode & 0o077:
            raise Unavailable(
                f"{parent} must be closed to other users: chmod 700 {parent}, or use"
                " another folder, with local:/PATH"
            )
    with suppress(FileExistsError):
        os.mkdir(path, 0o700)
    _refuse_others(path)
    kind = network_kind(path)
    if kind is not None:
        raise Unavailable(
            f"{path} is on a network file system ({kind}), whose locks do not work"
            " between machines: use local:/PATH on a disk of this machine, or redis:"
            " for several machines"
        )
    make_wake(path)


def _refuse_others(path: str) -> None:
    """Refuse a folder in which other users could read and forge events."""
    user = os.geteuid()
    link, found = os.lstat(path), os.stat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise Unavailable(f"{path} must be a directory, and is not one")
    if found.st_mode & stat.S_IWOTH:
        raise Unavailable(
            f"{path} is writable for every user: chmod o-w {path}, or use another"
            " folder, with local:/PATH"
        )
    is_ours = not user or found.st_gid in {os.getegid(), *os.getgroups()}
    is_shared = found.st_mode & _SHARED == _SHARED and is_ours
    for owner in {link.st_uid, found.st_uid} - {0, user}:
        if not is_shared:
            raise Unavailable(
                f"{path} belongs to user {owner}, but this is user {user}: run as that"
                f" user, or share the folder with a group of both (chgrp GROUP {path};"
                f" chmod 2770 {path})"
            )


def file_mode(path: str) -> int:
    """Return the mode of the files in a folder."""
    return 0o660 if os.stat(path).st_mode & _SHARED == _SHARED else 0o600


def make_wake(path: str) -> None:
    """Make the folder of the sockets, with the rights of its parent."""
    wake = f"{path}/wake"
    with suppress(FileExistsError):
        os.mkdir(wake, 0o700)
    is_shared = file_mode(path) == 0o660
    settle(wake, 0o2770 if is_shared else 0o700, os.stat(path).st_gid)


def settle(path: str, mode: int, group: int) -> None:
    """Set the mode of a file of ours, and its group if a group shares the folder."""
    found = os.lstat(path)
    if os.geteuid() not in (0, found.st_uid) or stat.S_ISLNK(found.st_mode):
        return
    if mode & stat.S_IRWXG and found.st_gid != group:
        os.chown(path, -1, group, follow_symlinks=False)
    if found.st_mode & 0o7777 != mode:
        _change_mode(path, mode)


def _change_mode(path: str, mode: int) -> None:
    """Change a file's mode without following a link in its place."""
    if not hasattr(os, "O_PATH"):  # macOS, which has lchmod
        os.chmod(path, mode, follow_symlinks=False)
        return
    # Without opening it: closing a file of SQLite's drops SQLite's locks.
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISLNK(os.fstat(fd).st_mode):
            os.chmod(f"/proc/self/fd/{fd}", mode)
    finally:
        os.close(fd)


def make_file(folder: str, name: str) -> None:
    """Make an empty file if it is missing; it appears with its final mode."""
    path = f"{folder}/{name}"
    mode, group = file_mode(folder), os.stat(folder).st_gid
    if not os.path.lexists(path):
        new = f"{path}-{os.urandom(4).hex()}"
        os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode))
        try:
            settle(new, mode, group)
            with suppress(FileExistsError):
                os.link(new, path)
        finally:
            with suppress(FileNotFoundError):  # see `_remove_first_names`
                os.unlink(new)
    with suppress(FileNotFoundError):
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode):  # a link could lead anywhere
            raise Unavailable(f"{path} must be a plain file, and is not one")
        if found.st_nlink > 1:
            _remove_first_names(path, found)
        settle(path, mode, group)


def _remove_first_names(path: str, found: os.stat_result) -> None:
    """Remove the temporary name of a file whose maker was killed."""
    prefix = f"{os.path.basename(path)}-"
    for name in os.listdir(os.path.dirname(path)):
        first = f"{os.path.dirname(path)}/{name}"
        if _RANDOM.fullmatch(name.removeprefix(prefix)):
            with suppress(FileNotFoundError):
                if os.path.samestat(found, os.lstat(first)):
                    os.unlink(first)


def said(path: str, error: Exception) -> str:
    """Return an error's message, with advice if rights are missing."""
    text = f"{path}: {error}"
    rights = "unable to open database file", "readonly database", "read-only"
    if isinstance(error, PermissionError) or any(word in str(error) for word in rights):
        text += (
            " (to share the folder among users of one group: chgrp -R GROUP"
            f" {path}; chmod 2770 {path}; removed files are made again)"
        )
    return text


def network_kind(path: str) -> str | None:
    """Return the type of a path's file system if it is a network file system."""
    try:
        with open(_MOUNTS, "rb") as file:
            mounts = file.read()
    except FileNotFoundError:  # not Linux
        return None
    kind = _kind(os.path.realpath(path), os.fsdecode(mounts))
    # fuse-overlayfs is the root of rootless containers; its locks are this kernel's.
    is_network = kind.partition(".")[0] in _NETWORK and "overlay" not in kind
    return kind if is_network else None


def _kind(path: str, mounts: str) -> str:
    """Return the type of the file system that contains a path.

    Args:
        path: The path, without links.
        mounts: The text of /proc/self/mounts.
    """
    found = best = ""
    # Split at LF only: names of mounts may contain other line ends, unescaped.
    for line in mounts.removesuffix("\n").split("\n"):
        _, mount, kind, *_ = line.split(" ")
        mount = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), mount)
        is_in = path == mount or path.startswith(mount.rstrip("/") + "/")
        # Of two mounts on one point, the later one is visible.
        if is_in and len(mount) >= len(best):
            best, found = mount, kind
    return found


class FileTimes:
    """The times of the files: cleaners take old files for unused ones."""

    def __init__(self, path: str, is_private: bool) -> None:
        files = [f"log.db{suffix}" for suffix in SUFFIXES]
        # "/.", as the folder's name may be a link. Links inside are not followed: a
        # member of the group may have put them there.
        self._paths = [f"{path}/{name}" for name in (".", *files, "lock", "wake")]
        if is_private:
            self._paths.append(os.path.dirname(path))
        self._freshened = -inf

    def freshen(self, *others: str) -> None:
        """Keep them from ageing, and those of other files."""
        now = time.monotonic()
        if now - self._freshened < FRESHEN:
            return
        self._freshened = now
        for path in (*self._paths, *others):
            with suppress(OSError):  # another user's file, or a missing one
                os.utime(path, follow_symlinks=False)


class Lock:
    """The right to write, which one thread of one process has.

    It is a flock of a separate file, because closing any descriptor of SQLite's files
    drops SQLite's locks. A lock counts only while its file is in place.
    """

    def __init__(self, path: str, is_private: bool) -> None:
        self._path = path
        self._is_private = is_private
        self._fd = self._folder = -1

    def acquire(self, timeout: float | None = None) -> None:
        """Wait for the lock; this blocks the thread.

        Raises:
            Unavailable: It was not free within ``timeout`` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            self.open()
            self._wait(deadline)
            if self._is_current():
                return
            self.close()

    def try_acquire(self) -> bool:
        """Take the lock if it is free and its file open; return whether it was."""
        if self._fd < 0:
            return False
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if self._is_current():
            return True
        self.close()
        return False

    def open(self) -> None:
        """Open the lock's file; make it, and the folder, if they are missing."""
        if self._fd >= 0:
            return
        _make(self._path, self._is_private)
        # systemd-tmpfiles spares a directory with a lock.
        self._folder = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with suppress(BlockingIOError):  # a cleaner is checking it just now
                fcntl.flock(self._folder, fcntl.LOCK_SH | fcntl.LOCK_NB)
            make_file(self._path, "lock")
            self._fd = os.open(f"{self._path}/lock", os.O_RDWR | SAFE)
        except BaseException:
            self.close()
            raise

    def _wait(self, deadline: float | None) -> None:
        if deadline is None:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            return
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    message = f"{self._path}/lock is held by another process"
                    raise Unavailable(message) from None
                native(time, "sleep")(LOCK_TRY)
            else:
                return

    def _is_current(self) -> bool:
        try:
            found = os.stat(f"{self._path}/lock")
        except OSError:  # opening it again will raise the error
            return False
        return os.path.samestat(found, os.fstat(self._fd))

    def hold(self, timeout: float) -> bool:
        """Wait for the lock to close files, even if the lock's own file is gone.

        Returns:
            ``False`` if the lock could not be taken within ``timeout`` seconds.
        """
        if self._fd < 0:
            return False
        try:
            self._wait(time.monotonic() + timeout)
            if not self._is_current() and os.path.exists(f"{self._path}/lock"):
                self.close()  # other processes use the new file
                self.acquire(timeout)
        except (BrokerError, OSError):
            return False
        return True

    def release(self) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    def close(self) -> None:
        for fd in (self._fd, self._folder):
            if fd >= 0:
                os.close(fd)
        self._fd = self._folder = -1
