"""Streams for the clients that people have: see test_clients.py.

``/KIND/…?fail=1``: three events with ids, with keepalives between them, then an end or
an error. ``/channel/NAME``: the same from a channel; its subscriber leaves the server.
Kinds: ``plain`` (text), ``openai`` and ``anthropic`` (what those services send).
"""

import re
import threading
import time

from werkzeug.wrappers import Request, Response

from syncstream import Event, Hub, SSEResponse, StreamMiddleware, sleep

PAUSE = 0.5  # seconds; for two keepalives
KEEPALIVE = 0.2

hub = Hub()


def chunk(text):
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    return {
        "id": "chat",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [choice],
    }


MESSAGE = {
    "id": "m",
    "type": "message",
    "role": "assistant",
    "content": [],
    "model": "m",
    "stop_reason": None,
    "stop_sequence": None,
    "usage": {"input_tokens": 1, "output_tokens": 1},
}
ANTHROPIC = [
    {"type": "message_start", "message": MESSAGE},
    {
        "type": "content_block_start",
        "index": 0,
        "content_block": {"type": "text", "text": ""},
    },
    {
        "type": "content_block_delta",
        "index": 0,
        "delta": {"type": "text_delta", "text": "2"},
    },
]


def source(kind, fails):
    for n in range(3):
        if kind == "openai":
            yield Event(chunk(str(n)), id=n)
        elif kind == "anthropic":
            yield Event(ANTHROPIC[n], event=ANTHROPIC[n]["type"], id=n)
        else:
            yield Event(str(n), id=n)
        yield Event(comment="the application's own")
        sleep(PAUSE)
    if fails:
        raise RuntimeError("in the middle")
    if kind == "openai":
        yield "[DONE]"


def tell(channel):
    for n in range(3):
        hub.publish(channel, str(n))
        time.sleep(PAUSE)
    hub.publish(channel, "end", event="end")


def view(environ, start_response):
    request = Request(environ)
    if request.path == "/health":
        return Response("ok")(environ, start_response)
    request.get_data()  # what is posted
    kind, _, rest = request.path.removeprefix("/").partition("/")
    if kind == "channel":
        channel = re.sub("[^a-z0-9]", "-", rest)
        threading.Thread(target=tell, args=(channel,), daemon=True).start()
        subscription = hub.subscribe(channel, after="start")
        response = SSEResponse(subscription, keepalive=KEEPALIVE, retry=100)
    else:
        response = SSEResponse(
            source(kind, "fail" in request.args), keepalive=KEEPALIVE, retry=100
        )
    return response(environ, start_response)


app = StreamMiddleware(view)
