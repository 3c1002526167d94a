"""Responses and errors of frameworks that a source raises or returns by mistake.

``abort(404)``, ``raise Http404`` and ``return redirect(...)`` choose a response's
status and headers. In a generator they come too late: an event stream's head has left
before its generator begins.
"""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["Returned", "checked_return", "failure_of", "is_answer", "status_of"]

# By the modules that define them, none of which is imported for this.
_ANSWERS = {
    "werkzeug.exceptions": ("HTTPException",),
    "werkzeug.sansio.response": ("Response",),
    "django.http": ("Http404", "HttpResponseBase"),
    "django.core.exceptions": ("PermissionDenied", "SuspiciousOperation", "BadRequest"),
    "rest_framework.exceptions": ("APIException",),
    "bottle": ("BaseResponse",),  # its HTTPError and HTTPResponse
    "falcon": ("HTTPError", "HTTPStatus", "Response"),
    "webob": ("Response",),  # Pyramid's, and its HTTP exceptions
}
_DJANGO = {"Http404": 404, "PermissionDenied": 403, "SuspiciousOperation": 400}
_DJANGO["BadRequest"] = 400


class Returned(TypeError):
    """A source has returned a response, which only plain views can return."""


def is_answer(value: object) -> bool:
    """Tell whether a value is a framework's response, or an exception with a status."""
    for name, types in _ANSWERS.items():
        module = sys.modules.get(name)
        if module is None:
            continue
        for kind in types:
            found = getattr(module, kind, None)
            if isinstance(found, type) and isinstance(value, found):
                return True
    return False


def checked_return(value: Any) -> Returned | None:
    """Return an error if a generator's return value is a response, else ``None``.

    Other values are fine: another generator may take them with ``yield from``.
    """
    is_pair = (  # Flask's body, status, headers
        isinstance(value, tuple)
        and len(value) in (2, 3)
        and isinstance(value[1], int)
        and 100 <= value[1] < 600
    )
    if not (is_pair or is_answer(value)):
        return None
    # Do not show the value: it holds the user's data, and this goes to the log.
    status = value[1] if is_pair else getattr(value, "status_code", "?")
    what = f"a {type(value).__name__} of status {status}"
    return Returned(
        f"a stream's source returned {what}, which no client receives: return it"
        " from a plain view, before the stream"
    )


def failure_of(error: BaseException, name: str) -> BaseException:
    """Return an error of a view or a source as one that ends no iteration.

    One that leaks from a ``next()`` would pass for the end of the items: as for
    generators (https://peps.python.org/pep-0479/), it is a RuntimeError.

    Args:
        error: What it has raised.
        name: What the log calls it.
    """
    if not isinstance(error, (StopIteration, StopAsyncIteration)):
        return error
    found = RuntimeError(f"{name} raised {type(error).__name__}")
    found.__cause__ = error
    return found


def status_of(error: BaseException) -> int:
    """Return the status, 400 to 599, that an exception asks for; 500 by default."""
    if not is_answer(error):
        return 500
    found = [getattr(error, name, None) for name in ("status_code", "code")]
    found += [_DJANGO.get(kind.__name__) for kind in type(error).__mro__]
    return next((s for s in found if isinstance(s, int) and 400 <= s < 600), 500)
