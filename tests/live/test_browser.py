"""What a real browser's EventSource makes of our streams."""

import collections
import contextlib
import json

import pytest

from tests.support.browser import await_page, chrome, evaluate
from tests.support.live import LiveServer, unique_key


@pytest.fixture(scope="module")
def server():
    with LiveServer("gunicorn-gevent", "tests.apps.browser:app") as server:
        yield server


@pytest.fixture(scope="module")
def driver():
    with chrome() as driver:
        yield driver


@pytest.fixture
def follow(server, driver):
    """Follow streams on a fresh page; return the stream's key and its expression."""
    driver.get(server.url)

    def follow(path):
        key = unique_key()
        driver.execute_script("follow(...arguments)", path, key)
        return key, f"followed['{key}']"

    yield follow
    driver.execute_script("Object.values(followed).forEach((f) => f.source.close())")


def counts(server, key):
    """Return the Last-Event-IDs of the view's runs, and the generator's starts."""
    with server.get(f"/counts?key={key}") as client:
        answer = json.loads(client.rest())
    return answer["asked"], answer["started"]


def test_a_finished_generator_is_not_run_again(server, driver, follow):
    """With end="stop" the browser returns once, gets 204 and stays away."""
    key, stream = follow("/stop/three")
    await_page(driver, f"{stream}.source.readyState === 2", stream)
    assert evaluate(driver, f"{stream}.events") == [
        ["message", str(n), str(n)] for n in range(3)
    ]
    assert evaluate(driver, f"{stream}.opened") == 1
    assert counts(server, key) == ([None, "syncstream-end"], 1)
    # Longer than its reconnection time, by the browser's own clock.
    _, other = follow("/reconnect/three")
    await_page(driver, f"{other}.opened >= 4", other)
    assert counts(server, key) == ([None, "syncstream-end"], 1)
    assert evaluate(driver, f"{stream}.source.readyState") == 2


def test_a_finished_generator_runs_again_if_asked_to(server, driver, follow):
    """With end="reconnect" the browser comes back, with the last id that it has."""
    key, stream = follow("/reconnect/three")
    await_page(driver, f"{stream}.events.length >= 9", stream)
    assert evaluate(driver, f"{stream}.source.readyState") != 2
    asked, started = counts(server, key)
    assert asked[:3] == [None, "2", "2"]
    assert started >= 3


def test_the_head_leaves_before_the_first_event(server, driver, follow):
    """A generator that waits has an open EventSource, and each event comes alone."""
    key, stream = follow("/stop/gated")
    await_page(driver, f"{stream}.opened === 1", stream)
    for n in range(2):
        assert evaluate(driver, f"{stream}.events.length") == n
        server.control.open(key)
        await_page(driver, f"{stream}.events.length === {n + 1}", stream)


def test_ids_names_and_lines_arrive(server, driver, follow):
    """Names, ids and data of several lines are in the browser what they were here."""
    key, stream = follow("/stop/fields")
    await_page(driver, f"{stream}.events.length === 4", stream)
    assert evaluate(driver, f"{stream}.events") == [
        ["named", "é-1", "one\ntwo\nthree\nfour"],
        ["message", "é-1", " a space, and a\u2028separator\x85"],
        ["message", "7", ""],
        ["message", "", '{"text":"naïve\\n✓"}'],
    ]
    server.control.open(key)
    await_page(driver, f"{stream}.source.readyState === 2", stream)
    assert counts(server, key) == ([None, "syncstream-end"], 1)


def test_a_refused_event_source_comes_back(driver):
    """Four threads, one of them reserved: a browser waits for a place among three."""
    with (
        LiveServer(
            "gunicorn-gthread", "tests.apps.browser:limited", "--threads", "4"
        ) as server,
        contextlib.ExitStack() as stack,
    ):
        key = unique_key()
        clients = [
            stack.enter_context(server.get(f"/stop/gated?key={key}")) for _ in range(20)
        ]
        statuses = collections.Counter()
        for client in clients:
            client.read_head()
            statuses[client.status] += 1
            if client.status == 503:
                assert 2 <= int(client.headers["retry-after"]) <= 6
        assert statuses == {200: 3, 503: 17}
        # Ordinary requests go on, the page is one.
        driver.get(server.url)
        other = unique_key()
        driver.execute_script("follow(...arguments)", "/stop/gated", other)
        stream = f"followed['{other}']"
        await_page(driver, f"{stream}.opened >= 1", stream)
        await_page(driver, f"{stream}.source.readyState === 0", stream)
        for client in clients:
            client.close()
        for _ in range(3):  # their generators are in a gate, and see it after that
            server.control.open(key)
        server.control.open(other)
        await_page(driver, f"{stream}.events.length === 1", stream)
        assert counts(server, other)[1] == 1  # refused: not started
        driver.execute_script(f"{stream}.source.close()")
