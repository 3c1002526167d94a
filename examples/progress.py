"""The progress of a long job, which continues even if nobody watches it.

    gunicorn -k gevent -w 4 examples.progress:app
    curl -N http://127.0.0.1:8000/jobs/NUMBER/events

``curl -i -X POST http://127.0.0.1:8000/jobs`` starts a job and returns its number, as
does the button at http://127.0.0.1:8000/. A job runs in a thread and has its own
channel: every page, reloaded or new, begins with the job's start, on any worker.
"""

import os
import threading
from secrets import randbelow

from flask import Flask, redirect

from examples.shared.same_site import same_site_only
from syncstream import Hub, SSEResponse, sleep

INTERVAL = float(os.environ.get("INTERVAL", 0.1))

app = Flask(__name__)
app.before_request(same_site_only)
hub = Hub(os.environ.get("HUB_URL", "local:progress"))


def work(job):
    for percent in range(101):
        hub.publish(f"job:{job}", {"percent": percent})
        sleep(INTERVAL)
    hub.publish(f"job:{job}", "done", event="end")


@app.post("/jobs")
def start():
    job = randbelow(1 << 32)  # a counter would be that of one worker
    threading.Thread(target=work, args=[job], daemon=True).start()
    return redirect(f"/jobs/{job}", 303)


@app.get("/jobs/<int:job>/events")
def events(job):
    return SSEResponse(hub.subscribe(f"job:{job}", after="start"), retry=1000)


@app.get("/")
@app.get("/jobs/<int:job>")
def page(job=0):
    return """<!doctype html><meta name="viewport" content="width=device-width">
<title>Progress</title><form method="post" action="/jobs"><button>Start</button></form>
<progress max="100" value="0"></progress> <output></output>
<script>
  const [bar, output] = document.querySelectorAll("progress, output")
  if (location.pathname !== "/") {
    const source = new EventSource(location.pathname + "/events")
    source.onmessage = (e) => { bar.value = JSON.parse(e.data).percent }
    source.addEventListener("end", (e) => { output.value = e.data; source.close() })
    source.addEventListener("reset", () => { output.value = "interrupted" })
  }
</script>"""
