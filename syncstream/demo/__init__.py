"""The demo of ``python -m syncstream demo``: a page, and the stream that feeds it.

``/`` is the page (``page.html``, which asks nothing of any other host), ``/events``
the stream, ``/health`` says ok. ``POST /wave`` sends an event to every viewer,
``POST /drop?client=…`` ends the stream that was opened with the same ``client``, so
that its browser comes back and goes on after the last id it has.

Needs the ``demo`` extra; ``settings.py`` is for gunicorn, which serves it.
"""

from __future__ import annotations

import html
import inspect
import itertools
import platform
import re
from collections.abc import Iterator
from importlib.metadata import version
from importlib.resources import files

from flask import Flask, Response, request

from syncstream import Event, SSEResponse, __version__, last_event_id, sleep

from .room import TICK, Room

__all__ = ["app"]

app = Flask(__name__, static_folder=None)
room = Room()


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
