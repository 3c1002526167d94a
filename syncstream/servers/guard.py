"""`guarded`: a server's file that fails serves as an unknown server's would.

A release of the server may differ from the ones that its file was written for, and a
middleware may have replaced a part of the environ. A stream works without most facts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any

from ..runtime.process import process
from ..runtime.waiting import say
from .contract import Server

__all__ = ["guarded", "say_failed"]

log = logging.getLogger("syncstream.servers")


def guarded(server: Server, other: Server) -> Server:
    """Return a server whose functions do not fail.

    Args:
        server: The server.
        other: The unknown server, whose functions are called in place of failed ones.
            They are not enough for a `Swap`, which asks ``exact``.
    """

    def safe(function: Callable[..., Any], fallback: Any) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            try:
                return function(*args)
            except Exception as error:
                say_failed(server, error)
                return fallback(*args)

        return call

    facts = {field.name: getattr(server, field.name) for field in fields(server)}
    for name in ("warnings", "stop_warnings"):
        facts[name] = _at_once(facts[name])
    functions = {name: fact for name, fact in facts.items() if callable(fact)}
    fallbacks = {name: getattr(other, name) for name in functions}
    # If that fails, the server may add the new headers to the old ones.
    fallbacks["forget_head"] = lambda environ, write: False
    changes: dict[str, Any] = {
        name: safe(function, fallbacks[name]) for name, function in functions.items()
    }
    return replace(server, exact=server, **changes)


def _at_once(warnings: Callable[..., Iterable[str]]) -> Callable[..., tuple[str, ...]]:
    """Have a generator fail when it is called."""
    return lambda environ: tuple(warnings(environ))


def say_failed(server: Server, error: Exception) -> None:
    """Log once a process that the file of a server has failed."""
    token, said = object(), process().said
    if said.setdefault(f"failed: {server.name}", token) is token:
        text = (
            "the server has something that syncstream does not know of %s, so some"
            " streams are served as on an unknown server, perhaps without keepalives"
            " and hand-overs: docs/servers.md has the tested releases"
        )
        say(log, logging.ERROR, text, server.name, error=error)
