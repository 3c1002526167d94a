"""Newline-delimited JSON, both ways.

Spec: https://github.com/ndjson/ndjson-spec. What is written goes back through the
decoder; every decoder case runs whole, byte by byte and at random cuts.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import json
import re
import types
import uuid
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from syncstream.errors import RemoteProtocolError
from syncstream.protocol.ndjson import Decoder, encoder
from syncstream.protocol.sse import Event
from tests.protocol.cuts import cut_at, cuts

MANY = settings(max_examples=400)


class Colour(enum.Enum):
    RED = "red"


class Word(str, enum.Enum):
    A = "a"


@dataclasses.dataclass
class Message:
    data: Any
    id: int = 7


# What a generator may yield


def yields(name: str, item: Any, line: bytes | str | None) -> Any:
    return pytest.param(item, line.encode() if isinstance(line, str) else line, id=name)


# fmt: off
YIELDS = [
    # Checkpoints
    yields("None", None, None),
    yields("b''", b"", None),
    yields("bytearray empty", bytearray(), None),
    yields("memoryview empty", memoryview(b""), None),
    yields("Event without data", Event(comment="keepalive"), None),
    yields("Event of an id", Event(id=5), None),

    # Bytes pass through
    yields("bytes", b'{"a":1}\n', b'{"a":1}\n'),
    yields("bytes without a line end", b'{"a":', b'{"a":'),
    yields("bytes no UTF-8", b"\xff", b"\xff"),
    yields("bytearray", bytearray(b"1\n"), b"1\n"),
    yields("memoryview", memoryview(b"x1\n")[1:], b"1\n"),
    yields("memoryview with a stride", memoryview(b"1_2_")[::2], b"12"),

    # An Event is its data
    yields("Event of text", Event("a", id=1, event="e", retry=5), b'"a"\n'),
    yields("Event of empty text", Event(""), b'""\n'),
    yields("Event of bytes", Event(b"a"), b'"a"\n'),
    yields("Event of lines", Event("a\nb"), rb'"a\nb"' + b"\n"),
    yields("Event of JSON", Event({"a": 1}), b'{"a":1}\n'),
    yields("Event of 0", Event(0), b"0\n"),
    yields("Event of False", Event(False), b"false\n"),

    # All else is one line of JSON
    yields("str", "a", b'"a"\n'),
    yields("str empty", "", b'""\n'),
    yields("str of lines", "a\r\nb", rb'"a\r\nb"' + b"\n"),
    yields("str with U+2028", "a\u2028\x85b", '"a\u2028\x85b"\n'),
    yields("str enum", Word.A, b'"a"\n'),
    yields("int", 5, b"5\n"),
    yields("zero", 0, b"0\n"),
    yields("big int", 2**70, b"1180591620717411303424\n"),
    yields("float", 1.5, b"1.5\n"),
    yields("NaN", float("nan"), b"null\n"),
    yields("infinity within", [float("inf")], b"[null]\n"),
    yields("True", True, b"true\n"),
    yields("False", False, b"false\n"),
    yields("list", [1, "a", None], b'[1,"a",null]\n'),
    yields("list empty", [], b"[]\n"),
    yields("tuple", (1, 2), b"[1,2]\n"),
    yields("mapping", {"a": {"b": []}}, b'{"a":{"b":[]}}\n'),
    yields("mapping empty", {}, b"{}\n"),
    yields("mapping of event fields is no event", {"data": 1, "event": "e"},
           b'{"data":1,"event":"e"}\n'),
    yields("mapping with data None", {"data": None}, b'{"data":null}\n'),
    yields("mapping with int keys", {1: 2}, b'{"1":2}\n'),
    yields("MappingProxyType", types.MappingProxyType({"data": 1}), b'{"data":1}\n'),
    yields("UserDict", collections.UserDict(data=1), b'{"data":1}\n'),
    yields("dataclass with .data is no event", Message("a"), b'{"data":"a","id":7}\n'),
    yields("datetime", datetime.datetime(2026, 1, 2), b'"2026-01-02T00:00:00"\n'),
    yields("UUID", uuid.UUID(int=1), b'"00000000-0000-0000-0000-000000000001"\n'),
    yields("Decimal", decimal.Decimal("1.50"), b'"1.50"\n'),
    yields("Enum", Colour.RED, b'"red"\n'),
    yields("an Event within", [Event("a")],
           b'[{"data":"a","event":null,"id":null,"retry":null,"comment":null}]\n'),
]
# fmt: on


@pytest.mark.parametrize(("item", "line"), YIELDS)
def test_yield(item: Any, line: bytes | None) -> None:
    """Each kind of item is written by the rule of its row; a checkpoint is None."""
    chunk = encoder()(item)
    assert chunk == line
    assert chunk is None or type(chunk) is bytes


@pytest.mark.parametrize(("item", "line"), YIELDS)
def test_yield_is_one_line(item: Any, line: bytes | None) -> None:
    """What is not bytes or a checkpoint is one line, and decodes to one value."""
    if line is None or isinstance(item, (bytes, bytearray, memoryview)):
        return
    assert line.count(b"\n") == 1
    assert b"\r" not in line
    assert Decoder().feed(line) == [json.loads(line)]


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        pytest.param(object(), TypeError, "builtins.object as JSON", id="object"),
        pytest.param({1}, TypeError, "builtins.set as JSON", id="set"),
        pytest.param([b"a"], TypeError, "builtins.bytes as JSON", id="bytes within"),
        pytest.param(Event({1}), TypeError, "builtins.set as JSON", id="in an Event"),
        pytest.param(
            types.SimpleNamespace(data="a"),
            TypeError,
            "types.SimpleNamespace as JSON",
            id="object with .data",
        ),
        pytest.param({(1,): 2}, TypeError, "keys must be", id="key"),
        pytest.param(
            Event(event="e"), ValueError, "data must be given with event", id="no data"
        ),
        pytest.param("\ud800", ValueError, "surrogates not allowed", id="surrogate"),
        pytest.param(["\ud800"], ValueError, "surrogates not", id="surrogate within"),
    ],
)
def test_cannot_be_encoded(item: Any, error: type[Exception], message: str) -> None:
    """What cannot be encoded raises TypeError or ValueError, with a reason."""
    with pytest.raises(error, match=re.escape(message)):
        encoder()(item)


@pytest.mark.parametrize(
    ("result", "line"),
    [
        pytest.param("1", b"1\n", id="str"),
        pytest.param("é", "é\n".encode(), id="str not ASCII"),
        pytest.param("\u2028", "\u2028\n".encode(), id="U+2028"),
        pytest.param(b"1", b"1\n", id="bytes"),
        pytest.param(bytearray(b"1"), b"1\n", id="bytearray"),
    ],
)
@pytest.mark.parametrize("item", ["a", {"a": 1}, [1], Event("a"), Event([1])], ids=repr)
def test_dumps(item: Any, result: Any, line: bytes) -> None:
    """``dumps`` writes every value, text too: it returns str or bytes."""
    assert encoder(lambda value: result)(item) == line


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        pytest.param(
            None, TypeError, "dumps must return str or bytes, got None", id="0"
        ),
        pytest.param(5, TypeError, "dumps must return str or bytes, got 5", id="int"),
        pytest.param(
            "[\n1]", ValueError, "dumps must write each value on one line", id="LF"
        ),
        pytest.param(
            "[\r1]", ValueError, "dumps must write each value on one line", id="CR"
        ),
        pytest.param(
            "1\n", ValueError, "dumps must write each value on one line", id="end"
        ),
        pytest.param(
            b"[\n1]", ValueError, "dumps must write each value on", id="bytes"
        ),
    ],
)
def test_wrong_dumps(result: Any, error: type[Exception], message: str) -> None:
    """A ``dumps`` that would break the lines is refused, and told how."""
    with pytest.raises(error, match=message):
        encoder(lambda value: result)({"a": 1})


def test_dumps_is_not_for_bytes_and_checkpoints() -> None:
    """Bytes and checkpoints do not go through ``dumps``."""
    encode = encoder(lambda value: pytest.fail("called"))
    assert encode(b"a") == b"a"
    assert encode(b"") is None
    assert encode(None) is None
    assert encode(Event(id=1)) is None


# The decoder


class Outcome(NamedTuple):
    values: list[Any]
    error: str | None


def decode(chunks: list[bytes], **options: Any) -> Outcome:
    """Run a decoder over chunks up to its first error or the end."""
    decoder = Decoder(**options)
    values: list[Any] = []
    try:
        for chunk in chunks:
            values += decoder.feed(chunk)
        values += decoder.close()
    except RemoteProtocolError as error:
        return Outcome(values, str(error))
    return Outcome(values, None)


def case(
    name: str, wire: bytes | str, *values: Any, error: str = "", max_line: Any = 1000
) -> Any:
    wire = wire.encode() if isinstance(wire, str) else wire
    return pytest.param(wire, list(values), error, max_line, id=name)


NO = "a line is not JSON"
LONG = "a line is longer than 8 bytes"
CUT = "the stream ended within a number"

# fmt: off
CASES = [
    case("empty stream", ""),
    case("one value", '{"a":1}\n', {"a": 1}),
    case("two values", "1\n2\n", 1, 2),
    case("every kind", 'null\ntrue\nfalse\n0\n-1.5\n"a"\n[]\n{}\n',
         None, True, False, 0, -1.5, "a", [], {}),
    case("CR LF", "1\r\n[2]\r\n", 1, [2]),
    case("LF and CR LF", "1\n2\r\n3\n", 1, 2, 3),
    case("empty lines", "\n\n1\n\n\r\n2\n\n", 1, 2),
    case("lines of white space", " \n\t\n1\n  \r\n", 1),
    case("white space around a value", " \t1 \n", 1),
    case("a CR within is white space", "[1,\r2]\n", [1, 2]),
    case("a CR ends no line", "1\r2\n", error=NO),
    case("U+2028 in a string", '"a\u2028b"\n', "a\u2028b"),
    case("U+0085 in a string", '"a\x85b"\n', "a\x85b"),
    case("UTF-8", '"é€😀"\n', "é€😀"),
    case("escapes", r'"\u00e9\n\ud83d\ude00"' + "\n", "é\n😀"),
    case("big int", "1180591620717411303424\n", 2**70),
    case("int of 4000 digits", "1" * 4000 + "\n", int("1" * 4000), max_line=None),
    case("key order", '{"b":1,"a":2}\n', {"b": 1, "a": 2}),
    case("deep", "[" * 200 + "]" * 200 + "\n", json.loads("[" * 200 + "]" * 200)),

    # The last line may have no end
    case("no line end: object", '1\n{"a":1}', 1, {"a": 1}),
    case("no line end: string", '"a"', "a"),
    case("no line end: string of digits", '"1"', "1"),
    case("no line end: list", "[1]", [1]),
    case("no line end: true", "true", True),
    case("no line end: null", "null", None),
    case("no line end but CR", "[1]\r", [1]),
    case("no line end but spaces", "[1]  ", [1]),
    case("only white space", "1\n  ", 1),
    case("a number may be cut short", "1\n12", 1, error=CUT),
    case("a float may be cut short", "1.5", error=CUT),
    case("an exponent may be cut short", "1e5", error=CUT),
    case("cut within an object", '1\n{"a":', 1, error=NO),
    case("cut within a string", '1\n"a', 1, error=NO),
    case("cut within a word", "1\ntru", 1, error=NO),
    case("cut within a number", "1\n-", 1, error=NO),
    case("cut within a character", b'1\n"\xc3', 1, error=NO),

    # No JSON
    case("a word", "hello\n", error=NO),
    case("values before it", "1\n2\nhello\n3\n", 1, 2, error=NO),
    case("half an object", '{"a":1\n', error=NO),
    case("an object over two lines", '{"a":\n1}\n', error=NO),
    case("two values on a line", "1 2\n", error=NO),
    case("a comma at the end", "1,\n", error=NO),
    case("single quotes", "{'a':1}\n", error=NO),
    case("a comment", "// c\n", error=NO),
    case("NUL", "\0\n", error=NO),
    case("a control character in a string", '"\t"\n', error=NO),
    case("BOM", "\ufeff1\n", error=NO),
    case("an event stream", "data: 1\n\n", error=NO),
    case("no UTF-8", b'"\xff"\n', error=NO),
    case("half a character", b'"\xc3"\n', error=NO),
    case("UTF-16", '"a"\n'.encode("utf-16"), error=NO),
    case("UTF-8 surrogate", b'"\xed\xa0\x80"\n', error=NO),
    case("deeper than Python reads", "[" * 200_000 + "\n", error=NO, max_line=None),
    case("int of more digits than Python reads", "1\n" + "1" * 5000 + "\n2\n", 1,
         error=NO, max_line=None),
    case("such an int within", '{"a":[' + "1" * 5000 + "]}\n", error=NO, max_line=None),
    case("such an int without line end", "[" + "1" * 5000 + "]", error=NO,
         max_line=None),

    # Limits
    case("at the limit", '"123456"\n', "123456", max_line=8),
    case("over the limit", '"1234567"\n', error=LONG, max_line=8),
    case("no line end, at the limit", '"123456"', "123456", max_line=8),
    case("no line end, over the limit", '"1234567"', error=LONG, max_line=8),
    case("values before the long line", '1\n2\n"1234567"\n3\n', 1, 2, error=LONG,
         max_line=8),
    case("many lines", "1234567\n" * 50, *[1234567] * 50, max_line=8),
    case("bytes count, not characters", '"ééé"\n', "ééé", max_line=8),
    case("bytes over, characters not", '"éééé"\n', error=LONG, max_line=8),
    case("white space counts", "1\n" + " " * 9 + "\n2\n", 1, error=LONG, max_line=8),
    case("a space at the end counts", '"123456" \n', error=LONG, max_line=8),
    case("no JSON, then a long line", 'x\n"1234567"\n', error=NO, max_line=8),
    case("a long line, then no JSON", '"1234567"\nx\n', error=LONG, max_line=8),
    case("a long line is not looked at", "x" * 9 + "\n", error=LONG, max_line=8),
    case("no limit", '"' + "x" * 99_999 + '"\n', "x" * 99_999, max_line=None),
]
# fmt: on

HOW = pytest.mark.parametrize("how", ["whole", "bytes", "random"])


@HOW
@pytest.mark.parametrize(("wire", "values", "error", "max_line"), CASES)
def test_decodes(
    wire: bytes, values: list[Any], error: str, max_line: int | None, how: str
) -> None:
    """A stream gives the same values, then the same error, however it is cut."""
    if how == "bytes" and len(wire) > 10_000:
        how = "random"  # a byte a call would take a second, and show no more
    for chunks in cuts(wire, how):
        outcome = decode(chunks, max_line=max_line)
        assert outcome.values == values
        assert [type(value) for value in outcome.values] == [type(v) for v in values]
        assert (outcome.error or "").startswith(error)
        assert (outcome.error is None) == (not error)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_bytes_are_taken(kind: Any) -> None:
    """``bytearray`` and ``memoryview`` work too, and may be reused afterwards."""
    decoder = Decoder()
    chunk = bytearray(b"[1")
    assert decoder.feed(kind(chunk)) == []
    chunk[:] = b"XX"
    assert decoder.feed(kind(b"]\n")) == [[1]]


def test_values_come_as_soon_as_they_are_complete() -> None:
    """Each call returns the values that its bytes complete, oldest first."""
    decoder = Decoder()
    assert decoder.feed(b"1") == []
    assert decoder.feed(b"\n2\n[") == [1, 2]
    assert decoder.feed(b"") == []
    assert decoder.feed(b"3]\r") == []
    assert decoder.feed(b"\n") == [[3]]
    assert decoder.close() == []


def test_values_before_an_error_are_returned_first() -> None:
    """The call with values returns them; the error comes at the next, and for ever."""
    decoder = Decoder()
    assert decoder.feed(b"1\n2\nx\n3\n") == [1, 2]
    for chunk in (b"", b"4\n"):
        with pytest.raises(RemoteProtocolError, match="a line is not JSON"):
            decoder.feed(chunk)


def test_error_without_values_is_raised_at_once() -> None:
    """The call that finds an error and has no value raises it."""
    with pytest.raises(RemoteProtocolError, match="a line is not JSON"):
        Decoder().feed(b"x\n1\n")


def test_error_names_its_cause() -> None:
    """The error is chained to what the JSON reader said."""
    with pytest.raises(RemoteProtocolError, match="Expecting value") as caught:
        Decoder().feed(b"x\n")
    assert isinstance(caught.value.__cause__, ValueError)


def test_close_raises_the_error_that_feed_had_to_report() -> None:
    """An error behind the last values is not lost when the stream ends there."""
    decoder = Decoder()
    assert decoder.feed(b"1\nx\n") == [1]
    with pytest.raises(RemoteProtocolError, match="a line is not JSON"):
        decoder.close()


def test_close_returns_the_last_value_once() -> None:
    """`close` may be called again, and then has nothing more."""
    decoder = Decoder()
    decoder.feed(b"1\n[2]")
    assert decoder.close() == [[2]]
    assert decoder.close() == []


@pytest.mark.parametrize("chunk", [b"", b"\n", b"1\n"])
def test_feed_after_close(chunk: bytes) -> None:
    """A closed decoder takes no bytes: ValueError."""
    decoder = Decoder()
    decoder.close()
    with pytest.raises(
        ValueError, match=r"feed\(\) must not be called after close\(\)"
    ):
        decoder.feed(chunk)


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_is_positive(limit: int) -> None:
    """A limit of zero or less is a ValueError that names it and shows its repr."""
    with pytest.raises(ValueError, match=f"max_line must be positive .*, got {limit}"):
        Decoder(max_line=limit)


def test_default_limit() -> None:
    """Without a word, a line may be 4 MiB."""
    text = b"x" * (4 * 1024 * 1024 - 2)
    assert len(decode([b'"' + text, b'"\n']).values) == 1
    assert decode([b'"' + text, b'x"\n']).error is not None


PIECES = [
    *(
        b"1",
        b"23",
        b"-",
        b"1.5",
        b"null",
        b"true",
        b'"a"',
        b'"',
        b"[",
        b"]",
        b"{",
        b"}",
    ),
    *(
        b",",
        b":",
        b" ",
        b"\t",
        b"\n",
        b"\r\n",
        b"\r",
        b"\v",
        b"\f",
        b"\0",
        b"x",
        b"\xff",
    ),
    *(
        b'{"a":1}\n',
        b"[1,2]\n",
        b"\n\n",
        b'"\xc3\xa9"\n',
        b"\xe2\x82",
        b"NaN",
        b" " * 9,
    ),
]
WIRES = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=25).map(b"".join), st.binary(max_size=40)
)
PLACES = st.lists(st.integers(0, 10_000), max_size=12)


@MANY
@given(WIRES, PLACES, st.none() | st.integers(1, 20))
@example(b" " * 9 + b"\n", [], 8)
def test_cuts_change_nothing(
    wire: bytes, places: list[int], max_line: int | None
) -> None:
    """Any bytes, cut anywhere, give the same values and error, and nothing else."""

    def outcome(chunks: list[bytes]) -> tuple[str, str | None]:
        values, error = decode(chunks, max_line=max_line)
        return repr(values), error

    whole = outcome([wire])
    assert outcome([wire[i : i + 1] for i in range(len(wire))]) == whole
    assert outcome(cut_at(wire, places)) == whole


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.lists(JSON, max_size=6), PLACES)
def test_round_trips(values: list[Any], places: list[int]) -> None:
    """Any JSON values but null come back as they were, one a line.

    A yielded None is a checkpoint; a null must be written by the user.
    """
    encode = encoder()
    lines = [encode(value) or b"null\n" for value in values]
    assert all(line.count(b"\n") == 1 for line in lines)
    assert decode(cut_at(b"".join(lines), places)) == Outcome(values, None)


@pytest.mark.parametrize("line", [b"NaN\n", b"[Infinity]\n", b'{"a":-Infinity}\n'])
def test_the_decoder_takes_json_only(line: bytes) -> None:
    """What Python reads beyond JSON is refused."""
    with pytest.raises(RemoteProtocolError, match="is no JSON"):
        Decoder().feed(line)
