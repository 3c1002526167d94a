"""Publishing over HTTP: a small WSGI application, for programs that are not Python.

``POST /CHANNEL`` with a token; the body is the event's data. Mount it beside the
application, for example with werkzeug's DispatcherMiddleware, at an address that only
your publishers can reach. The command ``syncstream publish`` is in ``__main__``.
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
# A batch is stored as a whole, and other publishers wait for it. Lines are counted
# before they are decoded: 16 MiB of "1\n" would become 2 GB of events.
MAX_LINES = 1000
MAX_QUERY = 8192  # characters, encoded: each event of a batch is stored with the tags
_MAX_DIGITS = 4300  # the longest integer that Python reads
_ARGUMENTS = frozenset(("event", "retry", "only", "exclude"))
_SEVERAL = frozenset(("only", "exclude"))
_RETRY_AFTER = 2  # seconds
_TOKEN = re.compile("[!-~]+")


def publish_app(hub: Hub, *, token: str | Iterable[str]) -> WSGIApplication:
    """Return a WSGI application that publishes the bodies posted to it.

    A request is ``POST /CHANNEL`` with ``Authorization: Bearer TOKEN``. Its body is the
    data of one event, in UTF-8. With the type ``application/x-ndjson`` (or another of
    `ndjson.MEDIA_TYPES`), each line is the JSON data of one event, and all are
    published in one call. The query may have ``event`` and ``retry`` once, and ``only``
    and ``exclude`` several times, as for `Hub.publish`; other names are refused.

    A body has at most `MAX_BODY` bytes and `MAX_LINES` lines, including empty ones; a
    query, `MAX_QUERY` characters; an event, the hub's ``max_payload``. A larger request
    is refused as a whole, without reading the body if its Content-Length is too large.

    The answer is JSON: ``{"ids": ["5-8f1c22aa"]}``, in the order of the events. Errors
    have ``{"error": "…"}`` and a status: 400 the request is wrong, 401 the token is
    missing or wrong, 403 the engine denies access to this channel, 405 the method is
    not POST, 411 Content-Length is missing, 413 the request is too large, 503 nothing
    was stored (retry after Retry-After), 504 the events may have been stored.

    Args:
        hub: The hub that publishes the events.
        token: The token that callers must present, printable ASCII without spaces; give
            several to replace an old one without an interruption.

    Raises:
        TypeError: A token is not a ``str``.
        ValueError: A token is empty or contains other characters, or none is given.
    """
    tokens = [token] if isinstance(token, str) else list(token)
    if not tokens:
        raise ValueError("token must be at least one token, got none")
    for each in tokens:
        if not isinstance(each, str):
            raise TypeError(f"token must be str, got {type(each).__name__}")
        if not _TOKEN.fullmatch(each):  # no header can carry it; a secret is not shown
            raise ValueError(
                "token must be printable ASCII, without spaces or line ends"
            )
    keys = [each.encode() for each in tokens]

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        return _answer(hub, keys, Request(environ))(environ, start_response)

    return app


def _answer(hub: Hub, keys: list[bytes], request: Request) -> Response:
    # Not by werkzeug: it takes a token with "=" in it for parameters.
    kind, _, given = request.environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    if kind.lower() != "bearer" or not given.strip():
        return _error(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})
    # Compare with all tokens in constant time: the duration must reveal nothing.
    text = given.strip().encode("latin-1", "replace")
    matches = [hmac.compare_digest(key, text) for key in keys]
    if not any(matches):
        return _error(401, "the token is wrong", {"WWW-Authenticate": "Bearer"})
    if request.method != "POST":
        return _error(405, "the method must be POST", {"Allow": "POST"})
    try:
        channel = _decoded("channel", request.environ.get("PATH_INFO", ""))
        arguments = _arguments(request.environ.get("QUERY_STRING", ""))
        only, exclude = arguments.pop("only", None), arguments.pop("exclude", [])
        if only is not None:  # ``?only=``, an empty list, selects no subscriber
            only = [tag for tag in only if tag]
        events = list(_events(hub, _body(request), request.mimetype, arguments))
        ids = hub.publish_many(
            channel.removeprefix("/"), events, only=only, exclude=exclude
        )
    except PayloadTooLarge as error:
        return _error(413, str(error))
    except RequestEntityTooLarge:
        return _error(413, f"the body must have {MAX_BODY} bytes at most")
    except HTTPException as error:  # a missing length; a truncated body
        return _error(error.code or 400, str(error.description))
    except Denied as error:  # not 503: retrying does not help
        return _error(403, str(error))
    except Unavailable as error:
        return _error(503, str(error), {"Retry-After": str(_RETRY_AFTER)})
    except (ValueError, TypeError) as error:
        if hub.is_closed:  # the server is stopping, and the request may be right
            return _error(503, str(error), {"Retry-After": str(_RETRY_AFTER)})
        return _error(400, str(error))
    except BrokerError as error:
        return _error(504, f"it may have been stored: {error}")
    return _json(200, {"ids": ids})


def _decoded(name: str, text: str) -> str:
    """Return text of the environ, where each character stands for a byte, decoded.

    Raises:
        ValueError: It is not UTF-8. (Replacing bytes would give another channel.)
    """
    try:
        return text.encode("latin-1").decode()
    except UnicodeError:
        raise ValueError(f"{name} must be UTF-8") from None


def _arguments(query: str) -> dict[str, Any]:
    """Return the arguments of a query; ``only`` and ``exclude`` are lists.

    Raises:
        ValueError: An argument is unknown, given twice, or wrong, or the query is too
            long.
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
            raise ValueError(f"the query may contain {known}, got {name[:100]!r}")
        if name in _SEVERAL:
            found.setdefault(name, []).append(value)
        elif name in found:
            raise ValueError(f"{name} must be given once only")
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
        HTTPException: Its length is missing or wrong, it is too large, or ends early.
    """
    length = request.environ.get("CONTENT_LENGTH") or ""
    environ = request.environ
    is_chunked = "HTTP_TRANSFER_ENCODING" in environ and not length
    # Werkzeug reads a malformed length as 0: that would publish an empty event.
    if length and not (length.isascii() and length.isdecimal()):
        raise BadRequest("Content-Length must be a whole number")
    if is_chunked and not environ.get("wsgi.input_terminated", False):
        raise LengthRequired("Content-Length must be given: the server reads no chunks")
    if len(length) > len(str(MAX_BODY)):  # leading zeros, too
        raise RequestEntityTooLarge
    request.max_content_length = MAX_BODY + 1  # Werkzeug truncates the body silently
    body = request.get_data(cache=False)
    if len(body) > MAX_BODY:
        raise RequestEntityTooLarge
    # gunicorn's input just ends when the client has gone: do not publish half a body.
    if length and len(body) != int(length):
        raise BadRequest("the body ended early")
    return body


def _events(
    hub: Hub, body: bytes, mimetype: str, options: dict[str, Any]
) -> Iterator[Event]:
    """Yield the events of a body.

    Raises:
        ValueError: The body is not UTF-8, or a line is not JSON.
        PayloadTooLarge: There are too many lines, or one is too long.
    """
    if mimetype not in ndjson.MEDIA_TYPES:
        # Before it is decoded: encoded, many short lines take several times the size.
        hub.payloads.check_size(body)
        yield Event(_text("the body", body), **options)
        return
    if body.count(b"\n") + (not body.endswith(b"\n")) > MAX_LINES:
        raise PayloadTooLarge(f"the body must have {MAX_LINES} lines at most")
    is_empty = True
    for number, line in enumerate(body.split(b"\n"), 1):
        hub.payloads.check_size(line)
        text = _text(f"line {number}", line).strip()
        if text:
            is_empty = False
            _check_json(number, text)
            yield Event(text, **options)
    if is_empty:
        raise ValueError("the body must have at least one line")


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
    # Count instead of converting: without a limit of Python's, that is quadratic.
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number must have {_MAX_DIGITS} digits at most")
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
