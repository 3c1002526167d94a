"""Compressed event streams: each event comes when it is sent."""

from __future__ import annotations

import gzip
import sys
import threading
import zlib
from typing import Any

import brotli
import pytest
import requests

from syncstream.client import EventSource, events
from tests.support.raw_server import HEAD, RawServer

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

pytestmark = pytest.mark.timeout(30)


class Gzip:
    def __init__(self) -> None:
        self._compressor = zlib.compressobj(wbits=zlib.MAX_WBITS | 16)

    def flushed(self, data: bytes) -> bytes:
        written = self._compressor.compress(data)
        return written + self._compressor.flush(zlib.Z_SYNC_FLUSH)


class Brotli:
    def __init__(self) -> None:
        self._compressor = brotli.Compressor()

    def flushed(self, data: bytes) -> bytes:
        written: bytes = self._compressor.process(data) + self._compressor.flush()
        return written


class Zstd:
    def __init__(self) -> None:
        self._compressor = zstd.ZstdCompressor()

    def flushed(self, data: bytes) -> bytes:
        mode = zstd.ZstdCompressor.FLUSH_BLOCK
        written: bytes = self._compressor.compress(data, mode)
        return written


ENCODINGS: dict[str, Any] = {"gzip": Gzip, "br": Brotli, "zstd": Zstd}


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_events_come_when_they_are_sent(encoding, chunked):
    """Flushed after each event, decoded after each; the client has asked for it."""
    going = threading.Semaphore(0)

    def serve(request, sock):
        head = HEAD[:-2] + b"Content-Encoding: %b\r\n" % encoding.encode()
        sock.sendall(head + b"Transfer-Encoding: chunked\r\n" * chunked + b"\r\n")
        compressor = ENCODINGS[encoding]()
        for number in range(3):
            wire = compressor.flushed(b"data: %d\n\n" % number)
            sock.sendall(b"%x\r\n%b\r\n" % (len(wire), wire) if chunked else wire)
            assert going.acquire(timeout=15)

    def read(found: Any) -> list[str]:
        seen = []
        for event in found:
            seen.append(event.data)
            going.release()
            if len(seen) == 3:
                return seen
        return seen

    with RawServer(serve) as server:
        with EventSource(server.url) as source:
            assert read(source) == ["0", "1", "2"]
        with requests.get(server.url, stream=True, timeout=10) as response:
            assert read(events(response)) == ["0", "1", "2"]
    for request in server.requests:
        assert encoding in request.headers["accept-encoding"].split(", ")


def test_a_large_event_of_few_bytes():
    """Compression makes it small; it is read whole, and so is what follows."""
    text = "x" * 3_000_000
    wire = gzip.compress(f"data: {text}\n\ndata: b\n\n".encode())
    with (
        RawServer([HEAD[:-2] + b"Content-Encoding: gzip\r\n\r\n" + wire]) as server,
        EventSource(server.url, reconnect=False) as source,
    ):
        assert [event.data for event in source] == [text, "b"]


def test_what_cannot_be_decoded_is_tried_again():
    """It may be a broken connection."""
    errors: list[str] = []
    broken = HEAD[:-2] + b"Content-Encoding: gzip\r\n\r\ndata: a\n\n"
    with (
        RawServer([broken, HEAD + b"data: b\n\n"]) as server,
        EventSource(
            server.url,
            backoff=(0.001, 0.001),
            on_error=lambda error: errors.append(str(error)),
        ) as source,
    ):
        assert next(source).data == "b"
    assert errors == ["the response broke off: DecodeError"]
