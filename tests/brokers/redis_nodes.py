"""Processes that publish to Redis beside the test's own: `Nodes`.

Each line of JSON that one of them reads is a publish. They outlive the brokers of one
run of the contract suite: to start them takes longer.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import subprocess
import sys
from threading import Lock
from typing import Any

from syncstream.brokers.redis import RedisBroker
from syncstream.errors import Unavailable, Uncertain
from tests import ROOT

PROGRAMS = {
    "threads": "from tests.brokers import redis_nodes; redis_nodes.main()",
    "gevent": (
        "from gevent import monkey; monkey.patch_all();"
        "from tests.brokers import redis_nodes; redis_nodes.main()"
    ),
}
ERRORS = {kind.__name__: kind for kind in (Unavailable, Uncertain)}


class Nodes:
    """So many processes; "threads", or "gevent" in patched ones."""

    def __init__(self, count: int, kind: str = "threads") -> None:
        self._turns = itertools.cycle(range(count + 1))
        self._nodes = [
            (
                subprocess.Popen(
                    [sys.executable, "-W", "error", "-c", PROGRAMS[kind]],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env={**os.environ, "PYTHONPATH": str(ROOT)},
                ),
                Lock(),
            )
            for _ in range(count)
        ]

    def broker(self, url: str) -> RedisBroker:
        """Return a broker whose publishes are made by all in turns, ours too."""
        broker = RedisBroker(url)
        publish = broker.publish

        def spread(items: Any, *, connection: Any = None) -> list[str | None]:
            place = next(self._turns)
            if place == len(self._nodes):
                return publish(items, connection=connection)
            return self.publish(place, url, items)

        broker.publish = spread  # type: ignore[method-assign]
        return broker

    def publish(self, place: int, url: str, items: Any) -> list[str | None]:
        """Publish there; return the ids, or raise what was raised there."""
        words = [[name, base64.b64encode(payload).decode()] for name, payload in items]
        process, turn = self._nodes[place]
        assert process.stdin is not None
        assert process.stdout is not None
        with turn:
            process.stdin.write(json.dumps([url, words]) + "\n")
            process.stdin.flush()
            error, answer = json.loads(process.stdout.readline())
        if error:
            raise ERRORS[error](answer)
        ids: list[str | None] = answer
        return ids

    def kill(self, place: int) -> None:
        self._nodes[place][0].kill()

    def close(self) -> None:
        for process, _ in self._nodes:
            process.communicate(timeout=20)

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def main() -> None:
    brokers: dict[str, RedisBroker] = {}
    for line in sys.stdin:
        url, words = json.loads(line)
        items = [(name, base64.b64decode(text)) for name, text in words]
        if url not in brokers:
            brokers[url] = RedisBroker(url)
        try:
            answer: Any = None, brokers[url].publish(items)
        except tuple(ERRORS.values()) as error:
            answer = type(error).__name__, str(error)
        print(json.dumps(answer), flush=True)
    for broker in brokers.values():
        broker.close()
