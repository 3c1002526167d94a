"""The kinds of events: text, a mapping, an object, an `Event`, any JSON value.

    gunicorn -k gevent examples.event_kinds:app
    curl -N http://127.0.0.1:8000/kinds

/list sends a ready list of events, /one a single one.
"""

from flask import Flask

from syncstream import Event, SSEResponse, sse

app = Flask(__name__)


class Alarm:
    """An object of your own: what has a ``data`` attribute is an event."""

    data = "The door is open"
    event = "alarm"


@app.get("/kinds")
@sse
def kinds():
    yield "Simple message"
    yield "Two\nlines"
    yield {"data": "Event 2", "event": "type2", "id": "2"}
    yield {"data": 3}
    yield Alarm()
    yield Event("Full event data", id="evt-1", event="custom_event", retry=3000)
    yield Event({"tick": 5}, retry=1000)  # data that is no text becomes JSON
    yield {"temperature": 21.5}  # and so does all that is no event
    yield [1, None, "é"]
    yield Event(comment="clients ignore this")


@app.get("/list")
def ready():
    return SSEResponse(
        [
            Event("Connected!", event="connect"),
            Event("Hello World", event="message", id="1"),
            Event("Goodbye", event="close", id="2"),
        ]
    )


@app.get("/one")
def one():
    return SSEResponse([Event("New!", event="notification", id="notif-1")])
