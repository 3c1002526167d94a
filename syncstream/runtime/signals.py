"""SIGPIPE and threads: blocked where a write must not kill the process.

Python ignores SIGPIPE from its start, so that a write to a peer that has gone is an
error, EPIPE. An application may set SIG_DFL; then it kills the process, unless the
writing thread blocks it. A thread inherits what its creator blocks, and so do the
programs that it starts, which would outlive the end of their pipes: a thread that runs
the application's code unblocks it first.
"""

from __future__ import annotations

import signal

__all__ = ["block_sigpipe", "unblock_sigpipe"]

_is_ours = False  # it was not blocked already


def block_sigpipe() -> None:
    """Block SIGPIPE in this thread, for good."""
    global _is_ours
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})
    _is_ours = _is_ours or signal.SIGPIPE not in before


def unblock_sigpipe() -> None:
    """Undo what a thread has inherited of `block_sigpipe`, in the new thread."""
    if _is_ours:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPIPE})
