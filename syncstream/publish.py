"""Publishing over HTTP: a small WSGI application, for programs that are not Python.

``POST /CHANNEL`` with a token; the body is the event's data. Mount it beside the
application, by werkzeug's DispatcherMiddleware for one, and where only those can reach
it who may publish.
"""

from __future__ import annotations

import hmac
import json
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from werkzeug.exceptions import (
    BadRequest,
    HTTPException,
    LengthRequired,
    RequestEntityTooLarge,
)
from werkzeug.wrappers import Request, Response

from .channels.hub import Hub
from .errors import BrokerError, Denied, PayloadTooLarge, Unavailable
from .protocol import ndjson
from .protocol.sse import Event

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["publish_app"]

MAX_BODY = 16 << 20  # bytes, of all lines together
# A batch is one piece: other publishers wait until it is stored. It is counted before
# anything is made of it: 16 MiB of "1\n" would be 2 GB of events.
MAX_LINES = 1000
MAX_QUERY = 8192  # characters, encoded: tags are stored with each event of a batch
_MAX_DIGITS = 4300  # of an integer: more, and Python does not read it
_ARGUMENTS = frozenset(("event", "retry", "only", "exclude"))
_SEVERAL = frozenset(("only", "exclude"))
_RETRY_AFTER = 2  # seconds
_TOKEN = re.compile("[!-~]+")


def publish_app(hub: Hub, *, token: str | Iterable[str]) -> WSGIApplication:
    """Return a WSGI application that publishes what is posted to it.

    A request is ``POST /CHANNEL``, with ``Authorization: Bearer TOKEN``. Its body is
    the event's data, UTF-8; or, as ``application/x-ndjson`` (or another of
    `ndjson.MEDIA_TYPES`), several events, the JSON of one a line, which are published
    in one go. ``?event=``, ``?retry=``, and ``?only=`` and ``?exclude=``, which may
    come several times, are those of `Hub.publish`. No others are taken.

    A body has `MAX_BODY` bytes and `MAX_LINES` lines at most, empty ones included; a
    query, `MAX_QUERY` characters; an event, `Hub`'s ``max_payload``. Larger ones are
    refused as a whole, before they are read where their length is given.

    The answer is JSON: ``{"ids": ["5-8f1c22aa"]}``, in the order of the events. Errors
    have ``{"error": "…"}``: 400 what was sent is wrong, 401 the token, 403 the engine
    does not allow this channel, 405 the method, 411 Content-Length is needed, 413 it
    is too large, 503 nothing was stored (come again after Retry-After), 504 it
    may have been stored.

    Args:
        hub: Where to publish.
        token: What callers must present, printable ASCII without spaces; several
            while one replaces another.

    Raises:
        TypeError, ValueError: A token is no text, or empty, or there is none.
    """
    tokens = [token] if isinstance(token, str) else list(token)
    if not tokens:
        raise ValueError("token must be given")
    for each in tokens:
        if not isinstance(each, str):
            raise TypeError(f"token must be str, got {type(each).__name__}")
        if not _TOKEN.fullmatch(each):  # a header could not carry it; it is not shown
            raise ValueError(
                "token must be printable ASCII, without spaces or line ends"
            )
    keys = [each.encode() for each in tokens]

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        return _answer(hub, keys, Request(environ))(environ, start_response)

    return app


def _answer(hub: Hub, keys: list[bytes], request: Request) -> Response:
    # Not by werkzeug, which takes a token with "=" in it for something else.
    kind, _, given = request.environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    if kind.lower() != "bearer" or not given.strip():
        return _error(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})
    # All of them, in constant time: how long it takes tells nothing.
    text = given.strip().encode("latin-1", "replace")
    matches = [hmac.compare_digest(key, text) for key in keys]
    if not any(matches):
        return _error(401, "the token is wrong", {"WWW-Authenticate": "Bearer"})
    if request.method != "POST":
        return _error(405, "post it", {"Allow": "POST"})
    try:
        channel = _decoded("channel", request.environ.get("PATH_INFO", ""))
        arguments = _arguments(request.environ.get("QUERY_STRING", ""))
        only, exclude = arguments.pop("only", None), arguments.pop("exclude", [])
        if only is not None:  # `?only=`, a computed list that is empty, is nobody
            only = [tag for tag in only if tag]
        events = list(_events(hub, _body(request), request.mimetype, arguments))
        ids = hub.publish_many(
            channel.removeprefix("/"), events, only=only, exclude=exclude
        )
    except PayloadTooLarge as error:
        return _error(413, str(error))
    except RequestEntityTooLarge:
        return _error(413, f"a body must have {MAX_BODY} bytes at most")
    except HTTPException as error:  # no length; a body that ends early
        return _error(error.code or 400, str(error.description))
    except Denied as error:  # not 503: it will not pass by itself
        return _error(403, str(error))
    except Unavailable as error:
        return _error(503, str(error), {"Retry-After": str(_RETRY_AFTER)})
    except (ValueError, TypeError) as error:
        if hub.is_closed:  # the server is about to stop; the request may be right
            return _error(503, str(error), {"Retry-After": str(_RETRY_AFTER)})
        return _error(400, str(error))
    except BrokerError as error:
        return _error(504, f"it may have been stored: {error}")
    return _json(200, {"ids": ids})


