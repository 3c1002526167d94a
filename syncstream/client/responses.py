"""`events` and `lines` of a response that somebody else has opened.

Each library gives its body in another way. What is used is what yields bytes as soon
as they come, and not once a buffer is full.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ..protocol.lines import LineBuffer
from ..protocol.sse import Decoder, Event

__all__ = ["READ_SIZE", "events", "lines"]

READ_SIZE = 65536
"""The maximum of bytes to read at once; a read returns what there is."""


def events(response: Any, *, last_event_id: str | None = None) -> Iterator[Event]:
    """Yield the events of a response as they come.

    Nothing is reconnected, and neither the status nor the content type is looked at.
    The response stays open: who has opened it closes it.

    Args:
        response: A response of requests (got with ``stream=True``), httpx (from
            ``client.stream(…)``), urllib3 (``preload_content=False``), niquests,
            ``http.client`` or ``urllib.request``; of the test clients of Werkzeug,
            Flask and Django; or any iterable of ``bytes``.
        last_event_id: The id in force before the first event.

    Yields:
        As `EventSource`: ``.data`` is text, ``.event`` is ``None`` for "message", and
        ``.id`` is the last event id in force.

    Raises:
        TypeError: The response has no body that can be read here.
        RemoteProtocolError: A line or an event is larger than 4 MiB.
        Exception: Whatever the response's own library raises while it is read.
    """
    decoder = Decoder(last_event_id=last_event_id)
    return _events(_chunks(response), decoder)


def _events(chunks: Iterator[bytes], decoder: Decoder) -> Iterator[Event]:
    for chunk in chunks:
        yield from decoder.feed(chunk)
    decoder.close()


def lines(response: Any) -> Iterator[str]:
    """Yield the lines of a response as they come, such as those of NDJSON.

    A line ends in LF or CRLF, which is left out; text after the last line end is a
    line, too. Bytes that are not UTF-8 become U+FFFD.

    Args:
        response: As for `events`.

    Raises:
        TypeError: The response has no body that can be read here.
        Exception: Whatever the response's own library raises while it is read.
    """
    return _lines(_chunks(response))


def _lines(chunks: Iterator[bytes]) -> Iterator[str]:
    buffer = LineBuffer()
    for chunk in chunks:
        for line in buffer.split(chunk):
            yield _text(line)
    rest = buffer.rest()
    if rest:
        yield _text(rest)


def _text(line: bytes) -> str:
    return line.removesuffix(b"\r").decode(errors="replace")


def _chunks(response: Any) -> Iterator[bytes]:
    """Return the body's bytes, without a content encoding where the library undoes it.

    Raises:
        TypeError: The response has no body that can be read here.
    """
    if hasattr(response, "streaming_content"):  # Django's
        return iter(response.streaming_content)
    if hasattr(response, "iter_encoded"):  # Werkzeug's and Flask's
        return iter(response.iter_encoded())
    if hasattr(response, "iter_bytes"):  # httpx's
        return iter(response.iter_bytes())
    raw = getattr(response, "raw", None)  # of requests and niquests
    if raw is not None and hasattr(response, "iter_content"):
        if getattr(raw, "closed", False) or not hasattr(raw, "read1"):
            return iter(response.iter_content(READ_SIZE))  # it has been read already
        return _reads(raw, decode_content=True)  # which requests switches off
    if hasattr(response, "read1"):  # urllib3's, http.client's
        return _reads(response)
    if hasattr(response, "content") and not callable(response.content):
        return iter((response.content,))  # Django's that streams nothing
    if isinstance(response, Iterable) and not isinstance(
        response, (str, bytes, bytearray, memoryview)
    ):
        return _checked(response)
    raise TypeError(
        "response must be a response whose body can be read, or an iterable of bytes,"
        f" got {response!r}"
    )


def _reads(body: Any, **options: bool) -> Iterator[bytes]:
    while chunk := body.read1(READ_SIZE, **options):
        yield chunk


def _checked(body: Iterable[Any]) -> Iterator[bytes]:
    for chunk in body:
        if not isinstance(chunk, (bytes, bytearray, memoryview)):
            raise TypeError(f"response must yield bytes, got {chunk!r}")
        yield bytes(chunk)
