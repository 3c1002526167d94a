"""What a browser's pages make of channels: the examples' own, in Chromium."""

import contextlib
import selectors
import socket
import socketserver
import threading

import pytest
from selenium.webdriver.common.by import By

from tests.support.browser import await_page, chrome, evaluate
from tests.support.live import LiveServer

ITEMS = "[...document.querySelectorAll('li')].map((item) => item.textContent)"
AWAY = "source.readyState === EventSource.CONNECTING"
NOTE = "Some lines may be missing."


@pytest.fixture(scope="module")
def driver():
    with chrome() as driver:
        yield driver


def serve(name, ready="GET /", **env):
    env = {"HUB_URL": "memory:", **env}  # which forgets all at a restart
    return LiveServer("gunicorn-gevent", f"examples.{name}:app", env=env, ready=ready)


def say(driver, text):
    """Write a line into the chat as a user does, and send it."""
    field = driver.find_element(By.CSS_SELECTOR, "input")
    field.send_keys(text)
    driver.find_element(By.CSS_SELECTOR, "button").click()
    await_page(driver, "document.querySelector('input').value === ''")


@contextlib.contextmanager
def tabs(driver, *urls):
    """Open a tab for each URL; yield a function that goes to the nth."""
    first = driver.current_window_handle
    opened = []
    for url in urls:
        driver.switch_to.new_window("tab")
        opened.append(driver.current_window_handle)
        driver.get(url)
    try:
        yield lambda n: driver.switch_to.window(opened[n])
    finally:
        for handle in opened:
            driver.switch_to.window(handle)
            driver.close()
        driver.switch_to.window(first)


def await_items(driver, expected):
    """Wait until the page has as many items, and compare them."""
    await_page(driver, f"{ITEMS}.length >= {len(expected)}", ITEMS)
    assert evaluate(driver, ITEMS) == expected