def _decoded(name: str, text: str) -> str:
    """Return text of the environ, whose characters are bytes, as what it means.

    Raises:
        ValueError: It is not UTF-8. (What is replaced would be another channel.)
    """
    try:
        return text.encode("latin-1").decode()
    except UnicodeError:
        raise ValueError(f"{name} must be UTF-8") from None


def _arguments(query: str) -> dict[str, Any]:
    """Return the arguments of a query: lists of those that may come several times.

    Raises:
        ValueError: One is unknown, is there twice, or is wrong; or all are too long.
    """
    if len(query) > MAX_QUERY:
        raise ValueError(f"the query must have {MAX_QUERY} characters at most")
    found: dict[str, Any] = {}
    try:
        pairs = parse_qsl(
            _decoded("the query", query), keep_blank_values=True, errors="strict"
        )
    except UnicodeError:
        raise ValueError("the query must be UTF-8") from None
    for name, value in pairs:
        if name not in _ARGUMENTS:
            known = ", ".join(sorted(_ARGUMENTS))
            raise ValueError(f"the query may have {known}, got {name[:100]!r}")
        if name in _SEVERAL:
            found.setdefault(name, []).append(value)
        elif name in found:
            raise ValueError(f"{name} must be given once")
        else:
            found[name] = value
    retry = found.get("retry")
    if retry is not None:
        if not (retry.isascii() and retry.isdecimal()) or len(retry) > _MAX_DIGITS:
            raise ValueError(f"retry must be whole milliseconds, got {retry[:100]!r}")
        found["retry"] = int(retry)
    return found


def _body(request: Request) -> bytes:
    """Return the body.

    Raises:
        HTTPException: It has no length that is known, is too large, or ends early.
    """
    length = request.environ.get("CONTENT_LENGTH") or ""
    environ = request.environ
    is_chunked = "HTTP_TRANSFER_ENCODING" in environ and not length
    # Werkzeug takes a length that is none for 0, and would publish an empty event.
    if length and not (length.isascii() and length.isdecimal()):
        raise BadRequest("Content-Length must be a whole number")
    if is_chunked and not environ.get("wsgi.input_terminated", False):
        raise LengthRequired("Content-Length must be given: the server reads no chunks")
    if len(length) > len(str(MAX_BODY)):  # leading zeros, too
        raise RequestEntityTooLarge
    request.max_content_length = MAX_BODY + 1  # it is cut off there, without a word
    body = request.get_data(cache=False)
    if len(body) > MAX_BODY:
        raise RequestEntityTooLarge
    # gunicorn's input ends where a client has gone, too; and half is no event.
    if length and len(body) != int(length):
        raise BadRequest("the body ended early")
    return body


def _events(
    hub: Hub, body: bytes, mimetype: str, options: dict[str, Any]
) -> Iterator[Event]:
    """Yield the events of a body.

    Raises:
        ValueError: The body is no text, or a line no JSON.
        PayloadTooLarge: There are too many lines, or one is too long.
    """
    if mimetype not in ndjson.MEDIA_TYPES:
        # As an event, many short lines take several times that.
        hub.payloads.check_size(body)
        yield Event(_text("the body", body), **options)
        return
    if body.count(b"\n") + (not body.endswith(b"\n")) > MAX_LINES:
        raise PayloadTooLarge(f"a body must have {MAX_LINES} lines at most")
    is_empty = True
    for number, line in enumerate(body.split(b"\n"), 1):
        hub.payloads.check_size(line)
        text = _text(f"line {number}", line).strip()
        if text:
            is_empty = False
            _check_json(number, text)
            yield Event(text, **options)
    if is_empty:
        raise ValueError("the body has no line")


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} must be UTF-8: {error.reason}") from None


def _check_json(number: int, text: str) -> None:
    try:
        json.loads(text, parse_constant=_refuse, parse_int=_check_digits)
    except ValueError as error:
        raise ValueError(f"line {number} is not JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"line {number} is nested too deeply") from None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _check_digits(text: str) -> int:
    # It is not made: that takes the square of its digits, where Python has no limit.
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number may have {_MAX_DIGITS} digits at most")
    return 0


def _json(status: int, value: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(
        json.dumps(value) + "\n",
        status=status,
        headers=headers,
        mimetype="application/json",
    )


def _error(status: int, text: str, headers: dict[str, str] | None = None) -> Response:
    return _json(status, {"error": text}, headers)
