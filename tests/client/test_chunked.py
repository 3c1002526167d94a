"""`ChunkedBody`: a body's chunks, cut wherever the network cuts them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncstream.client.chunked import ChunkedBody
from tests.protocol.cuts import cut_at


def encode(chunks: list[bytes], extension: bytes = b"", end: bytes = b"\r\n") -> bytes:
    lines = (b"%X%b%b%b%b" % (len(c), extension, end, c, b"\r\n") for c in chunks if c)
    return b"".join(lines) + b"0" + extension + end


@given(
    st.lists(st.binary(max_size=40), max_size=8),
    st.sampled_from([b"", b";a=b", b" ; c"]),
    st.sampled_from([b"\r\n", b"A: b\r\nC: d\r\n\r\n", b"\n"]),
    st.lists(st.integers(0, 10_000), max_size=12),
)
def test_content_comes_back(chunks, extension, trailer, places):
    """However the body is cut, extended and ended; bytes after its end are ignored."""
    wire = encode(chunks, extension) + trailer
    body = ChunkedBody()
    pieces = []
    for piece in cut_at(wire, places):
        assert not (body.is_complete and piece)
        pieces.append(body.feed(piece))
    assert b"".join(pieces) == b"".join(chunks)
    assert body.is_complete
    assert body.feed(b"more") == b""


def test_content_is_not_held_back():
    """What has come of a chunk is given back, also before its end."""
    body = ChunkedBody()
    assert body.feed(b"5\r\nab") == b"ab"
    assert body.feed(b"c") == b"c"
    assert body.feed(b"de") == b"de"
    assert body.feed(b"\r") == b""
    assert body.feed(b"\n1\r\nf") == b"f"
    assert not body.is_complete


@pytest.mark.parametrize(
    ("wire", "words"),
    [
        (b"x\r\n", "begins with no size"),
        (b"\r\n", "begins with no size"),
        (b"-1\r\n", "begins with no size"),
        (b"1\r\nab\r\n", "longer than its size"),
        (b"1" * 70_000, "too long"),
    ],
    ids=["word", "nothing", "negative", "longer", "endless"],
)
def test_what_is_no_chunk(wire, words):
    """It is refused, whole or byte by byte."""
    for pieces in ([wire], [wire[i : i + 1] for i in range(min(len(wire), 20))]):
        body = ChunkedBody()
        if len(wire) > 20 and len(pieces) > 1:
            continue
        with pytest.raises(ValueError, match=words):
            [body.feed(piece) for piece in pieces]
