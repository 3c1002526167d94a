"""SIGPIPE, blocked in threads whose writes must not kill the process.

Python ignores SIGPIPE from its start: a write to a peer that has gone fails with EPIPE.
An application may set SIG_DFL; then such a write kills the process, unless the writing
thread blocks the signal. Threads and programs inherit the signals that their creator
blocks, and a program that blocks SIGPIPE does not end when its output pipe closes. So a
thread that runs application code unblocks the signal first.
"""

from __future__ import annotations

import signal

__all__ = ["block_sigpipe", "unblock_sigpipe"]

_is_ours = False  # whether we blocked it, not the application


def block_sigpipe() -> None:
    """Block SIGPIPE in this thread, for good."""
    global _is_ours
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})
    _is_ours = _is_ours or signal.SIGPIPE not in before


def unblock_sigpipe() -> None:
    """Undo `block_sigpipe` in a new thread, which has inherited the block."""
    if _is_ours:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPIPE})
