"""Django REST framework: renderers with which its views accept clients of streams.

REST framework refuses a request with 406 unless a renderer has a media type that the
client accepts. An EventSource accepts ``text/event-stream`` only. The streams
themselves are responses of `syncstream.django`, which need no renderer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rest_framework.renderers import JSONRenderer

__all__ = ["EventStreamRenderer", "NDJSONRenderer"]


class _StreamRenderer(JSONRenderer):
    """Renders what is no stream, such as an error, as JSON, which it calls JSON."""

    def render(
        self,
        data: Any,
        accepted_media_type: str | None = None,
        renderer_context: Mapping[str, Any] | None = None,
    ) -> bytes:
        response: Any = (renderer_context or {}).get("response")
        # A page of the browsable API shows what we render, and is HTML all the same.
        is_ours = getattr(response, "accepted_renderer", None) is self
        if is_ours and response.content_type is None:
            response["Content-Type"] = JSONRenderer.media_type
        found: bytes = super().render(data, accepted_media_type, renderer_context)
        return found


class EventStreamRenderer(_StreamRenderer):
    """Lets a view accept an EventSource.

    Put it into a view's ``renderer_classes``, or into ``DEFAULT_RENDERER_CLASSES``. Its
    format, as in ``?format=sse``, is "sse". A `Response`, an error's for example, is
    sent as JSON.
    """

    media_type = "text/event-stream"
    format = "sse"


class NDJSONRenderer(_StreamRenderer):
    """Lets a view accept clients that ask for ``application/x-ndjson``.

    As `EventStreamRenderer`; its format is "ndjson".
    """

    media_type = "application/x-ndjson"
    format = "ndjson"
