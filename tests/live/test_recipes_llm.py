"""The recipe of an LLM's answer: its page in Chromium, its two sources, an upstream.

The upstream is a service in OpenAI's form, which does what the question says. It shows
when its client, the SDK in the recipe, has left.
"""

import collections
import http.server
import json
import queue
import threading
import time

import pytest
from selenium.webdriver.common.by import By

from syncstream.protocol import sse
from tests.support.browser import await_page, chrome, evaluate
from tests.support.live import LiveServer, unique_key
from tests.support.tcp_proxy import Proxy
from tests.support.waits import TIMEOUT

ANSWER = "answer.textContent"
STATUS = "status.textContent"


class Handler(http.server.BaseHTTPRequestHandler):
    """Sends the words after the first, which is the question's key.

    ``WAIT`` waits until the client has left; as the first word it does so before the
    head. ``LATER`` is the status 503, for 50 s. ``LINES`` has U+2028 and U+2029.
    ``FAIL`` is an error in the service's form, ``CUT`` a broken connection, and
    ``BUSY`` the status 429.
    """

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        key, *words = json.loads(body)["messages"][0]["content"].split()
        if words[0] == "WAIT":
            return self.wait(key)
        if words[0] == "LATER":
            self.server.waits[key].put(None)
            self.send_response(503)
            self.send_header("Retry-After", "50")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if words[0] == "BUSY":
            self.send_response(429)
            self.send_header("x-should-retry", "false")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for word in words:
            if word == "CUT":
                self.close_connection = True
                return None
            if word == "FAIL":
                return self.end({"error": {"message": "internal", "type": "x"}})
            if word == "WAIT":
                return self.wait(key)
            if word == "LINES":
                word = "a\u2028b\u2029c"
            self.say({"choices": [{"index": 0, "delta": {"content": f"{word} "}}]})
        return self.end("[DONE]")

    def say(self, data):
        block = sse.Event(data).encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(block), block))

    def end(self, data):
        self.say(data)
        self.wfile.write(b"0\r\n\r\n")

    def wait(self, key):
        self.server.waits[key].put(None)
        self.close_connection = True
        self.connection.settimeout(TIMEOUT)
        try:
            data = self.connection.recv(1)
        except ConnectionResetError:
            data = b""
        if not data:
            self.server.left[key].put(time.monotonic())

    def log_message(self, format, *arguments):
        pass


@pytest.fixture(scope="module")
def upstream():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.waits = collections.defaultdict(queue.Queue)
        server.left = collections.defaultdict(queue.Queue)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module", params=["gunicorn-gevent", "gunicorn-gthread"])
def server(request, upstream):
    env = {
        "OPENAI_API_KEY": "-",
        "OPENAI_BASE_URL": f"http://127.0.0.1:{upstream.server_port}/v1",
        "NO_PROXY": "*",
    }
    app = "examples.recipes.llm:app"
    with LiveServer(request.param, app, env=env, ready="GET /") as server:
        yield server


@pytest.fixture(scope="module")
def driver():
    with chrome() as driver:
        yield driver


# A page does not see its server's worker: one is enough.
on_gevent = pytest.mark.parametrize("server", ["gunicorn-gevent"], indirect=True)


@pytest.fixture
def page(server, driver):
    driver.get(server.url)
    return driver


@pytest.fixture
def key():
    return unique_key()


def ask(driver, question):
    field = driver.find_element(By.CSS_SELECTOR, "input")
    field.clear()
    field.send_keys(question)
    driver.find_element(By.CSS_SELECTOR, "button").click()


def stop(driver):
    driver.find_element(By.CSS_SELECTOR, "[type=button]").click()


def await_answer(driver, text, status=None):
    await_page(driver, f"{ANSWER} === {json.dumps(text)}", f"[{ANSWER}, {STATUS}]")
    if status is not None:
        await_page(driver, f"{STATUS} === {json.dumps(status)}", STATUS)


def await_left(upstream, key, since):
    """Wait until the upstream's client has left; return the seconds that took."""
    return upstream.left[key].get(timeout=TIMEOUT) - since


@on_gevent
def test_the_page_shows_an_answer(page, key):
    """To its end; and then another one."""
    ask(page, f"{key} One two: three.")
    await_answer(page, "One two: three. ", "")
    ask(page, f"{key} Four.")
    await_answer(page, "Four. ", "")
    assert [e for e in page.get_log("browser") if e["source"] != "network"] == []


@on_gevent
def test_the_page_shows_all_characters(page, key):
    """U+2028 and U+2029 are no ends of lines."""
    ask(page, f"{key} LINES end")
    await_answer(page, "a\u2028b\u2029c end ", "")


@on_gevent
def test_the_page_shows_a_short_answer(page, key):
    """A whole response without its last event is no whole answer."""
    token = 'data: {"token":"One "}\n\n'
    page.execute_script(
        "const [text] = arguments; window.fetch = async () => new Response(text)", token
    )
    ask(page, key)
    await_answer(page, "One ", "The answer has broken off.")


