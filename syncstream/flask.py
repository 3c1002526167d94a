"""Flask: a decorator for generator views. The responses are syncstream's own."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from .views import decorator
from .wsgi import SSEResponse

__all__ = ["sse"]


def _in_request(source: Iterable[Any]) -> Iterable[Any]:
    # Flask's request ends before the generator starts; a view reads `request`.
    flask = sys.modules.get("flask")
    if flask is None or not flask.has_request_context():
        return source
    wrapped: Iterable[Any] = flask.stream_with_context(source)
    return wrapped


sse = decorator(SSEResponse, prepare=_in_request)
