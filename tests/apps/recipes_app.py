"""The recipes of examples/recipes/ on one server, each under its file's name.

Where a recipe calls a model, the one that asks says what it does: see `say`.
"""

import flask
from werkzeug.middleware.dispatcher import DispatcherMiddleware

import examples.recipes.ag_ui as ag_ui
import examples.recipes.ai_sdk as ai_sdk
import examples.recipes.completions as completions
import examples.recipes.datastar as datastar
import examples.recipes.htmx as htmx
import examples.recipes.mcp_tools as mcp_tools
import examples.recipes.messages as messages
import examples.recipes.turbo as turbo
from syncstream import SSEResponse, current_stream, last_event_id, sleep
from tests.apps.control import gate, note

app = flask.Flask(__name__)
recipes = {
    "ag_ui": ag_ui,
    "ai_sdk": ai_sdk,
    "completions": completions,
    "datastar": datastar,
    "htmx": htmx,
    "mcp_tools": mcp_tools,
    "messages": messages,
    "turbo": turbo,
}


@app.get("/health")
def health():
    return "ok"


def say(text):
    """Yield the words after the first, which is the key of the control line.

    ``WAIT`` waits for long, ``GATE`` for the test, ``FAIL`` is an error, and at ``CUT``
    the server stops.
    """
    key, *words = text.split()
    try:
        for word in words:
            if word == "WAIT":
                note(key, "waits")
                sleep(600)
            elif word == "FAIL":
                raise RuntimeError("MARK")
            elif word == "GATE":
                gate(key)
                continue
            elif word == "CUT":
                current_stream().stop("shutdown")
            yield word
    finally:
        note(key, "closed")


def watched(work):
    """Return a job that tells of each run, by the key in the address of its page.

    The key's last word says what its first run does after two steps, for the end of
    which ("error", "cut") the test opens a gate: what is on the way may be lost.
    """

    def run(last):
        key = flask.request.referrer.partition("?")[2]
        return steps(key, last, work(last))

    def steps(key, last, work):
        note(key, last)
        try:
            for number, step in enumerate(work):
                if number == 2 and last is None:
                    if key.endswith("-wait"):
                        sleep(600)
                    elif key.endswith("-error"):
                        gate(key)
                        raise RuntimeError("MARK")
                    elif key.endswith("-cut"):
                        gate(key)
                        current_stream().stop("shutdown")
                yield step
        finally:
            note(key, "closed")

    return run


@htmx.app.get("/<page>-endless")
def endless_page(page):
    return htmx.app.view_functions[page]().replace('"events"', '"endless"')


@htmx.app.get("/endless")
def endless():
    """The recipe's events, without the one that closes their stream."""
    return SSEResponse(htmx.work(last_event_id(flask.request)), retry=50)


htmx.work, turbo.work = watched(htmx.work), watched(turbo.work)
completions.write = messages.write = ag_ui.write = ai_sdk.write = say
datastar.steps = say


def count(key, to=3):
    """Count as the recipe does, and say that it has ended."""
    try:
        return (yield from mcp_tools.count(to))
    finally:
        note(key, "closed")


mcp_tools.INTERVAL = 0.02
mcp_tools.TOOLS["count"] = count
app.wsgi_app = DispatcherMiddleware(
    app.wsgi_app, {f"/{name}": recipe.app for name, recipe in recipes.items()}
)
