"""`process_key`: which process this is, for all that belongs to one process only.

A pid is not enough: the child of a child may get the pid of an ancestor that has ended,
and would use that process's threads and streams, which it does not have. Python reports
most forks; a fork that it does not see, such as uWSGI's, is noticed by the pid.
"""

from __future__ import annotations

import os

__all__ = ["process_key"]

_keys: dict[int, object] = {}  # by pid; this process's only, once it has asked


def process_key() -> object:
    """Return an object that only this process has: compare it by ``is``.

    Two forks in a row that Python does not see, without a call of this function in
    between, count as one: then the pid alone decides.
    """
    pid = os.getpid()
    found = _keys.get(pid)
    if found is None:
        found = _keys.setdefault(pid, object())  # all threads get the same one
        for other in list(_keys):
            if other != pid:
                _keys.pop(other, None)
    return found


# The first of the package's calls in a forked child: the others compare keys.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keys.clear)
