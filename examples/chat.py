"""A chat room: each line is an event of a channel that all clients follow.

    gunicorn -k gevent -w 4 examples.chat:app
    curl -N http://127.0.0.1:8000/events

The page is http://127.0.0.1:8000/; ``curl -d 'Hello' http://127.0.0.1:8000/say``
also writes. A reconnecting page gets the lines that it missed, and a new page the kept
ones, even after a restart, because the workers share a file. For several machines set
HUB_URL=redis://… or postgresql://…. memory: works with one worker only, and forgets all
lines at a restart; pages then get a "reset".
"""

import os

from flask import Flask, request

from examples.shared.same_site import same_site_only
from syncstream import Hub, SSEResponse

app = Flask(__name__)
app.before_request(same_site_only)
hub = Hub(os.environ.get("HUB_URL", "local:chat"))


@app.get("/events")
def events():
    return SSEResponse(hub.subscribe("room", after="start"), retry=1000)


@app.post("/say")
def say():
    return {"id": hub.publish("room", request.get_data(as_text=True))}


@app.get("/")
def page():
    return """<!doctype html><meta name="viewport" content="width=device-width">
<title>Chat</title>
<form><input autofocus autocomplete="off"> <button>Say</button></form>
<ul></ul>
<script>
  const show = (tag, text) => {
    const item = document.createElement("li")
    item.appendChild(document.createElement(tag)).textContent = text
    document.querySelector("ul").append(item)
  }
  const source = new EventSource("/events")
  source.onmessage = (e) => show("span", e.data)
  source.addEventListener("reset", () => show("em", "Some lines may be missing."))

  const [form, input] = document.querySelectorAll("form, input")
  form.onsubmit = async (e) => {
    e.preventDefault()
    const answer = await fetch("/say", { method: "POST", body: input.value })
    if (answer.ok) input.value = ""
  }
</script>"""
