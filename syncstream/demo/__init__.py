"""The demo of ``python -m syncstream demo``: a page, and the stream that feeds it.

``/`` is the page (``page.html``, which loads nothing from other hosts), ``/events`` the
stream, and ``/health`` answers ok. ``POST /wave`` sends an event to every viewer.
``POST /drop?client=…`` ends the stream that was opened with the same ``client``, so
that its browser reconnects and resumes after its last event id.

The demo answers its own page only. A page of another site could send a POST to
127.0.0.1 from its visitor's browser, which the header Origin shows; or have its own
name resolve to 127.0.0.1, which the header Host shows (DNS rebinding). So Host must be
an address, a name without a dot, this machine's name, or that of ``--host``.

Needs the ``demo`` extra; ``settings.py`` is for gunicorn, which serves it.
"""

from __future__ import annotations

import html
import inspect
import itertools
import os
import platform
import re
import socket
from collections.abc import Iterator
from importlib.metadata import version
from importlib.resources import files
from ipaddress import ip_address
from urllib.parse import urlsplit

from flask import Flask, Response, abort, request

from syncstream import Event, SSEResponse, __version__, last_event_id, sleep

from .room import TICK, Room

__all__ = ["HOST", "app"]

HOST = "SYNCSTREAM_DEMO_HOST"
"""The environment variable that holds the value of ``--host``."""

app = Flask(__name__, static_folder=None)
room = Room()


@app.before_request
def refuse_other_sites() -> None:
    """Answer 403 to requests from another site, or under another site's name."""
    if not is_local(request.host) or not is_same_site(request.origin, request.host):
        abort(403, "the demo answers its own page only: see --host")


def is_local(host: str) -> bool:
    """Tell whether no other site can have this Host, with or without a port."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    names = (socket.gethostname().lower(), os.environ.get(HOST, "").lower())
    if "." not in name and ":" not in name:
        return True
    if name.endswith(".localhost") or name in names:
        return True
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def is_same_site(origin: str | None, host: str) -> bool:
    """Tell whether a request's Origin, if there is one, equals its Host."""
    return origin is None or origin.partition("://")[2] == host


@app.get("/events")
def events() -> SSEResponse:
    after = number(last_event_id(request.environ))
    client = request.args.get("client", "")
    return SSEResponse(live(after, client), retry=1000, end="reconnect")


def live(after: int, client: str) -> Iterator[Event]:
    ids = itertools.count(after + 1)
    yield Event({"after": after, **SERVER}, event="hello", id=next(ids))
    with room.enter(client) as viewer:
        while not viewer.is_dropped:
            for name, data in viewer.news():
                yield Event(data, event=name, id=next(ids))
            yield Event(room.numbers(), id=next(ids))
            sleep(TICK)


def number(id: str | None) -> int:
    """Return the number in a Last-Event-ID, 0 for any other text or none."""
    return int(id) if id and re.fullmatch("[0-9]{1,15}", id) else 0


@app.get("/")
def page() -> Response:
    response = Response(PAGE, mimetype="text/html")
    response.headers["Cache-Control"] = "no-cache"
    return response


@app.get("/health")
def health() -> str:
    return "ok"


@app.post("/wave")
def wave() -> tuple[str, int]:
    room.wave()
    return "", 204


@app.post("/drop")
def drop() -> tuple[str, int]:
    return ("", 204) if room.drop(request.args.get("client", "")) else ("", 404)


SERVER = {
    "syncstream": __version__,
    "gunicorn": version("gunicorn"),
    "python": platform.python_version(),
}
_SOURCE = f"{inspect.getsource(events)}\n\n{inspect.getsource(live)}".rstrip()
PAGE = (
    files(__name__)
    .joinpath("page.html")
    .read_text("utf-8")
    .replace("{{ source }}", html.escape(_SOURCE))
    .replace("{{ version }}", __version__)
)
