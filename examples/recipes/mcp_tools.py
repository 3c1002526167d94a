r"""Tools for agents: a server of MCP over streamable HTTP.

    gunicorn -k gevent -w 1 examples.recipes.mcp_tools:app
    curl -i http://127.0.0.1:8000/mcp --json '{"jsonrpc": "2.0", "id": 0,
        "method": "initialize", "params": {"protocolVersion": "2025-11-25"}}'

``async with mcp.Client("http://127.0.0.1:8000/mcp") as client`` calls them. A call runs
in a thread and publishes its messages to a channel, which the POST streams. Its
connection may break: the client resumes with Last-Event-ID, as the specification has
it, and only ``notifications/cancelled`` ends the call. The GET streams what is for all
clients. Sessions are in the memory of one worker, the 1000 that were used last.

Spec: https://modelcontextprotocol.io/specification/2025-11-25/basic/transports
"""

import collections
import contextlib
import itertools
import os
import re
import secrets
import threading

from flask import Flask, abort, request

from syncstream import Event, Gap, Hub, SSEResponse, last_event_id, sleep

INTERVAL = float(os.environ.get("INTERVAL", 0.2))
HOSTS = {"localhost", "127.0.0.1", "[::1]", *os.environ.get("HOSTS", "").split()}
VERSIONS = ("2025-11-25", "2025-06-18")
LEVELS = ("debug", "info", "notice", "warning")
LEVELS += ("error", "critical", "alert", "emergency")
MOST_SESSIONS = 1000
app = Flask(__name__)
hub = Hub()
sessions = collections.OrderedDict()  # by their ids; the last one was used last
numbers = map(str, itertools.count(1))  # of the calls' channels; 0 is for the GETs


class Session:
    def __init__(self):
        self.id = secrets.token_hex(16)
        self.calls = {}  # the numbers of the running calls, by their requests' ids
        self.streams = {}  # the newest stream's mark, by the channel
        self.level = "debug"

    def end(self):
        self.calls.clear()  # cancels them
        hub.kick(who=f"{self.id}:0")

    def subscribe(self, channel, **options):
        """Subscribe in place of an earlier stream: no message goes to two of them."""
        self.streams[channel] = mark = object()
        hub.kick(who=channel)  # may miss one that begins just now, which then asks
        options["authorize"] = lambda _: self.streams.get(channel) is mark
        return hub.subscribe(channel, who=channel, **options)


def message(**fields):
    return {"jsonrpc": "2.0", **fields}


def failure(code, text, id=None):
    return message(id=id, error={"code": code, "message": text})


def tell_all(text):
    """Send a text to all clients, over the streams of their GETs."""
    params = {"level": "info", "data": text}
    log = message(method="notifications/message", params=params)
    for session in list(sessions.values()):
        if LEVELS.index(session.level) <= LEVELS.index("info"):
            hub.publish(f"{session.id}:0", log)


def count(to=10):
    """Count up to a number, slowly."""
    for n in range(1, to + 1):
        sleep(INTERVAL)
        yield n, to  # progress and total; a cancelled call ends here
    tell_all(f"Somebody has counted to {to}.")
    return f"Counted to {to}."


TOOLS = {"count": count}
SCHEMA = {"type": "object", "properties": {"to": {"type": "integer"}}}
DESCRIBED = {"name": "count", "description": count.__doc__, "inputSchema": SCHEMA}


def messages(id, params, token):
    """Yield a call's progress, and last its response."""
    try:
        steps = TOOLS[params["name"]](**params.get("arguments") or {})
        while True:
            done, total = next(steps)
            progress = {"progressToken": token, "progress": done, "total": total}
            yield message(method="notifications/progress", params=progress)
    except StopIteration as end:
        text, failed = str(end.value), False
    except Exception:
        app.logger.exception("a tool has failed")
        text, failed = "The tool has failed.", True
    content = [{"type": "text", "text": text}]
    yield message(id=id, result={"content": content, "isError": failed})


def run(calls, number, channel, id, params, token):
    try:
        with contextlib.closing(messages(id, params, token)) as steps:
            for step in steps:
                if calls.get(id) != number:  # cancelled: no response
                    hub.publish(channel, "")
                    return
                if "id" in step or token is not None:
                    hub.publish(channel, step)
    except BaseException:  # SystemExit, too, and what JSON cannot say: its client waits
        app.logger.exception("a tool's thread has failed")
        hub.publish(channel, failure(-32603, "The tool has failed.", id))
    if calls.get(id) == number:
        del calls[id]


