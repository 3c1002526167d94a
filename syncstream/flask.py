"""Flask: decorators for views. The responses are syncstream's own."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import GeneratorType
from typing import Any

from .streams.answers import checked_return
from .streams.source import name_as
from .wsgi.decorator import decorator, push_decorator
from .wsgi.responses import SSEResponse, StreamResponse
from .wsgi.streaming import finish_wsgi, streaming_decorator

__all__ = ["sse", "streaming", "with_sse"]


def _checked(source: Any) -> Iterator[Any]:
    """Keep the return value of a generator or a view: Flask's wrapper drops it."""
    returned = checked_return((yield from source))
    if returned is not None:
        raise returned


def _in_request(source: Iterable[Any]) -> Iterable[Any]:
    # Flask's request context ends before the generator starts, and a generator view
    # reads `request`.
    flask = sys.modules.get("flask")
    if flask is None or not flask.has_request_context():
        return source
    wrapped: Iterable[Any] = flask.stream_with_context(_checked(source))
    if isinstance(wrapped, GeneratorType):
        name_as(wrapped, source)
    return wrapped


sse = decorator(SSEResponse, prepare=_in_request)
with_sse = push_decorator(SSEResponse, prepare=_in_request)
streaming = streaming_decorator(
    StreamResponse, SSEResponse, prepare=_in_request, finish=finish_wsgi
)
