"""How a test waits for something: not for a time."""

import time
from collections.abc import Callable
from typing import Any

TIMEOUT = 15.0  # seconds to wait for what must happen; not what it may take


def await_true(
    condition: Callable[[], Any],
    explain: Callable[[], object] = lambda: "",
    timeout: float = TIMEOUT,
    *,
    pause: Callable[[float], object] = time.sleep,
) -> None:
    """Wait until a condition holds, or fail with an explanation.

    Args:
        timeout: Seconds.
        pause: Sleeps for some seconds; gevent's lets other greenlets run.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout} s in vain\n{explain()}")
        pause(0.002)
