"""How a source that another one reads is closed."""

from __future__ import annotations

import inspect
from typing import Any

__all__ = ["aclose", "close"]


def close(source: Any) -> None:
    """Close a plain source, if it can be closed."""
    method = getattr(source, "close", None)
    if method is not None:
        method()


async def aclose(source: Any) -> None:
    """Close an asynchronous source, if it can be closed."""
    method = getattr(source, "aclose", None) or getattr(source, "close", None)
    if method is not None:
        result = method()
        if inspect.isawaitable(result):
            await result
