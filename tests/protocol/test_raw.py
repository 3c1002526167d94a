"""Raw streams: text and bytes as they are."""

from __future__ import annotations

import collections
import enum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncstream.protocol.raw import encode, encode_bytes
from syncstream.protocol.sse import Event


class Word(str, enum.Enum):
    A = "a"


class Text(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "printed otherwise"


class Bytes(bytes):
    pass


def yields(name: str, item: Any, chunk: bytes | None) -> Any:
    return pytest.param(item, chunk, id=name)


BYTES = [
    yields("None", None, None),
    yields("b''", b"", None),
    yields("bytearray empty", bytearray(), None),
    yields("memoryview empty", memoryview(b""), None),
    yields("bytes", b"abc", b"abc"),
    yields("bytes of any value", bytes(range(256)), bytes(range(256))),
    yields("bytes with line ends", b"a\r\nb\n", b"a\r\nb\n"),
    yields("bytes subclass", Bytes(b"a"), b"a"),
    yields("bytes subclass empty", Bytes(), None),
    yields("bytearray", bytearray(b"a"), b"a"),
    yields("memoryview", memoryview(b"abc")[1:], b"bc"),
    yields("memoryview with a stride", memoryview(b"a_b_")[::2], b"ab"),
]
TEXT = [
    yields("str", "abc", b"abc"),
    yields("str empty", "", None),
    yields("str not ASCII", "é€😀", "é€😀".encode()),
    yields("str with line ends", "a\r\nb\u2028\n", "a\r\nb\u2028\n".encode()),
    yields("str with NUL and BOM", "\ufeff\0", b"\xef\xbb\xbf\0"),
    yields("str subclass", Text("a"), b"a"),
    yields("str enum", Word.A, b"a"),
]
OTHER = [
    pytest.param(item, id=type(item).__name__)
    for item in (
        0,
        1.5,
        True,
        [b"a"],
        (b"a",),
        {"data": "a"},
        {b"a"},
        object(),
        Event("a"),
        collections.UserString("a"),
        Exception("a"),
        (x for x in "a"),
    )
]


@pytest.mark.parametrize(("item", "chunk"), BYTES + TEXT)
def test_yield(item: Any, chunk: bytes | None) -> None:
    """Each kind of item is written by the rule of its row; a checkpoint is None."""
    written = encode(item)
    assert written == chunk
    assert written is None or type(written) is bytes or written is item


@pytest.mark.parametrize(("item", "chunk"), BYTES)
def test_bytes_pass(item: Any, chunk: bytes | None) -> None:
    """A WSGI application's chunk passes as it is; an empty one is a checkpoint."""
    assert encode_bytes(item) == chunk


@pytest.mark.parametrize("item", OTHER)
def test_other_types(item: Any) -> None:
    """Anything else is a TypeError that shows its repr and says what is expected."""
    with pytest.raises(
        TypeError, match="chunk must be str, bytes or None, got"
    ) as caught:
        encode(item)
    assert repr(item) in str(caught.value)


@pytest.mark.parametrize("item", [*OTHER, "text", ""])
def test_wsgi_chunks_are_bytes(item: Any) -> None:
    """A WSGI application must yield bytes (PEP 3333); text is refused too."""
    with pytest.raises(TypeError, match="a chunk must be bytes, got") as caught:
        encode_bytes(item)
    assert repr(item) in str(caught.value)


@pytest.mark.parametrize("text", ["\ud800", "a\udfff", "\ud83d\ude00"], ids=ascii)
def test_text_that_utf8_cannot_carry(text: str) -> None:
    """A lone surrogate is a ValueError."""
    with pytest.raises(ValueError, match="surrogates not allowed"):
        encode(text)


def test_bytes_are_not_copied() -> None:
    """Bytes are passed on as the same object."""
    chunk = b"a" * 1000
    assert encode(chunk) is chunk
    assert encode_bytes(chunk) is chunk


def test_mutable_chunks_are_copied() -> None:
    """A ``bytearray`` may be reused once it has been yielded."""
    chunk = bytearray(b"abc")
    written = encode(chunk)
    chunk[:] = b"xyz"
    assert written == b"abc"


@given(st.lists(st.text()))
def test_text_round_trips(texts: list[str]) -> None:
    """The chunks, joined, are the texts, joined."""
    chunks = [encode(text) for text in texts]
    assert b"" not in chunks
    assert b"".join(chunk for chunk in chunks if chunk).decode() == "".join(texts)
