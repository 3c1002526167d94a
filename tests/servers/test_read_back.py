"""What a server has written, a head and an opening, is read back, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncstream.servers.framing import read_back

TOKENS = st.text("abcdefghijklmnopqrstuvwxyz-", min_size=1, max_size=12)
VALUES = st.text(st.characters(min_codepoint=33, max_codepoint=255), max_size=30)
FOREIGN = {
    *("content-length", "content-encoding", "upgrade", "trailer"),
    *("transfer-encoding", "connection", "keep-alive", "proxy-connection"),
}
HEADERS = st.lists(
    st.tuples(TOKENS.filter(lambda name: name not in FOREIGN), VALUES), max_size=6
)
OPENINGS = st.binary(min_size=1, max_size=300)


def head_of(headers, *more):
    lines = [f"{name}: {value}".encode("latin-1") for name, value in headers]
    return b"\r\n".join([b"HTTP/1.1 200 OK", *lines, *more, b"", b""])


@given(HEADERS, OPENINGS, st.booleans(), st.booleans())
def test_a_head_and_an_opening_are_read_back(headers, opening, framed, old):
    """Raw or in a chunk: the headers stay as they are, but for those of the hop."""
    codings = [b"transfer-encoding: Chunked"] if framed else []
    head = head_of(headers, b"connection: keep-alive", b"Keep-Alive: 5", *codings)
    data = b"%X\r\n%s\r\n" % (len(opening), opening) if framed else opening
    kept, is_chunked = read_back(head + data, opening, is_http_1_0=old)
    assert is_chunked == (framed and not old)
    codings = [b"Transfer-Encoding: chunked"] if is_chunked else []
    expected = head_of(headers, *codings, b"Connection: close")
    assert kept == expected + (data if is_chunked else opening)


@given(HEADERS, OPENINGS, st.booleans(), st.data())
def test_nothing_else_is_read_back(headers, opening, framed, data):
    """A byte less, a byte more, another one: it is put back."""
    codings = [b"Transfer-Encoding: chunked"] if framed else []
    whole = head_of(headers, *codings)
    whole += b"%x\r\n%s\r\n" % (len(opening), opening) if framed else opening
    cut = data.draw(st.integers(0, len(whole) - 1))
    assert read_back(whole[:cut], opening, is_http_1_0=False) is None
    more = data.draw(st.binary(min_size=1, max_size=9))
    assert read_back(whole + more, opening, is_http_1_0=False) is None
    assert read_back(more + whole, opening, is_http_1_0=False) is None
    assert read_back(whole, opening + more, is_http_1_0=False) is None
    assert read_back(2 * whole, opening, is_http_1_0=False) is None


CHUNKED = b"Transfer-Encoding: chunked\r\n"
ODD = {
    "nothing": b"",
    "no head": b"data",
    "http/0.9": b"X",
    "http/2": b"HTTP/2 200 OK\r\n\r\nX",
    "early hints": b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\n\r\nX",
    "no content": b"HTTP/1.1 204 No Content\r\n\r\nX",
    "a length": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nX",
    "an encoding": b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\n\r\nX",
    "an upgrade": b"HTTP/1.1 200 OK\r\nUpgrade: h2c\r\n\r\nX",
    "a folded line": b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\nX",
    "a bare LF": b"HTTP/1.1 200 OK\r\nA: b\nContent-Length: 1\r\n\r\nX",
    "a bare CR": b"HTTP/1.1 200 OK\r\nA: b\rContent-Length: 1\r\n\r\nX",
    "a space before the colon": b"HTTP/1.1 200 OK\r\nContent-Length : 1\r\n\r\nX",
    "no colon": b"HTTP/1.1 200 OK\r\nContent-Length\r\n\r\nX",
    "two codings": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n"
    b"1\r\nX\r\n",
    "the same coding twice": b"HTTP/1.1 200 OK\r\n" + 2 * CHUNKED + b"\r\n1\r\nX\r\n",
    "raw, though chunked": b"HTTP/1.1 200 OK\r\n" + CHUNKED + b"\r\nX",
    "chunked, though raw": b"HTTP/1.1 200 OK\r\n\r\n1\r\nX\r\n",
    "an extension": b"HTTP/1.1 200 OK\r\n" + CHUNKED + b"\r\n1;a=b\r\nX\r\n",
    "a wrong size": b"HTTP/1.1 200 OK\r\n" + CHUNKED + b"\r\n2\r\nX\r\n",
    "the end": b"HTTP/1.1 200 OK\r\n" + CHUNKED + b"\r\n1\r\nX\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("written", ODD.values(), ids=ODD)
def test_odd_heads_are_put_back(written):
    """Each of them is somebody's, and nobody's whom we know."""
    assert read_back(written, b"X", is_http_1_0=False) is None
    assert read_back(written, b"X", is_http_1_0=True) is None
