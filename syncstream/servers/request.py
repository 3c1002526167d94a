"""What a request says of its client, whichever framework has read its headers."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs

__all__ = ["EVENT_TYPE", "last_event_id", "names_event_stream"]

EVENT_TYPE = "text/event-stream"

_REFUSED = re.compile(r"q\s*=\s*0(?:\.0*)?")


def last_event_id(request: Any) -> str | None:
    """Return the id of the client's last event, ``None`` if it sends none.

    The header Last-Event-ID comes first. Clients that cannot set headers may send
    ``last_event_id`` or ``lastEventId`` in the query. Blank values count as missing.
    The id comes from outside: expect any text.

    Args:
        request: A request of Flask, Django, Bottle, Pyramid or Falcon, or a WSGI
            environ.

    Raises:
        TypeError: The argument is neither.
    """
    environ = _environ_of(request)
    header: str = environ.get("HTTP_LAST_EVENT_ID", "")
    if header and not header.isspace():
        # Browsers send UTF-8, which PEP 3333 decodes as Latin-1.
        return header.encode("latin-1", "replace").decode(errors="replace")
    text: str = environ.get("QUERY_STRING", "")
    if "last_event_id=" not in text and "lastEventId=" not in text:
        return None
    try:
        query = parse_qs(text, errors="replace")  # without empty values
    except ValueError:  # too many fields
        return None
    for name in ("last_event_id", "lastEventId"):
        for id in query.get(name, ()):
            if not id.isspace():  # as with the header, where HTTP strips blanks
                return id
    return None


def _environ_of(request: Any) -> Mapping[str, Any]:
    """Return a request's environ: Django keeps it in META, Falcon in env."""
    if type(request) is dict or isinstance(request, Mapping):
        return request
    for name in ("environ", "META", "env"):
        environ = getattr(request, name, None)
        if isinstance(environ, Mapping):
            return environ
    raise TypeError(f"request must be a request or a WSGI environ, got {request!r}")


@functools.lru_cache(maxsize=64)
def names_event_stream(accept: str) -> bool:
    """Tell whether an Accept header asks for event streams by name (RFC 9110 §12.5.1).

    ``*/*`` and ``text/*`` do not count: curl, fetch and requests send them with every
    request. ``q=0`` is a refusal.
    """
    accept = accept.lower()
    if EVENT_TYPE not in accept:
        return False
    for item in accept.split(","):
        name, *parameters = (part.strip() for part in item.split(";"))
        if name == EVENT_TYPE:
            return not any(_REFUSED.fullmatch(each) for each in parameters)
    return False
