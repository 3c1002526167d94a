"""A WSGI application with channels: /CHANNEL subscribes, POST publishes.

/CHANNEL?key=KEY&OPTION=VALUE: the options of `Hub.subscribe`; several channels with
commas between them. /ndjson/CHANNEL for lines, /yield/CHANNEL for a generator that
yields from a subscription.
"""

import json
from urllib.parse import parse_qs

from syncstream import Hub, NDJSONResponse, SSEResponse, StreamMiddleware

hub = Hub()


def app(environ, start_response):
    query = {name: v[0] for name, v in parse_qs(environ["QUERY_STRING"]).items()}
    _, kind, *rest = environ["PATH_INFO"].split("/")
    if kind == "health":
        return plain("ok", start_response)
    if kind == "stats":
        return plain(json.dumps(hub.stats()), start_response)
    if kind == "close":
        hub.close()
        return plain("ok", start_response)
    channels = rest[0].split(",")
    if kind == "publish":
        size = int(environ.get("CONTENT_LENGTH") or 0)
        items = json.loads(environ["wsgi.input"].read(size))
        return plain(json.dumps(hub.publish_many(channels[0], items)), start_response)
    if kind == "head":
        return plain(hub.head(channels[0]), start_response)
    options = {}
    for name in ("after", "on_gap", "on_lag"):
        if name in query:
            value = query[name]
            options[name] = int(value) if value.isdecimal() else value
    subscription = hub.subscribe(*channels, **options)
    if kind == "ndjson":
        return NDJSONResponse(subscription)(environ, start_response)
    if kind == "yield":
        return SSEResponse(event for event in subscription)(environ, start_response)
    return SSEResponse(subscription)(environ, start_response)


def plain(text, start_response):
    body = text.encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


wrapped = StreamMiddleware(app)
