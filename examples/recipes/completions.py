r"""Chat completions as OpenAI serves them, for its SDKs and all that speak its API.

    gunicorn -k gevent -w 4 examples.recipes.completions:app
    curl -N http://127.0.0.1:8000/v1/chat/completions \
        --json '{"messages": [{"role": "user", "content": "Why?"}], "stream": true}'

``OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="-")`` reads it. The end is
``data: [DONE]``, or ``data: {"error": …}`` after an error, which the SDK raises.
"""

import os
import time
import uuid

from flask import Flask, abort, request

from syncstream import Event, SSEResponse, sleep

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


def chunks(common, question):
    def chunk(delta, finish_reason=None):
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return {**common, "object": "chat.completion.chunk", "choices": [choice]}

    yield chunk({"role": "assistant", "content": ""})
    for text in write(question):
        yield chunk({"content": text})
    yield chunk({}, "stop")


def failure(error):
    message = "The model has failed."  # what `error` says is for the log alone
    return {"error": {"message": message, "type": "server_error", "code": None}}


@app.errorhandler(400)
def refusal(error):
    about = {"message": error.description, "type": "invalid_request_error"}
    return {"error": {**about, "param": None, "code": None}}, 400


@app.post("/v1/chat/completions")
def completions():
    asked = request.get_json(silent=True)
    question = question_in(asked)
    common = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": asked.get("model", "echo"),
    }
    if asked.get("stream"):
        source = chunks(common, question)
        return SSEResponse(source, end=Event("[DONE]"), on_error=failure)
    message = {"role": "assistant", "content": "".join(write(question))}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {**common, "object": "chat.completion", "choices": [choice]}
