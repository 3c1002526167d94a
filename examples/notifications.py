"""Notifications: a channel for each user, who may have several pages open, or none.

    gunicorn -k gevent examples.notifications:app
    curl -N http://127.0.0.1:8000/events/ann

The page is http://127.0.0.1:8000/ann, and ``curl -d 'Your tea is ready'
http://127.0.0.1:8000/notify/ann`` sends. The page gets the id of the newest
notification, and asks for those after it, so that none is lost before its stream
opens or while a connection is broken.
"""

from flask import Flask, abort, request

from examples.shared.same_site import same_site_only
from syncstream import Hub, SSEResponse

app = Flask(__name__)
app.before_request(same_site_only)
hub = Hub()  # of this process: run one worker, for presence is a process's


def channel_of(name):
    # In earnest the name is the session's. One from outside is not to be "*", or
    # "bob:#": f"user:{name}" would be a pattern then, and others' notifications.
    try:
        return hub.channel("user", name)
    except ValueError:
        abort(404)


@app.get("/events/<name>")
def events(name):
    return SSEResponse(hub.subscribe(channel_of(name), who=name), retry=1000)


@app.post("/notify/<name>")
def notify(name):
    channel = channel_of(name)
    hub.publish(channel, {"text": request.get_data(as_text=True)}, event="note")
    return {"pages": len(hub.presence(channel))}  # 0: send an e-mail, say


@app.get("/<name>")
def page(name):
    return PAGE.replace("HEAD", hub.head(channel_of(name)))


PAGE = """<!doctype html><meta name="viewport" content="width=device-width">
<title>Notifications</title>
<ol></ol>
<script>
  const show = (text) =>
    document.querySelector("ol").appendChild(document.createElement("li")).append(text)
  const source = new EventSource(`/events${location.pathname}?lastEventId=HEAD`)
  source.addEventListener("note", (e) => show(JSON.parse(e.data).text))
  source.addEventListener("reset", () => show("Some may be missing: reload the page"))
</script>"""
