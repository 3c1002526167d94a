"""Greenlets that take turns with the code that resumes them, in its own thread.

Nothing runs beside them: whoever resumes one waits for its next turn. What one of them
waits for, it waits for as its parent would: in gevent's hub or, in a thread without a
hub, with the thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["check_greenlets", "make_inner", "outermost"]

_MARK = "syncstream_inner"


def check_greenlets(what: str) -> None:
    """Refuse what needs greenlets where they are not installed.

    Args:
        what: What needs them.

    Raises:
        ImportError: The package is missing; the message says what to install.
    """
    try:
        import greenlet  # noqa: F401 (whether it is there)
    except ImportError as error:
        raise ImportError(
            f"{what} needs the package greenlet,"
            " run pip install 'syncstream-wsgi[push]'"
        ) from error


def make_inner(run: Callable[..., object]) -> Any:
    """Return a new greenlet, a child of the running one."""
    import greenlet

    inner: Any = greenlet.greenlet(run)
    setattr(inner, _MARK, True)
    return inner


def outermost(greenlet: Any) -> Any:
    """Return the greenlet that runs this one, directly or not; itself for others."""
    while hasattr(greenlet, _MARK):
        greenlet = greenlet.parent
    return greenlet
