"""Flask: a decorator for generator views. The responses are syncstream's own."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from .views import decorator
from .wsgi import SSEResponse

__all__ = ["sse"]


def _respond(source: Iterable[Any], options: dict[str, Any]) -> SSEResponse:
    # Flask's request ends before the generator starts; a view reads `request`.
    flask = sys.modules.get("flask")
    if flask is not None and flask.has_request_context():
        source = flask.stream_with_context(source)
    return SSEResponse(source, **options)


sse = decorator(_respond)
