"""What the frameworks' ``@sse`` decorators share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["decorator"]

Respond = Callable[[Iterable[Any], dict[str, Any]], Any]
View = Callable[..., Any]


def decorator(respond: Respond) -> Any:
    """Return the decorator that turns a generator view into an event stream.

    Args:
        respond: Makes a framework's SSEResponse of a source and its options.
    """

    def sse(view: View | None = None, **options: Any) -> Any:
        """Turn a generator view into a view that returns an SSEResponse.

        Use it as ``@sse`` or ``@sse(retry=…, end=…)``, below the framework's own
        decorator. What the view yields, and the options, are those of
        `SSEResponse`. A view that returns something else than a generator, such
        as a redirect, is left to the framework.

        Raises:
            TypeError: The view is asynchronous, or not a function.
        """
        if view is None:
            return functools.partial(sse, **options)
        if not callable(view):
            raise TypeError(f"@sse takes a view function, got {view!r}")
        if inspect.iscoroutinefunction(view) or inspect.isasyncgenfunction(view):
            raise TypeError(f"@sse takes a synchronous view, make it a def: {view!r}")

        @functools.wraps(view)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = view(*args, **kwargs)
            if not inspect.isgenerator(result):
                return result
            return respond(result, options)

        return wrapper

    return sse
