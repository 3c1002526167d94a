"""Responses and errors of frameworks that a source yields by mistake.

``abort(404)``, ``raise Http404`` and ``return redirect(...)`` decide what the head of
a response says. In a generator they come too late: an event stream's head has left
before its generator begins.
"""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["Returned", "checked_return", "is_answer", "status_of"]

# By the modules that define them: none is imported for this.
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
    """A generator has returned what only a plain view can answer by."""


def is_answer(value: object) -> bool:
    """Tell a framework's response, or an exception that it answers by a status."""
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
    """Return what is wrong with a generator's return value, ``None`` if nothing is.

    Most say nothing by it, or return what another generator takes by ``yield from``.
    """
    is_pair = (  # Flask's body, status, headers
        isinstance(value, tuple)
        and len(value) in (2, 3)
        and isinstance(value[1], int)
        and 100 <= value[1] < 600
    )
    if not (is_pair or is_answer(value)):
        return None
    # Not the value: what it says is the user's, and this is for the log.
    status = value[1] if is_pair else getattr(value, "status_code", "?")
    what = f"a {type(value).__name__} of status {status}"
    return Returned(f"a stream's generator returned {what}, which nobody receives")


def status_of(error: BaseException) -> int:
    """Return the status, 400 to 599, that an exception asks for; 500 by default."""
    if not is_answer(error):
        return 500
    found = [getattr(error, name, None) for name in ("status_code", "code")]
    found += [_DJANGO.get(kind.__name__) for kind in type(error).__mro__]
    return next((s for s in found if isinstance(s, int) and 400 <= s < 600), 500)
