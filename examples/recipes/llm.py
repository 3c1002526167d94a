"""An LLM's answer on a page, token by token, with a Stop button.

    OPENAI_API_KEY=… gunicorn -k gevent -w 4 examples.recipes.llm:app
    curl -N -d 'Why?' http://127.0.0.1:8000/answers

The page is http://127.0.0.1:8000/. "Stop", or closing the page, ends the request to the
model at once: no token is paid for that nobody reads. OPENAI_BASE_URL names another
service of the same API, such as completions.py.
"""

import os
import re

import openai
from flask import Flask, abort, request

from syncstream import Event, SSEResponse, current_stream

HOSTS = {"localhost", "127.0.0.1", "[::1]", *os.environ.get("HOSTS", "").split()}
app = Flask(__name__)
llm = openai.AsyncOpenAI().chat.completions


def asking(question):
    return {
        "model": os.environ.get("MODEL", "gpt-5-mini"),
        "messages": [{"role": "user", "content": question}],
        "stream": True,
    }


async def tokens(question):
    async with await llm.create(**asking(question)) as chunks:
        async for chunk in chunks:
            if chunk.choices and chunk.choices[0].delta.content:
                yield {"token": chunk.choices[0].delta.content}


def answer(source):
    return SSEResponse(source, end=Event("", event="done"), on_error=failure)


def failure(error):
    text = "The model is busy." if is_limit(error) else "The model has failed."
    return Event({"message": text}, event="error")  # the log has `error` itself


def is_limit(error):
    return isinstance(error, openai.RateLimitError)


@app.before_request
def same_site_only():
    """Refuse other sites' pages, also one whose own name leads to this machine."""
    origin = request.origin or f"//{request.host}"
    is_ours = re.sub(r":\d+$", "", request.host) in HOSTS
    if not is_ours or origin.partition("//")[2] != request.host:
        abort(403, "HOSTS does not name this host, or it is another site's page.")


@app.post("/answers")
def answers():
    return answer(tokens(request.get_data(as_text=True)))


def blocking_tokens(question):
    """Yield the same by the synchronous client, which `link` interrupts."""
    # A client that tries again takes the end of its link for one of its connection, and
    # has the model write for nobody. It also sleeps in between, which nothing ends.
    with openai.OpenAI(max_retries=0) as client:
        current_stream().link(client)  # before it connects
        for chunk in client.chat.completions.create(**asking(question)):
            if chunk.choices and chunk.choices[0].delta.content:
                yield {"token": chunk.choices[0].delta.content}


@app.post("/answers/blocking")
def blocking_answers():
    return answer(blocking_tokens(request.get_data(as_text=True)))


@app.get("/")
def page():
    return """<!doctype html>
<meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Answers</title>
<style>
  body { font: 1rem/1.5 system-ui; max-width: 40rem; margin: 2rem auto; padding: 1rem }
  form { display: flex; gap: .5rem }
  input { flex: 1 }
  input, button { font: inherit; padding: .4rem .8rem }
  p { white-space: pre-wrap; min-height: 1.5rem }
  .error { color: #b00020 }
</style>
<form>
  <input autofocus autocomplete="off" aria-label="Question" placeholder="Ask anything">
  <button>Ask</button> <button type="button" disabled>Stop</button>
</form>
<p aria-live="polite"></p>
<output></output>
<script>
  const [form, input, ask, stop, answer, status] =
    ["form", "input", "button", "[type=button]", "p", "output"].map(
      (selector) => document.querySelector(selector))
  const say = (text, name = "") =>
    Object.assign(status, { textContent: text, className: name })

  async function* events(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader()
    for (let text = "", part; !(part = await reader.read()).done; ) {
      const blocks = (text + part.value).split("\\n\\n")
      text = blocks.pop()
      for (const block of blocks) {  // a comment's field has the name ""
        // Without `s`, a line would end at U+2028 and U+2029, too.
        const fields = block.split("\\n").map((line) => line.split(/: ?(.*)/s))
        yield Object.fromEntries(fields)
      }
    }
  }

  form.onsubmit = async (submitted) => {
    submitted.preventDefault()
    const leave = new AbortController()
    stop.onclick = () => leave.abort()
    ask.disabled = !(stop.disabled = false)
    answer.textContent = ""
    say("Answering…")
    try {
      const options = { method: "POST", body: input.value, signal: leave.signal }
      const response = await fetch("answers", options)
      if (!response.ok) throw new Error(`The server says ${response.status}.`)
      let isDone = false
      for await (const { event, data } of events(response)) {
        if (event === "error") throw new Error(JSON.parse(data).message)
        isDone = event === "done"
        if (event === undefined && data) answer.append(JSON.parse(data).token)
      }
      if (!isDone) throw new Error("The answer has broken off.")
      say("")
    } catch (error) {
      if (leave.signal.aborted) say("Stopped.")
      else say(error instanceof TypeError ? "The connection is lost." : error.message,
        "error")
    }
    ask.disabled = !(stop.disabled = true)
  }
</script>"""
