"""The recipes of examples/recipes/ on one server, each under its file's name.

Where a recipe calls a model, the one that asks says what it does: see `say`.
"""

import flask
from werkzeug.middleware.dispatcher import DispatcherMiddleware

import examples.recipes.ag_ui as ag_ui
import examples.recipes.ai_sdk as ai_sdk
import examples.recipes.completions as completions
import examples.recipes.datastar as datastar
import examples.recipes.messages as messages
from syncstream import current_stream, sleep
from tests.apps.control import note

app = flask.Flask(__name__)
recipes = {
    "ag_ui": ag_ui,
    "ai_sdk": ai_sdk,
    "completions": completions,
    "datastar": datastar,
    "messages": messages,
}


@app.get("/health")
def health():
    return "ok"


def say(text):
    """Yield the words after the first, which is the key of the control line.

    ``WAIT`` waits for long, ``FAIL`` is an error, and at ``CUT`` the server stops.
    """
    key, *words = text.split()
    try:
        for word in words:
            if word == "WAIT":
                note(key, "waits")
                sleep(600)
            elif word == "FAIL":
                raise RuntimeError("MARK")
            elif word == "CUT":
                current_stream().stop("shutdown")
            yield word
    finally:
        note(key, "closed")


completions.write = messages.write = lambda asked: say(asked[-1]["content"])
ag_ui.write = ai_sdk.write = datastar.steps = say
app.wsgi_app = DispatcherMiddleware(
    app.wsgi_app, {f"/{name}": recipe.app for name, recipe in recipes.items()}
)
