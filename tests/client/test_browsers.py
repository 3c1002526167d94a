"""Chromium's EventSource and npm's eventsource see what ours sees, event for event.

The streams are those of the standard's table in ``tests/protocol/test_sse_decoder.py``,
sent to each client by one server.
"""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from syncstream.client import EventSource
from tests.protocol.test_sse_decoder import CASES
from tests.support.browser import chrome
from tests.support.programs import lack, program
from tests.support.raw_server import HEAD, RawServer, Request, answer

pytestmark = [pytest.mark.timeout(90), pytest.mark.matrix]

NODE = Path(__file__).parents[1] / "live" / "node"
WIRES = [param.values[0] for param in CASES]
IDS = [param.id for param in CASES]
NAMES = sorted(
    {"message"} | {e.event for p in CASES for e in p.values[1].events if e.event}
)

READ = """
const [names, count, done] = arguments;
async function read(url) {
  const events = [];
  const source = new EventSource(url);
  for (const name of names) {
    source.addEventListener(name, (event) => {
      if (event.data !== undefined) {
        events.push([event.type, event.data, event.lastEventId]);
      }
    });
  }
  await new Promise((resolve) => {
    source.addEventListener("error", (event) => {
      if (event.data === undefined) resolve();
    });
  });
  source.close();
  return events;
}
(async () => {
  const seen = [];
  for (let number = 0; number < count; number++) seen.push(await read("/" + number));
  done(JSON.stringify(seen));
})();
"""


# Where others differ: the rows' names, and what they see instead. By the standard
# (HTML, §9.2.6) the stream is decoded with UTF-8 decode, which takes one byte order
# mark off (Encoding, §6); a second one is part of a field's name.
TWO_MARKS = {
    "BOM twice": [["message", "a", ""]],
    "BOM twice hides one line only": [["message", "a\nb", ""]],
    "BOM twice, then an event": [["message", "a", ""], ["message", "b", ""]],
}
# A blank line after the mark dispatches nothing (§9.2.6), and hides no event after it.
MARK_ALONE: dict[str, Any] = {"BOM and a blank line": []}


def serve(request: Request, sock: socket.socket) -> None:
    if request.path == "/page":
        sock.sendall(answer(body=b"<!doctype html>", kind="text/html"))
    elif not request.path[1:].isdecimal():
        sock.sendall(answer(404))
    else:
        sock.sendall(HEAD + WIRES[int(request.path[1:])])


@pytest.fixture(scope="module")
def server() -> Iterator[RawServer]:
    with RawServer(serve) as server:
        yield server


@pytest.fixture(scope="module")
def ours(server: RawServer) -> list[list[Any]]:
    found = []
    for number in range(len(CASES)):
        with EventSource(f"{server.url}{number}", reconnect=False) as source:
            found.append([[e.event or "message", e.data, e.id or ""] for e in source])
    return found


def differences(ours: list[list[Any]], theirs: list[list[Any]]) -> dict[str, Any]:
    """Return what the other client has seen, where ours has not seen the same."""
    pairs = zip(IDS, ours, theirs, strict=True)
    return {name: other for name, own, other in pairs if own != other}


def test_chromium(server, ours):
    """It drops an event after a byte order mark and a blank line; no more differs."""
    with chrome() as driver:
        driver.get(server.url + "page")
        driver.set_script_timeout(60)
        seen = driver.execute_async_script(READ, NAMES, len(CASES))
    assert differences(ours, json.loads(seen)) == MARK_ALONE


def test_npm_eventsource(server, ours):
    """It takes two byte order marks off, not one; no more differs."""
    node = program("node", "nodejs npm")
    if not (NODE / "node_modules" / "eventsource").is_dir():
        lack(f"no clients of Node: npm ci --prefix {NODE}")
    words = [node, NODE / "table.mjs", server.url, json.dumps(NAMES), str(len(CASES))]
    child = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert child.returncode == 0, child.stderr
    assert differences(ours, json.loads(child.stdout)) == TWO_MARKS