class Relay:
    """A port that leads to a server, until its connections are cut.

    Attributes:
        refuses: It takes no new ones.
    """

    def __init__(self, port):
        self.refuses = False
        self._cuts = set()
        relay = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                if relay.refuses:
                    return
                with socket.create_connection(("127.0.0.1", port)) as server:
                    relay._cuts.add(self.request)
                    relay._carry(self.request, server)
                    relay._cuts.discard(self.request)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, *args):
                """A connection has been cut: that is what this is for."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )
        self._thread.start()

    @staticmethod
    def _carry(client, server):
        other = {client: server, server: client}
        with selectors.DefaultSelector() as selector:
            for sock in other:
                selector.register(sock, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    data = key.fileobj.recv(65536)
                    if not data:
                        return
                    other[key.fileobj].sendall(data)

    def cut(self):
        """End all connections, in the middle of whatever they carry."""
        for sock in list(self._cuts):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.cut()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def test_chat_in_two_tabs(driver):
    """What either tab says is in both, once and in order, and after a reload, too."""
    with serve("chat") as server, tabs(driver, server.url, server.url) as go_to:
        lines = []
        for n in range(6):
            lines.append(f"line {n}, <b>é</b>")
            go_to(n % 2)
            say(driver, lines[-1])
        for tab in (0, 1):
            go_to(tab)
            await_items(driver, lines)
        driver.refresh()
        await_items(driver, lines)
        say(driver, "after the reload")
        for tab in (0, 1):
            go_to(tab)
            await_items(driver, [*lines, "after the reload"])


def test_chat_after_a_restart_of_the_server(driver):
    """Both pages come back by themselves, note one reset, and get each line once."""
    with serve("chat") as server, tabs(driver, server.url, server.url) as go_to:
        say(driver, "before")
        for tab in (0, 1):
            go_to(tab)
            await_items(driver, ["before"])
        shown = ["before"]
        for n in range(2):  # the id of a reset is one to come back with, too
            server.stop()
            server.start(server.port)
            shown.append(NOTE)
            for tab in (0, 1):
                go_to(tab)
                await_items(driver, shown)
            for tab in (0, 1):
                go_to(tab)
                shown.append(f"line {n} of tab {tab}")
                say(driver, shown[-1])
            for tab in (0, 1):
                go_to(tab)
                await_items(driver, shown)


def test_chat_written_while_a_tab_is_away(driver):
    """A tab whose connections are cut gets what it has missed, and no reset."""
    with (
        serve("chat") as server,
        Relay(server.port) as relay,
        tabs(driver, relay.url, server.url) as go_to,
    ):
        say(driver, "line 0")
        go_to(0)
        await_items(driver, ["line 0"])
        lines = ["line 0"]
        for n in range(1, 4):
            go_to(0)
            relay.refuses = True
            relay.cut()
            await_page(driver, AWAY)
            go_to(1)
            for part in "ab":
                lines.append(f"line {n}{part}")
                say(driver, lines[-1])
            relay.refuses = False
            for tab in (0, 1):
                go_to(tab)
                await_items(driver, lines)


def test_chat_lost_while_a_tab_is_away(driver):
    """What a tab missed, and the server has forgotten, is announced by a reset."""
    with (
        serve("chat") as server,
        Relay(server.port) as relay,
        tabs(driver, server.url, relay.url) as go_to,
    ):
        go_to(0)
        say(driver, "seen")
        go_to(1)
        await_items(driver, ["seen"])
        relay.refuses = True
        relay.cut()
        await_page(driver, AWAY)
        go_to(0)
        say(driver, "unseen")
        await_items(driver, ["seen", "unseen"])
        server.stop()
        server.start(server.port)
        relay.refuses = False
        await_items(driver, ["seen", "unseen", NOTE])
        say(driver, "new")
        for tab, shown in enumerate((["seen", "unseen"], ["seen"])):
            go_to(tab)
            await_items(driver, [*shown, NOTE, "new"])


def test_notifications(driver):
    """A user's pages show what is sent to that user, once each."""
    with (
        serve("notifications", "GET /ann") as server,
        tabs(driver, *(f"{server.url}/{name}" for name in ("ann", "ann", "bob"))) as go,
    ):
        for n in range(3):
            for name in ("ann", "bob"):
                go(0)
                driver.execute_async_script(
                    "fetch(arguments[0], { method: 'POST', body: arguments[1] })"
                    ".then(arguments[2])",
                    f"/notify/{name}",
                    f"{n} for {name}",
                )
        for tab, name in enumerate(("ann", "ann", "bob")):
            go(tab)
            await_items(driver, [f"{n} for {name}" for n in range(3)])


def test_progress_after_a_reload(driver):
    """The bar of a page that is reloaded half way arrives at its end."""
    bar = "document.querySelector('progress').value"
    with serve("progress", INTERVAL="0.02") as server:
        driver.get(server.url)
        driver.find_element(By.CSS_SELECTOR, "button").click()
        await_page(driver, f"location.pathname.startsWith('/jobs/') && {bar} > 20")
        driver.refresh()
        await_page(driver, "document.querySelector('output').value === 'done'", bar)
        assert evaluate(driver, bar) == 100


def test_prices(driver):
    """The table has a row for each symbol, and they change."""
    rows = "[...document.querySelectorAll('tr')].map((row) => row.innerText)"
    with serve("prices", THROTTLE="0.1") as server:
        driver.get(server.url)
        await_page(driver, f"{rows}.length === 3", rows)
        before = evaluate(driver, f"{rows}.join()")
        driver.execute_script("window.before = arguments[0]", before)
        await_page(driver, f"{rows}.join() !== before", rows)
        assert sorted(row.split()[0] for row in evaluate(driver, rows)) == [
            *("ACME", "INIT", "UMBR")
        ]


def test_tokens_after_a_reload(driver):
    """A page that is reloaded while the answer is written has all of it, once."""
    text = "document.querySelector('p').textContent"
    with serve("tokens", INTERVAL="0.1") as server:
        driver.get(server.url)
        driver.find_element(By.CSS_SELECTOR, "input").send_keys("Why?")
        driver.find_element(By.CSS_SELECTOR, "button").click()
        await_page(driver, f"{text}.split(' ').length > 3", text)
        driver.refresh()
        await_page(driver, f"{text}.endsWith('opinion. ')", text)
        assert evaluate(driver, text) == "You ask: Why? That is a matter of opinion. "