@on_gevent
def test_stop_ends_the_upstream(page, upstream, key):
    """At once; what has been written stays, and the next question works."""
    ask(page, f"{key} One two WAIT")
    await_answer(page, "One two ", "Answering…")
    upstream.waits[key].get(timeout=TIMEOUT)
    began = time.monotonic()
    stop(page)
    assert await_left(upstream, key, began) < 5  # mostly 45 ms, with the click's 40
    await_answer(page, "One two ", "Stopped.")
    ask(page, f"{key} Three.")
    await_answer(page, "Three. ", "")


@on_gevent
@pytest.mark.parametrize(
    ("words", "text", "status"),
    [
        ("One FAIL", "One ", "The model has failed."),
        ("One CUT", "One ", "The model has failed."),
        ("BUSY", "", "The model is busy."),
    ],
)
def test_the_page_shows_an_error(page, key, words, text, status):
    """In the middle or at the beginning; the user may ask again."""
    ask(page, f"{key} {words}")
    await_answer(page, text, status)
    assert evaluate(page, "status.className") == "error"
    assert not evaluate(page, "ask.disabled")


@on_gevent
def test_the_page_shows_a_cut(driver, server, key):
    """A connection that breaks is no end of an answer."""
    with Proxy(server.port) as proxy:
        driver.get(f"http://127.0.0.1:{proxy.port}/")
        ask(driver, f"{key} One WAIT")
        await_answer(driver, "One ", "Answering…")
        proxy.cut()
        await_answer(driver, "One ", "The connection is lost.")


@on_gevent
def test_two_tabs_are_independent(page, server, upstream, key):
    """Both write at once; the end of one is not that of the other."""
    other, first = f"{key}-2", page.current_window_handle
    ask(page, f"{key} One WAIT")
    await_answer(page, "One ")
    page.switch_to.new_window("tab")
    second = page.current_window_handle
    try:
        page.get(server.url)
        ask(page, f"{other} Two WAIT")
        await_answer(page, "Two ")
        upstream.waits[other].get(timeout=TIMEOUT)
        page.switch_to.window(first)
        stop(page)
        await_answer(page, "One ", "Stopped.")
        upstream.left[key].get(timeout=TIMEOUT)
        assert upstream.left[other].empty()
        page.switch_to.window(second)
        assert evaluate(page, STATUS) == "Answering…"
    finally:
        page.switch_to.window(second)
        page.close()  # a tab that is closed leaves, too
        page.switch_to.window(first)
    upstream.left[other].get(timeout=TIMEOUT)


@pytest.fixture(params=["answers", "answers/blocking"])
def post(request, server):
    """Ask as a program does; return the raw client."""

    def post(question):
        client = server.connect()
        length = {"Content-Length": str(len(question))}
        client.request("POST", f"/{request.param}", headers=length)
        client.send(question)
        return client

    return post


def test_both_sources_end(post, key):
    with post(f"{key} One two") as client:
        events = sse.Decoder().feed(client.rest())
    assert [(event.event, event.data) for event in events] == [
        (None, '{"token":"One "}'),
        (None, '{"token":"two "}'),
        ("done", ""),
    ]
    assert client.is_whole


@pytest.mark.parametrize("words", ["One WAIT", "WAIT"])
def test_both_sources_leave(post, upstream, key, words):
    """While they read the answer, and while they wait for its head."""
    with post(f"{key} {words}") as client:
        assert client.block() == b": ok\n\n"
        if words.startswith("One"):
            assert client.block() == b'data: {"token":"One "}\n\n'
        upstream.waits[key].get(timeout=TIMEOUT)
    assert await_left(upstream, key, time.monotonic()) < 5  # mostly 1 ms


def test_both_sources_fail(post, key):
    with post(f"{key} One CUT") as client:
        *_, last = sse.Decoder().feed(client.rest())
    assert (last.event, last.json()) == ("error", {"message": "The model has failed."})


def ask_blocking(server, question):
    client = server.connect()
    length = {"Content-Length": str(len(question))}
    client.request("POST", "/answers/blocking", headers=length)
    client.send(question)
    return client


def test_the_linked_client_asks_once(server, upstream, key):
    """Whether its user leaves or the service is busy: it neither retries nor sleeps."""
    with ask_blocking(server, f"{key} WAIT"):
        upstream.waits[key].get(timeout=TIMEOUT)
    upstream.left[key].get(timeout=TIMEOUT)
    with pytest.raises(queue.Empty):
        upstream.waits[key].get(timeout=0.7)  # the SDK would wait for 0.5 s
    busy, began = f"{key}-2", time.monotonic()
    with ask_blocking(server, f"{busy} LATER") as client:
        *_, last = sse.Decoder().feed(client.rest())
    assert last.event == "error"
    assert time.monotonic() - began < 10  # mostly 10 ms
    assert upstream.waits[busy].qsize() == 1
