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

from flask import Flask, request

from syncstream import Event, SSEResponse, sleep

INTERVAL = float(os.environ.get("INTERVAL", 0.1))
app = Flask(__name__)


def write(messages):
    """Yield an answer, piece by piece: your model's place."""
    for word in f"You ask: {messages[-1]['content']} That depends.".split():
        yield f"{word} "
        sleep(INTERVAL)


def chunks(common, messages):
    def chunk(delta, finish_reason=None):
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return {**common, "object": "chat.completion.chunk", "choices": [choice]}

    yield chunk({"role": "assistant", "content": ""})
    for text in write(messages):
        yield chunk({"content": text})
    yield chunk({}, "stop")


def failure(error):
    message = "The model has failed."  # what `error` says is for the log alone
    return {"error": {"message": message, "type": "server_error", "code": None}}


@app.post("/v1/chat/completions")
def completions():
    asked = request.get_json()
    common = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": asked.get("model", "echo"),
    }
    if asked.get("stream"):
        source = chunks(common, asked["messages"])
        return SSEResponse(source, end=Event("[DONE]"), on_error=failure)
    message = {"role": "assistant", "content": "".join(write(asked["messages"]))}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {**common, "object": "chat.completion", "choices": [choice]}
