"""Headless Chromium, driven through selenium: `chrome`.

Debian's programs, never a downloaded driver. Where one is missing the test is
skipped; under ``CI=true`` it fails.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

from tests.support.programs import program
from tests.support.waits import await_true

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


@contextmanager
def chrome(*flags: str, size: tuple[int, int] = (1280, 800)) -> Iterator[Chrome]:
    """Run a browser with a fresh profile for the length of a block.

    Args:
        flags: More words for Chromium's command line.
        size: The page's width and height in CSS pixels; a window as narrow as a
            phone is not to be had, so it is emulated.
    """
    os.environ.setdefault("SE_OFFLINE", "true")  # selenium asks nobody
    os.environ.setdefault("SE_AVOID_STATS", "true")
    options = ChromeOptions()
    options.binary_location = program("chromium", "chromium")
    service = Service(executable_path=program("chromedriver", "chromium-driver"))
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*_FLAGS, f"--user-data-dir={profile}", *flags):
            options.add_argument(flag)
        driver = Chrome(options=options, service=service)
        try:
            resize(driver, size)
            yield driver
        finally:
            driver.quit()


def resize(driver: Chrome, size: tuple[int, int], *, scale: int = 1) -> None:
    """Give the page this width and height in CSS pixels."""
    width, height = size
    screen = {"width": width, "height": height, "deviceScaleFactor": scale}
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {**screen, "mobile": width < 500}
    )


def prefer(driver: Chrome, scheme: str) -> None:
    """Make the page see that the user prefers "light" or "dark"."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def evaluate(driver: Chrome, expression: str) -> Any:
    """Return the value of a JavaScript expression."""
    return driver.execute_script(f"return {expression}")


def await_page(driver: Chrome, expression: str, explain: str = "null") -> None:
    """Wait until a JavaScript expression is true; `explain` is shown if it never is."""
    await_true(
        lambda: evaluate(driver, expression),
        lambda: f"{expression}\n{evaluate(driver, explain)}",
    )
