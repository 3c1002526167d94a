r"""A chat for the AI SDK: `useChat` and `Chat` of npm's @ai-sdk/react read its stream.

    gunicorn -k gevent -w 4 examples.recipes.ai_sdk:app
    curl -N http://127.0.0.1:8000/api/chat \
        --json '{"messages": [{"parts": [{"type": "text", "text": "Why?"}]}]}'

The stream is the SDK's "UI message stream", version 1. The model ends at once when the
user presses Stop. docs/recipes.md has a component for React.
"""

import os

from flask import Flask, request

from syncstream import Event, SSEResponse, sleep

INTERVAL = float(os.environ.get("INTERVAL", 0.1))
app = Flask(__name__)


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
    *_, message = request.get_json()["messages"]
    texts = [part["text"] for part in message["parts"] if part["type"] == "text"]
    headers = {"x-vercel-ai-ui-message-stream": "v1"}
    source = parts("".join(texts))
    return SSEResponse(source, 200, headers, end=Event("[DONE]"), on_error=failure)
