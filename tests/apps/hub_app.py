"""A WSGI application with channels.

- ``/sse/CHANNEL?OPTION=VALUE``: a stream, with the options of `Hub.subscribe`; several
  channels with commas between them. ``/ndjson/…`` for lines, ``/yield/…`` for a
  generator that yields from a subscription. ``tags`` has commas, too;
  ``authorize=SECONDS`` asks again and again whether its ``who`` may read:
  ``/deny/WHO`` says no from then on, and ``/hang/WHO`` nothing until that.
- ``POST /publish/CHANNEL?only=…&exclude=…``: a JSON list of events.
- ``/flood/CHANNEL?count=…&size=…``: so many events, ``{"n": 0, …}`` and on.
- ``/head/CHANNEL``, ``/presence/CHANNEL``, ``/kick/WHO``, ``/stats``, ``/close``.
"""

import json
import os
import time
from urllib.parse import parse_qs

from syncstream import Hub, NDJSONResponse, SSEResponse, StreamMiddleware

try:
    from syncstream.channels import limits
except ImportError:  # an older release, beside which broker_soak.py runs this one
    pass
else:
    limits.ANSWER = 2.0  # not 5 seconds for each test
hub = Hub()
denied, hung = set(), set()
NUMBERS = {"after": int, "throttle": float}


def app(environ, start_response):
    query = {name: v[0] for name, v in parse_qs(environ["QUERY_STRING"]).items()}
    _, kind, *rest = environ["PATH_INFO"].split("/")
    what = rest[0] if rest else ""
    if kind in ANSWERS:
        text = ANSWERS[kind](what, query, environ)
        return plain(
            text if isinstance(text, str) else json.dumps(text), start_response
        )
    subscription = hub.subscribe(*what.split(","), **options_of(query))
    headers = {"X-Process": str(os.getpid())}
    if kind == "ndjson":
        response = NDJSONResponse(subscription, headers=headers)
    elif kind == "yield":
        response = SSEResponse((event for event in subscription), headers=headers)
    else:
        response = SSEResponse(subscription, headers=headers)
    return response(environ, start_response)


def options_of(query):
    options = {}
    for name in ("after", "on_gap", "throttle", "who"):
        if name in query:
            value = query[name]
            is_number = value.replace(".", "").isdecimal()
            options[name] = NUMBERS[name](value) if is_number else value
    if "tags" in query:
        options["tags"] = query["tags"].split(",")
    if "announce" in query:
        options["announce"] = True
    if "authorize" in query:
        options["authorize"] = authorize, float(query["authorize"])
    return options


def authorize(subscription):
    who = subscription.who
    while who in hung and who not in denied:
        time.sleep(0.01)
    return who not in denied


def publish(channel, query, environ):
    size = int(environ.get("CONTENT_LENGTH") or 0)
    items = json.loads(environ["wsgi.input"].read(size))
    tags = {
        name: query[name].split(",") for name in ("only", "exclude") if name in query
    }
    return hub.publish_many(channel, items, **tags)


def flood(channel, query, environ):
    text = "x" * int(query["size"])
    for number in range(int(query["count"])):
        hub.publish(channel, {"n": number, "text": text})
        if number % 20 == 0:
            time.sleep(0)  # under gevent the readers run now
    return "ok"


def rss(what, query, environ):
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


ANSWERS = {
    "health": lambda what, query, environ: "ok",
    "stats": lambda what, query, environ: hub.stats(),
    "rss": rss,
    "close": lambda what, query, environ: hub.close(),
    "head": lambda what, query, environ: hub.head(*what.split(",")),
    "presence": lambda what, query, environ: hub.presence(what),
    "kick": lambda what, query, environ: hub.kick(who=what),
    "deny": lambda what, query, environ: denied.add(what),
    "hang": lambda what, query, environ: hung.add(what),
    "publish": publish,
    "flood": flood,
}


def plain(text, start_response):
    body = text.encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


wrapped = StreamMiddleware(app)
reserved = StreamMiddleware(app, reserve_threads=2)
