r"""An agent for AG-UI: npm's @ag-ui/client, and so CopilotKit, reads its stream.

    gunicorn -k gevent -w 4 examples.recipes.ag_ui:app
    curl -N http://127.0.0.1:8000/agent \
        --json '{"threadId": "1", "runId": "1", "messages": [{"content": "Why?"}]}'

``new HttpAgent({ url: "http://127.0.0.1:8000/agent" })`` reads it. The end of a run is
``RUN_FINISHED``, or ``RUN_ERROR``; `abortRun` ends the model at once.
"""

import os
import uuid

from flask import Flask, abort, request

from syncstream import SSEResponse, sleep

INTERVAL = float(os.environ.get("INTERVAL", 0.1))
app = Flask(__name__)


def question_in(asked):
    """Return the last message's text; a content may be a list of parts, as images."""
    try:
        content = asked["messages"][-1]["content"]
        if isinstance(content, str):
            return content
        return " ".join(part["text"] for part in content if part["type"] == "text")
    except (LookupError, TypeError):
        abort(400, "There must be messages, the last with a content.")


def write(question):
    """Yield an answer, piece by piece: your model's place."""
    for word in f"You ask: {question} That depends.".split():
        yield f"{word} "
        sleep(INTERVAL)


def events(ids, question):
    message = {"messageId": str(uuid.uuid4())}
    yield {"type": "RUN_STARTED", **ids}
    yield {"type": "TEXT_MESSAGE_START", "role": "assistant", **message}
    for text in write(question):
        yield {"type": "TEXT_MESSAGE_CONTENT", "delta": text, **message}
    yield {"type": "TEXT_MESSAGE_END", **message}


def failure(error):
    # What `error` says is for the log alone.
    return {"type": "RUN_ERROR", "message": "The model has failed."}


@app.post("/agent")
def agent():
    asked = request.get_json(silent=True)
    question = question_in(asked)
    ids = {name: asked.get(name) for name in ("threadId", "runId")}
    source = events(ids, question)
    finished = {"type": "RUN_FINISHED", **ids}
    return SSEResponse(source, end=finished, on_error=failure)
