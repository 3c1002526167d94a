r"""Messages as Anthropic serves them, for its SDKs and all that speak its API.

    gunicorn -k gevent -w 4 examples.recipes.messages:app
    curl -N http://127.0.0.1:8000/v1/messages \
        --json '{"messages": [{"role": "user", "content": "Why?"}], "stream": true}'

``Anthropic(base_url="http://127.0.0.1:8000", api_key="-")`` reads it. Each event's name
is its type. The end is ``message_stop``, or ``error``, which the SDK raises.
"""

import os
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


def named(type, **fields):
    return Event({"type": type, **fields}, event=type)


def message(model, **fields):
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "content": [],
        "model": model,
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 0, "output_tokens": 0},
        **fields,
    }


def events(model, question):
    yield named("message_start", message=message(model))
    block = {"type": "text", "text": ""}
    yield named("content_block_start", index=0, content_block=block)
    count = 0
    for text in write(question):
        delta = {"type": "text_delta", "text": text}
        yield named("content_block_delta", index=0, delta=delta)
        count += 1
    yield named("content_block_stop", index=0)
    delta = {"stop_reason": "end_turn", "stop_sequence": None}
    yield named("message_delta", delta=delta, usage={"output_tokens": count})


def failure(error):
    # What `error` says is for the log alone.
    about = {"type": "api_error", "message": "The model has failed."}
    return named("error", error=about)


@app.errorhandler(400)
def refusal(error):
    about = {"type": "invalid_request_error", "message": error.description}
    return {"type": "error", "error": about}, 400


@app.post("/v1/messages")
def messages():
    asked = request.get_json(silent=True)
    question = question_in(asked)
    model = asked.get("model", "echo")
    if asked.get("stream"):
        source = events(model, question)
        return SSEResponse(source, end=named("message_stop"), on_error=failure)
    block = {"type": "text", "text": "".join(write(question))}
    return message(model, content=[block], stop_reason="end_turn")
