"""Waits at the interpreter's exit, which a signal may end.

A handler that raises SystemExit or KeyboardInterrupt there wants the process to end. It
is ending already, and Python would print the exception as a failure of the exit.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["is_cut_short"]


def is_cut_short(wait: Callable[[], object]) -> bool:
    """Call what waits; return whether a signal's handler has ended it."""
    try:
        wait()
    except (KeyboardInterrupt, SystemExit):
        return True
    return False
