r"""A chat for the AI SDK: `useChat` and `Chat` of npm's @ai-sdk/react read its stream.

    gunicorn -k gevent -w 4 examples.recipes.ai_sdk:app
    curl -N http://127.0.0.1:8000/api/chat \
        --json '{"messages": [{"parts": [{"type": "text", "text": "Why?"}]}]}'

The stream is the SDK's "UI message stream", version 1. The model ends at once when the
user presses Stop. docs/recipes.md has a component for React.
"""

import os

from flask import Flask, abort, request

from syncstream import Event, SSEResponse, sleep

INTERVAL = float(os.environ.get("INTERVAL", 0.1))
app = Flask(__name__)


def question_in(asked):
    """Return the last message's text; other parts are files, for example."""
    try:
        parts = asked["messages"][-1]["parts"]
        return " ".join(part["text"] for part in parts if part["type"] == "text")
    except (LookupError, TypeError):
        abort(400, "There must be messages, the last with its parts.")


def write(question):
    """Yield an answer, piece by piece: your model's place."""
    for word in f"You ask: {question} That depends.".split():
        yield f"{word} "
        sleep(INTERVAL)


def parts(question):
    yield {"type": "start"}
    yield {"type": "text-start", "id": "answer"}
    for text in write(question):
        yield {"type": "text-delta", "id": "answer", "delta": text}
    yield {"type": "text-end", "id": "answer"}
    yield {"type": "finish"}


def failure(error):
    # What `error` says is for the log alone.
    return {"type": "error", "errorText": "The model has failed."}


@app.post("/api/chat")
def chat():
    question = question_in(request.get_json(silent=True))
    headers = {"x-vercel-ai-ui-message-stream": "v1"}
    source = parts(question)
    return SSEResponse(source, 200, headers, end=Event("[DONE]"), on_error=failure)
