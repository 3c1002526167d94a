"""Each recipe for a page, with npm's scripts, in a real browser.

To the end of a stream, through a cancel, through an error in the middle and a cut. All
pages are frames of one, and so they wait at the same time. Each run of their jobs is
noted, under the key in the page's address.
"""

import time

import pytest

from tests.live.test_recipes_node import NODE
from tests.support.browser import await_page, chrome, evaluate
from tests.support.live import LiveServer, unique_key
from tests.support.programs import lack

STEPS = ["Fetch", "Unpack", "Build", "Test", "Install"]
PAGES = ["htmx/htmx2", "htmx/htmx4", "turbo/"]
BREAKS = ["cut", "error"]
HOWS = ["end", "wait", *BREAKS]
ENDLESS = ["htmx/htmx2-endless", "htmx/htmx4-endless"]
SCRIPT = """
window.opened = {};
window.openPage = (name, key) => {
  opened[name] = document.body.appendChild(document.createElement("iframe"));
  opened[name].src = `/${name.split(" ")[0]}?${key}`;
};
window.select = (name, selector) =>
  [...opened[name].contentDocument.querySelectorAll(selector)];
window.steps = (name) => select(name, "li").map((item) => item.textContent);
"""


@pytest.fixture(scope="module")
def server():
    if not (NODE / "node_modules" / "@hotwired").is_dir():
        lack(f"no scripts of npm: npm ci --prefix {NODE}")
    env = {"NODE_MODULES": str(NODE / "node_modules"), "INTERVAL": "0.02"}
    with LiveServer("gunicorn-gevent", "tests.apps.recipes_app:app", env=env) as server:
        yield server


@pytest.fixture(scope="module")
def driver(server):
    with chrome() as driver:
        driver.get(f"{server.url}/health")
        yield driver


def await_steps(driver, name, count=5):
    await_page(driver, f"steps('{name}').length === {count}", f"steps('{name}')")
    assert evaluate(driver, f"steps('{name}')") == STEPS[:count]


@pytest.fixture(scope="module")
def key_of(server, driver):
    """Open all pages, and break those that are to be; return the key of a page."""
    prefix = unique_key()

    def key_of(name):
        return f"{prefix}-{name.replace(' ', '-')}"

    def open_page(name):
        driver.execute_script("openPage(...arguments)", name, key_of(name))

    driver.execute_script(SCRIPT)
    for page in PAGES:  # one by one: a browser opens six connections
        for how in HOWS:
            open_page(f"{page} {how}")
        for how in BREAKS:
            await_steps(driver, f"{page} {how}", 2)
            server.control.open(key_of(f"{page} {how}"))
    for name in ENDLESS:
        open_page(name)
    for page in PAGES:
        await_steps(driver, f"{page} end")
    driver.execute_script("window.ended = performance.now()")
    return key_of


@pytest.fixture
def noted(server, key_of):
    """Return the next notes of the runs of a page's job, by its name."""

    def noted(name, count):
        # A browser waits for 5 to 15 s after an error.
        return [server.control.next(key_of(name), 30) for _ in range(count)]

    return noted


@pytest.mark.parametrize("page", PAGES)
def test_a_cancel_ends_the_job(driver, noted, page):
    """Its button ends the stream, and at once the job that waits."""
    name = f"{page} wait"
    await_steps(driver, name, 2)
    assert noted(name, 1) == [None]
    asked = time.monotonic()
    evaluate(driver, f"select('{name}', 'button')[0].click()")
    assert noted(name, 1) == ["closed"]
    assert time.monotonic() - asked < 5  # mostly 20 ms
    await_page(driver, f"select('{name}', 'main')[0].innerText === 'Cancelled'")


@pytest.mark.parametrize("page", PAGES)
def test_an_end_is_the_end(server, driver, key_of, noted, page):
    """All steps, in order; and nobody comes back in four seconds."""
    name = f"{page} end"
    assert noted(name, 2) == [None, "closed"]
    await_page(driver, "performance.now() > ended + 4000")
    assert server.control.pending(key_of(name)) == []
    assert evaluate(driver, f"steps('{name}')") == STEPS


def test_turbo_needs_no_last_event(driver, key_of):
    """Its source is an EventSource: it comes back once, and a 204 ends it for good."""
    source = "select('turbo/ end', 'turbo-stream-source')[0].streamSource"
    await_page(driver, f"{source}.readyState === EventSource.CLOSED")


@pytest.mark.parametrize("page", ENDLESS)
def test_without_its_last_event_it_comes_back_for_ever(driver, noted, page):
    """htmx 2 begins the job anew; htmx 4 asks for what follows its last step."""
    again = None if page == "htmx/htmx2-endless" else "5"
    assert noted(page, 6) == [None, "closed", again, "closed", again, "closed"]
    assert evaluate(driver, f"steps('{page}')")[:6] == (STEPS * 2)[: 6 - bool(again)]
    evaluate(driver, f"opened['{page}'].remove()")


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("how", BREAKS)
def test_a_break_is_resumed(server, driver, key_of, noted, page, how):
    """After a cut and after an error, by the last step's id: none is lost or twice."""
    name = f"{page} {how}"
    assert noted(name, 4) == [None, "closed", "2", "closed"]
    await_steps(driver, name)
    assert server.control.pending(key_of(name)) == []
