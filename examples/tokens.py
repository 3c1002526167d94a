"""Text that is written token by token, and survives a reload of its page.

    gunicorn -k gevent -w 4 examples.tokens:app
    curl -N http://127.0.0.1:8000/answers/1

``curl -d 'Why?' http://127.0.0.1:8000/answers/1`` asks; so does the page at /. A thread
writes; viewers come and leave, resume after their last token, or begin with the first.
"""

import os
import threading

from flask import Flask, request

from examples.shared.same_site import same_site_only
from syncstream import Hub, SSEResponse, sleep

INTERVAL = float(os.environ.get("INTERVAL", 0.1))
app = Flask(__name__)
app.before_request(same_site_only)
hub = Hub(os.environ.get("HUB_URL", "local:tokens"), capacity=9999)  # a whole answer


def write(channel, question):
    for word in f"You ask: {question} That is a matter of opinion.".split():
        hub.publish(channel, word + " ")
        sleep(INTERVAL)
    hub.publish(channel, "", event="end")


@app.post("/answers/<int:id>")
def ask(id):
    text = request.get_data(as_text=True)
    threading.Thread(target=write, args=[f"answer:{id}", text], daemon=True).start()
    return "", 202


@app.get("/answers/<int:id>")
def answer(id):
    return SSEResponse(hub.subscribe(f"answer:{id}", after="start"), retry=1000)


@app.get("/")
def page():
    return """<!doctype html><meta name="viewport" content="width=device-width">
<title>Tokens</title><form><input> <button>Ask</button></form><p></p>
<script>
  const [form, input, answer] = document.querySelectorAll("form, input, p")
  const id = location.hash.slice(1) || Math.floor(Math.random() * 2 ** 53)
  const source = new EventSource(`/answers/${id}`)
  source.onmessage = (e) => answer.append(e.data)
  source.addEventListener("end", () => source.close())
  source.addEventListener("reset", () => answer.replaceChildren("Lost: ask again."))
  form.hidden = location.hash !== ""
  form.onsubmit = () => {
    fetch(`/answers/${id}`, { method: "POST", body: input.value })
    location.hash = id // a reload finds it again
    return !(form.hidden = true)
  }
</script>"""
