r"""Tools for agents: a server of MCP over streamable HTTP.

    gunicorn -k gevent -w 1 examples.recipes.mcp_tools:app
    curl -i http://127.0.0.1:8000/mcp --json '{"jsonrpc": "2.0", "id": 0,
        "method": "initialize", "params": {"protocolVersion": "2025-11-25"}}'

``async with mcp.Client("http://127.0.0.1:8000/mcp") as client`` calls them. A call runs
in a thread and publishes its messages to a channel, which the POST streams. Its
connection may break: the client resumes with Last-Event-ID, as the specification has
it, and only ``notifications/cancelled`` ends the call. The GET streams what is for all
clients. Sessions are in memory: one worker.

Spec: https://modelcontextprotocol.io/specification/2025-11-25/basic/transports
"""

import contextlib
import itertools
import os
import secrets
import threading

from flask import Flask, abort, request

from examples.shared.same_site import same_site_only
from syncstream import Event, Hub, SSEResponse, last_event_id, sleep

INTERVAL = float(os.environ.get("INTERVAL", 0.2))
VERSIONS = ("2025-11-25", "2025-06-18")
app = Flask(__name__)
app.before_request(same_site_only)  # the specification asks for this check
hub = Hub()
sessions = {}  # each session's running calls: their numbers, by the requests' ids
numbers = map(str, itertools.count(1))  # of the calls' channels; 0 is for the GETs


def message(**fields):
    return {"jsonrpc": "2.0", **fields}


def tell_all(text):
    """Send a text to all clients, over the streams of their GETs."""
    params = {"level": "info", "data": text}
    for session in list(sessions):
        log = message(method="notifications/message", params=params)
        hub.publish(f"{session}:0", log)


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


def messages(id, params):
    """Yield a call's progress, and last its response."""
    token = params.get("_meta", {}).get("progressToken")
    try:
        steps = TOOLS[params["name"]](**params.get("arguments", {}))
        while True:
            done, total = next(steps)
            progress = {"progressToken": token, "progress": done, "total": total}
            yield message(method="notifications/progress", params=progress)
    except StopIteration as end:
        text, failed = end.value, False
    except Exception:
        app.logger.exception("a tool has failed")
        text, failed = "The tool has failed.", True
    content = [{"type": "text", "text": text}]
    yield message(id=id, result={"content": content, "isError": failed})


def run(calls, number, channel, id, params):
    with contextlib.closing(messages(id, params)) as steps:
        for step in steps:
            if calls.get(id) != number:  # cancelled: no response
                hub.publish(channel, "")
                return
            if "id" in step or "progressToken" in params.get("_meta", {}):
                hub.publish(channel, step)
    calls.pop(id, None)


def follow(channel, number, begins=False):
    """Yield a call's messages, with ids by which a client finds their stream again."""
    if begins:  # so that a client can resume from here, before the first message
        yield Event("", id=f"{number}/", retry=500)
    for event in hub.subscribe(channel, after="start"):
        yield Event(event.data, id=f"{number}/{event.id}")
        if not event.data or "method" not in event.json():
            return


def session_id():
    if request.headers.get("MCP-Protocol-Version", VERSIONS[0]) not in VERSIONS:
        abort(400)
    session = request.headers.get("Mcp-Session-Id") or abort(400)
    return session if session in sessions else abort(404)


@app.post("/mcp")
def post():
    asked = request.get_json()
    id, method, params = asked.get("id"), asked.get("method"), asked.get("params", {})
    if method == "initialize":
        sessions[session := secrets.token_hex(16)] = {}
        wanted = params["protocolVersion"]
        about = {
            "protocolVersion": wanted if wanted in VERSIONS else VERSIONS[0],
            "capabilities": {"tools": {}, "logging": {}},
            "serverInfo": {"name": "tools", "version": "1"},
        }
        return message(id=id, result=about), {"Mcp-Session-Id": session}
    session = session_id()
    if id is None or method is None:  # a notification, or a response
        if method == "notifications/cancelled":
            sessions[session].pop(params["requestId"], None)
        return "", 202
    if method == "tools/call" and params.get("name") in TOOLS:
        number = sessions[session][id] = next(numbers)
        channel = f"{session}:{number}"
        words = (sessions[session], number, channel, id, params)
        threading.Thread(target=run, args=words, daemon=True).start()
        is_new = request.headers.get("MCP-Protocol-Version") == VERSIONS[0]
        return SSEResponse(follow(channel, number, is_new))
    results = {"ping": {}, "tools/list": {"tools": [DESCRIBED]}}
    if method in results:
        return message(id=id, result=results[method])
    code = -32602 if method == "tools/call" else -32601
    return message(id=id, error={"code": code, "message": "No such tool or method"})


@app.get("/mcp")
def get():
    session = session_id()
    number, slash, last = (last_event_id(request) or "").partition("/")
    if not slash:
        return SSEResponse(hub.subscribe(f"{session}:0", who=session))
    channel = hub.channel(session, number)
    if number not in sessions[session].values() and hub.head(channel) == last:
        abort(405)  # a cancelled call has nothing to resume
    request.environ["HTTP_LAST_EVENT_ID"] = last  # the subscription resumes after it
    return SSEResponse(follow(channel, number))


@app.delete("/mcp")
def delete():
    session = session_id()
    sessions.pop(session).clear()  # cancels its calls
    hub.kick(who=session)
    return "", 204
