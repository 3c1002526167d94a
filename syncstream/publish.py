"""Publishing over HTTP: a small WSGI application, for programs that are not Python.

``POST /CHANNEL`` with a token; the body is the event's data. Mount it beside the
application, by werkzeug's DispatcherMiddleware for one, and where only those can reach
it who may publish.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from werkzeug.exceptions import HTTPException, RequestEntityTooLarge
from werkzeug.wrappers import Request, Response

from .errors import BrokerError, PayloadTooLarge, Unavailable
from .hub import Hub
from .protocol.sse import Event

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["publish_app"]

MAX_BODY = 16 << 20  # bytes
_NDJSON = frozenset(("application/x-ndjson", "application/jsonl"))
_RETRY_AFTER = 2  # seconds


def publish_app(hub: Hub, *, token: str | Iterable[str]) -> WSGIApplication:
    """Return a WSGI application that publishes what is posted to it.

    A request is ``POST /CHANNEL``, with ``Authorization: Bearer TOKEN``. Its body is
    the event's data, UTF-8; or, as ``application/x-ndjson``, several events, the JSON
    of one a line, which are published in one go. ``?event=``, ``?retry=``, and
    ``?only=`` and ``?exclude=``, which may come several times, are those of
    `Hub.publish`.

    The answer is JSON: ``{"ids": ["5-8f1c22aa"]}``, in the order of the events. Errors
    have ``{"error": "…"}``: 400 what was sent is wrong, 401 the token, 405 the method,
    413 it is too large, 503 nothing was stored (come again after Retry-After), 504 it
    may have been stored.

    Args:
        hub: Where to publish.
        token: What callers must present; several while one replaces another.

    Raises:
        TypeError, ValueError: A token is no text, or empty, or there is none.
    """
    tokens = [token] if isinstance(token, str) else list(token)
    if not tokens:
        raise ValueError("token must be given")
    for each in tokens:
        if not isinstance(each, str):
            raise TypeError(f"token must be str, got {type(each).__name__}")
        if not each:
            raise ValueError("token must not be empty")
    keys = [each.encode() for each in tokens]

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        return _answer(hub, keys, Request(environ))(environ, start_response)

    return app


def _answer(hub: Hub, keys: list[bytes], request: Request) -> Response:
    request.max_content_length = MAX_BODY
    authorization = request.authorization
    given = "" if authorization is None else authorization.token or ""
    if authorization is None or authorization.type != "bearer":
        return _error(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})
    # All of them, in constant time: how long it takes tells nothing.
    matches = [hmac.compare_digest(key, given.encode()) for key in keys]
    if not any(matches):
        return _error(401, "the token is wrong", {"WWW-Authenticate": "Bearer"})
    if request.method != "POST":
        return _error(405, "post it", {"Allow": "POST"})
    try:
        ids = hub.publish_many(
            request.path.removeprefix("/"),
            _events(request),
            # `?only=`, an empty one, is a tag that nobody has.
            only=request.args.getlist("only") or None,
            exclude=request.args.getlist("exclude"),
        )
    except PayloadTooLarge as error:
        return _error(413, str(error))
    except RequestEntityTooLarge:
        return _error(413, f"a body must have {MAX_BODY} bytes at most")
    except HTTPException as error:  # a body that ends early
        return _error(error.code or 400, str(error.description))
    except Unavailable as error:
        return _error(503, str(error), {"Retry-After": str(_RETRY_AFTER)})
    except (ValueError, TypeError) as error:
        return _error(400, str(error))
    except BrokerError as error:
        return _error(504, f"it may have been stored: {error}")
    return _json(200, {"ids": ids})


def _events(request: Request) -> list[Any]:
    """Return the events of a request.

    Raises:
        ValueError: The body is no text, or a line no JSON; retry is no number.
    """
    try:
        text = request.get_data(cache=False).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"the body must be UTF-8: {error.reason}") from None
    event = request.args.get("event")
    retry = request.args.get("retry")
    if retry is not None and not (retry.isascii() and retry.isdecimal()):
        raise ValueError(f"retry must be whole milliseconds, got {retry!r}")
    options: Any = {"event": event, "retry": None if retry is None else int(retry)}
    if request.mimetype not in _NDJSON:
        return [Event(text, **options)]
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise ValueError("the body has no line")
    for number, line in enumerate(lines, 1):
        try:
            json.loads(line, parse_constant=_refuse)
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON: {error}") from None
    return [Event(line.strip(), **options) for line in lines]


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _json(status: int, value: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(
        json.dumps(value) + "\n",
        status=status,
        headers=headers,
        mimetype="application/json",
    )


def _error(status: int, text: str, headers: dict[str, str] | None = None) -> Response:
    return _json(status, {"error": text}, headers)
