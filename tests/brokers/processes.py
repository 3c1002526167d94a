"""A broker of several processes: who publishes is another one each time.

Run as a program it is one of them: it publishes what it is asked to by lines of JSON.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import subprocess
import sys
import threading
from typing import Any

from syncstream.brokers import open_broker
from syncstream.brokers.contract import Broker
from syncstream.errors import PayloadTooLarge, Unavailable, Uncertain
from tests import ROOT

ERRORS = {kind.__name__: kind for kind in (PayloadTooLarge, Unavailable, Uncertain)}


class Node:
    """A process that publishes, to any broker.

    Args:
        kind: "threads" or "gevent".
    """

    def __init__(self, kind: str = "threads") -> None:
        self._turn = threading.Lock()
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-X",
                "dev",
                "-W",
                "error",
                "-m",
                "tests.brokers.processes",
                kind,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    def ask(self, url: str, options: Any, items: Any) -> list[str | None]:
        """Publish there; return the ids, or raise what was raised.

        Args:
            url, options: As for `open_broker`.
            items: As for `Broker.publish`; ``None`` to close that broker.
        """
        words = items and [[n, base64.b64encode(data).decode()] for n, data in items]
        with self._turn:
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            self.process.stdin.write(json.dumps([url, options, words]) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        if not line:
            raise EOFError("the process has ended")
        error, answer = json.loads(line)
        if error:
            raise ERRORS[error](answer)
        ids: list[str | None] = answer
        return ids

    def kill(self) -> None:
        self.process.kill()
        self._end()

    def close(self) -> None:
        assert self._end() == 0

    def _end(self) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        code = self.process.wait(20)
        self.process.stdout.close()
        return code


class Spread:
    """A broker whose publishes are made by several processes in turns, ours too.

    Args:
        url: The broker's.
        nodes: The processes beside this one.
        options: Of `open_broker`.
    """

    def __init__(self, url: str, nodes: list[Node], **options: Any) -> None:
        self.url, self._nodes, self._options = url, nodes, options
        self.broker: Broker = open_broker(url, **options)
        self.scope = self.broker.scope
        self.attach = self.broker.attach
        self.read = self.broker.read
        self.watch = self.broker.watch
        self.unwatch = self.broker.unwatch
        self._places = itertools.cycle(range(len(nodes) + 1))

    def publish(self, items: Any, *, connection: Any = None) -> list[str | None]:
        place = next(self._places)
        if items and place < len(self._nodes):
            return self._nodes[place].ask(self.url, self._options, items)
        return self.broker.publish(items, connection=connection)

    def close(self, timeout: float = 5.0) -> None:
        self.broker.close(timeout)
        for node in self._nodes:
            node.ask(self.url, self._options, None)


def main() -> None:
    if sys.argv[1] == "gevent":
        from gevent import monkey

        monkey.patch_all()
    brokers: dict[str, Broker] = {}
    for line in sys.stdin:
        url, options, words = json.loads(line)
        broker = brokers.get(url) or open_broker(url, **options)
        brokers[url] = broker
        answer: Any = None, []
        try:
            if words is None:
                brokers.pop(url).close()
            else:
                items = [(name, base64.b64decode(text)) for name, text in words]
                answer = None, broker.publish(items)
        except tuple(ERRORS.values()) as error:
            answer = type(error).__name__, str(error)
        print(json.dumps(answer), flush=True)
    for broker in brokers.values():
        broker.close()


if __name__ == "__main__":
    main()
