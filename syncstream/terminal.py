"""What commands print: text without control characters, styles, and to closed pipes."""

from __future__ import annotations

import os
import sys
from typing import TextIO

__all__ = ["discard", "fail", "has_colours", "printable"]


def printable(text: str) -> str:
    """Return text with control characters as escapes, but for LF and tabs.

    Text of a server's must not give orders to the terminal.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text
    )


def fail(message: str, status: int = 1) -> int:
    """Print an error; return the exit status."""
    if sys.stderr is not None:  # otherwise print() would take the standard output
        print(f"syncstream: {printable(message)}", file=sys.stderr)
    return status


def has_colours(file: TextIO) -> bool:
    """Tell whether to colour what is written there (https://no-color.org/)."""
    environ = os.environ
    return (
        file.isatty() and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"
    )


def discard(file: TextIO) -> None:
    """Send to nowhere what Python still has to write: nobody reads it any more.

    At the exit Python flushes once more, and would report the same error again.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, file.fileno())
    os.close(nowhere)
