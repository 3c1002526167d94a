"""The standard's table through a real socket: cut at every byte, and cut off there.

The table is that of ``tests/protocol/test_sse_decoder.py``. One server sends each of
its streams byte by byte, each in a segment of its own (TCP_NODELAY), or in an HTTP
chunk of its own.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from syncstream.client import EventSource
from syncstream.protocol.sse import Decoder
from tests.protocol.test_sse_decoder import CASES
from tests.support.raw_server import HEAD, RawServer, Request, answer, one_by_one

pytestmark = [pytest.mark.timeout(30), pytest.mark.matrix]

CHUNKED = HEAD[:-2] + b"Transfer-Encoding: chunked\r\n\r\n"
WIRES = [param.values[0] for param in CASES]

# A stream with all that there is: each kind of line end, a cut-off of each of its
# bytes leaves something else unfinished.
LONG = (
    "\ufeffid: 1\ndata: a\n\n: comment\r\nevent: ü\rid: é2\r\ndata: b\r\ndata:c\r\n\r\n"
    "id: lost without a blank line\n"
).encode()


def serve(request: Request, sock: socket.socket) -> None:
    kind, _, number = request.path.strip("/").partition("/")
    if kind == "cut":
        cut = HEAD + LONG[: int(number)]
        sock.sendall(answer(204, kind="") if request.earlier else cut)
        return
    chunked = kind == "chunked"
    sock.sendall(CHUNKED if chunked else HEAD)
    for byte in one_by_one(WIRES[int(number)]):
        sock.sendall(b"1\r\n%b\r\n" % byte if chunked else byte)
    sock.sendall(b"0\r\n\r\n" * chunked)


@pytest.fixture(scope="module")
def server() -> Iterator[RawServer]:
    with RawServer(serve) as server:
        yield server


@pytest.mark.parametrize("kind", ["plain", "chunked"])
@pytest.mark.parametrize("number", range(len(CASES)), ids=[p.id for p in CASES])
def test_the_standards_table(server, number, kind):
    """The client sees what the standard says, and nothing else."""
    expected = CASES[number].values[1]
    url = f"{server.url}{kind}/{number}"
    with EventSource(url, reconnect=False) as source:
        seen = [(e.data, e.event, e.id) for e in source]
        last = source.last_event_id
    assert seen == expected.events
    assert last == expected.last_event_id


def test_cut_off_at_every_byte(server):
    """What was complete is seen once, and the next attempt has its id."""
    for size in range(len(LONG) + 1):
        decoder = Decoder()
        whole = [(e.data, e.event, e.id) for e in decoder.feed(LONG[:size])]
        with EventSource(f"{server.url}cut/{size}", backoff=(0.001, 0.001)) as source:
            assert [(e.data, e.event, e.id) for e in source] == whole
            assert source.last_event_id == decoder.last_event_id
        one, two = server.requests[-2:]
        assert "last-event-id" not in one.headers
        sent = two.headers.get("last-event-id")
        assert (sent and sent.encode("latin-1").decode()) == decoder.last_event_id
