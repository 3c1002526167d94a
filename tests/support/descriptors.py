"""What a process has open, so that a test finds what it has left."""

import contextlib
import os
from collections import Counter


def open_files() -> Counter[str]:
    """Count this process's descriptors by what they are: ``socket:[4711]``, a path.

    Count what is more afterwards: what earlier tests have left may go meanwhile.

    >>> before = open_files()
    >>> open_files() - before
    Counter()
    """
    found: Counter[str] = Counter()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the list's own, for one
            found[os.readlink(f"/proc/self/fd/{number}")] += 1
    return found
