"""The clock for waits: ``time``, whose ``monotonic`` no test can freeze.

freezegun stops ``time.monotonic`` in `time` and in each module that has imported it. A
wait that uses a stopped clock never ends, and no keepalive falls due. So ``monotonic``
comes from a private copy of the `time` module. All other names are looked up in `time`
at the call, frozen or patched: ``time.time``, for the age of stored events, and
``sleep``.
"""

from __future__ import annotations

import time as _time
from collections.abc import Callable
from importlib.machinery import BuiltinImporter
from importlib.util import module_from_spec
from typing import Any

__all__ = ["time"]


def _monotonic() -> Callable[[], float]:
    spec = BuiltinImporter.find_spec("time")
    if spec is None or spec.loader is None:  # not built in, on another Python
        return _time.monotonic
    own = module_from_spec(spec)
    spec.loader.exec_module(own)
    monotonic: Callable[[], float] = own.monotonic
    return monotonic


class _Time:
    def __init__(self) -> None:
        self.monotonic = _monotonic()  # `syncstream.testing` has another

    def __getattr__(self, name: str) -> Any:
        return getattr(_time, name)


time = _Time()