def follow(session, channel, begins=False):
    """Yield a call's messages, with ids by which a client finds their stream again."""
    number = channel.rpartition(":")[2]
    if begins:  # so that a client can resume from here, before the first message
        yield Event("", id=f"{number}/", retry=500)
    for event in session.subscribe(channel, after="start"):
        if isinstance(event, Gap):  # old progress is lost, of which MCP says nothing
            continue
        yield Event(event.data, id=f"{number}/{event.id}")
        if not event.data or "method" not in event.json():
            session.streams.pop(channel, None)
            return


@app.before_request
def same_site_only():
    """Refuse other sites' pages, as the specification says, under any name."""
    origin = request.origin or f"//{request.host}"
    is_ours = re.sub(r":\d+$", "", request.host) in HOSTS
    if not is_ours or origin.partition("//")[2] != request.host:
        abort(403, "HOSTS does not name this host, or it is another site's page.")


def asking_session():
    if request.headers.get("MCP-Protocol-Version", VERSIONS[0]) not in VERSIONS:
        abort(400)
    id = request.headers.get("Mcp-Session-Id") or abort(400)
    session = sessions.get(id) or abort(404)
    with contextlib.suppress(KeyError):  # it has just ended
        sessions.move_to_end(id)
    return session


def initialize(id, wanted):
    session = Session()
    sessions[session.id] = session
    while len(sessions) > MOST_SESSIONS:
        sessions.popitem(last=False)[1].end()
    about = {
        "protocolVersion": wanted if wanted in VERSIONS else VERSIONS[0],
        "capabilities": {"tools": {}, "logging": {}},
        "serverInfo": {"name": "tools", "version": "1"},
    }
    return message(id=id, result=about), {"Mcp-Session-Id": session.id}


@app.post("/mcp")
def post():
    asked = request.get_json(silent=True)
    if not isinstance(asked, dict):  # a batch, perhaps: these versions have none
        return failure(-32600, "There must be one message, as JSON"), 400
    id, method = asked.get("id"), asked.get("method")
    params = asked.get("params") or {}
    meta = params.get("_meta") or {} if isinstance(params, dict) else None
    if not isinstance(id, str | int | None) or not isinstance(meta, dict):
        return failure(-32600, "The id, params or _meta have a wrong type"), 400
    if method == "initialize" and id is not None:
        if "protocolVersion" not in params:
            return failure(-32602, "There must be a protocolVersion", id)
        return initialize(id, params["protocolVersion"])
    session = asking_session()
    if id is None or method is None:  # a notification, or a response
        if method == "notifications/cancelled":
            if not isinstance(params.get("requestId"), str | int):
                return failure(-32602, "There must be a requestId"), 400
            session.calls.pop(params["requestId"], None)
        return "", 202
    if method == "tools/call":
        if params.get("name") not in list(TOOLS):  # a list hashes no name
            return failure(-32602, "No such tool", id)
        number = session.calls[id] = next(numbers)
        channel = f"{session.id}:{number}"
        words = (session.calls, number, channel, id, params, meta.get("progressToken"))
        threading.Thread(target=run, args=words, daemon=True).start()
        is_new = request.headers.get("MCP-Protocol-Version") == VERSIONS[0]
        return SSEResponse(follow(session, channel, is_new))
    if method == "logging/setLevel":
        if params.get("level") not in LEVELS:
            return failure(-32602, "No such level", id)
        session.level = params["level"]
    results = {"ping": {}, "tools/list": {"tools": [DESCRIBED]}, "logging/setLevel": {}}
    if not isinstance(method, str) or method not in results:
        return failure(-32601, "No such method", id)
    return message(id=id, result=results[method])


@app.get("/mcp")
def get():
    session = asking_session()
    number, slash, last = (last_event_id(request) or "").partition("/")
    if not slash:  # a reset, if messages are lost, is no event of MCP's: it is skipped
        return SSEResponse(session.subscribe(f"{session.id}:0"))
    if not number.isdecimal() or not number.isascii() or len(number) > 20:
        abort(400)
    channel = f"{session.id}:{number}"
    if number not in session.calls.values():
        with contextlib.closing(hub.subscribe(channel, after=last or "start")) as kept:
            if all(isinstance(event, Gap) for event in kept.read(0)):
                abort(405)  # a cancelled or forgotten call has nothing to resume
    request.environ["HTTP_LAST_EVENT_ID"] = last  # the subscription resumes after it
    return SSEResponse(follow(session, channel))


@app.delete("/mcp")
def delete():
    session = asking_session()
    sessions.pop(session.id, session).end()
    return "", 204
