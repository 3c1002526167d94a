"""The event stream decoder, against the standard's own words.

The table is written from https://html.spec.whatwg.org/multipage/server-sent-events.html
§9.2.5 (parsing) and §9.2.6 (interpreting), not from the code. Every case runs whole,
byte by byte and at random cuts; hypothesis adds a second decoder, written straight
from the standard's algorithm.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from syncstream.errors import ProtocolError, RemoteProtocolError, SyncStreamError
from syncstream.protocol.sse import END_ID, Decoder, Event
from tests.protocol.cuts import cut_at, cuts

BOM = b"\xef\xbb\xbf"
DIGITS = 999_999_999_999_999  # what a number of more than 15 digits is cut off to


class Seen(NamedTuple):
    """An event as a receiver sees it."""

    data: str
    event: str | None = None
    id: str | None = None


class Outcome(NamedTuple):
    """All that a decoder tells about a stream."""

    events: list[Seen]
    retry: int | None
    last_event_id: str | None
    error: str | None


def decode(chunks: list[bytes], **options: Any) -> Outcome:
    """Run a decoder over chunks up to its first error or the end."""
    decoder = Decoder(**options)
    events: list[Event] = []
    error = None
    try:
        for chunk in chunks:
            events += decoder.feed(chunk)
        decoder.close()
    except RemoteProtocolError as caught:
        error = str(caught)
    seen = [Seen(e.data, e.event, e.id) for e in events]
    return Outcome(seen, decoder.retry, decoder.last_event_id, error)


UNSET = "unset"


def case(
    name: str,
    wire: bytes | str,
    *events: Seen | str,
    retry: int | None = None,
    last: str | None = UNSET,
) -> Any:
    """Return one row: a str is an unnamed event; last is the last event's id."""
    seen = [e if isinstance(e, Seen) else Seen(e) for e in events]
    if last is UNSET:
        last = seen[-1].id if seen else None
    if isinstance(wire, str):
        wire = wire.encode()
    return pytest.param(wire, Outcome(seen, retry, last, None), id=name)


# fmt: off
CASES = [
    # The stream itself
    case("empty stream", b""),
    case("one event", "data: hello\n\n", "hello"),
    case("two events", "data: a\n\ndata: b\n\n", "a", "b"),
    case("only a blank line", "\n"),
    case("only blank lines", "\n\r\n\r\r\n\n"),
    case("blank lines before an event", "\n\n\ndata: a\n\n", "a"),
    case("blank lines between events", "data: a\n\n\n\n\ndata: b\n\n", "a", "b"),
    case("the standard's stock example", "data: YHOO\ndata: +2\ndata: 10\n\n",
         "YHOO\n+2\n10"),
    case("the standard's second example",
         ": test stream\n\ndata: first event\nid: 1\n\n"
         "data:second event\nid\n\ndata:  third event\n\n",
         Seen("first event", None, "1"), Seen("second event", None, ""),
         Seen(" third event", None, "")),
    case("the standard's third example", "data\n\ndata\ndata\n\ndata:\n", "", "\n"),
    case("the standard's fourth example", "data:test\n\ndata: test\n\n",
         "test", "test"),
    case("the standard's named example",
         "event: add\ndata: 73857293\n\nevent: remove\ndata: 2153\n\n",
         Seen("73857293", "add"), Seen("2153", "remove")),

    # A byte order mark: at the start only, and one only
    case("BOM at the start", BOM + b"data: a\n\n", "a"),
    case("BOM twice", BOM + BOM + b"data: a\n\n"),
    case("BOM twice, then an event", BOM + BOM + b"data: a\n\ndata: b\n\n", "b"),
    case("BOM twice hides one line only", BOM + BOM + b"data: a\ndata: b\n\n", "b"),
    case("BOM before a comment", BOM + b": c\ndata: a\n\n", "a"),
    case("BOM before a second line", b"\n" + BOM + b"data: a\n\ndata: b\n\n", "b"),
    case("BOM before a second event", b"data: a\n\n" + BOM + b"data: b\n\n", "a"),
    case("BOM after a comment", b":\n" + BOM + b"data: a\n\n"),
    case("BOM alone", BOM),
    case("BOM and a blank line", BOM + b"\n" + b"data: a\n\n", "a"),
    case("BOM and CR LF", BOM + b"\r\n" + b"data: a\r\n\r\n", "a"),
    case("BOM and a blank line, then BOM", BOM + b"\n" + BOM + b"data: a\n\n"),
    case("BOM in a value", b"data: " + BOM + b"a\n\n", "\ufeffa"),
    case("BOM right after the colon", b"data:" + BOM + b" a\n\n", "\ufeff a"),
    case("BOM in a field name", b"da" + BOM + b"ta: a\n\n"),
    case("BOM in an id", b"id: " + BOM + b"\ndata: a\n\n", Seen("a", None, "\ufeff")),
    case("BOM in an event name", b"event:" + BOM + b"\ndata: a\n\n",
         Seen("a", "\ufeff")),
    case("two thirds of a BOM", b"\xef\xbbdata: a\n\n"),
    case("a third of a BOM", b"\xefdata: a\n\n"),
    case("the rest of a BOM", b"\xbb\xbfdata: a\n\n"),
    case("BOM with a space after it", BOM + b" data: a\n\n"),
    case("UTF-16 BOM, little-endian", b"\xff\xfedata: a\n\n"),
    case("UTF-16 BOM, big-endian", b"\xfe\xffdata: a\n\n"),

    # Line ends
    case("LF", "data: a\ndata: b\n\n", "a\nb"),
    case("CR", "data: a\rdata: b\r\r", "a\nb"),
    case("CR LF", "data: a\r\ndata: b\r\n\r\n", "a\nb"),
    case("CR, then CR LF", "data: a\r\r\ndata: b\r\n\r\n", "a", "b"),
    case("LF, then CR LF", "data: a\n\r\n", "a"),
    case("LF, then CR", "data: a\n\r", "a"),
    case("CR LF, then CR", "data: a\r\n\r", "a"),
    case("CR LF, then LF", "data: a\r\n\n", "a"),
    case("LF CR is two line ends", "data: a\n\rdata: b\n\n", "a", "b"),
    case("LF CR LF is two line ends", "data: a\n\r\ndata: b\n\n", "a", "b"),
    case("CR LF is one line end", "data: a\r\ndata: b\n\n", "a\nb"),
    case("CR CR LF is two line ends", "data: a\r\r\n", "a"),
    case("every line end in one event", "data: a\rdata: b\r\ndata: c\ndata: d\r\r\n",
         "a\nb\nc\nd"),
    case("CR LF CR LF at the end", "event: e\r\ndata: a\r\n\r\n", Seen("a", "e")),
    case("CR CR at the end needs no LF", "data: a\r\r", "a"),
    case("a CR alone ends no event", "data: a\r"),
    case("CR LF alone ends no event", "data: a\r\n"),
    case("event after CR CR", "data: a\r\rdata: b\r\r", "a", "b"),
    case("event after CR LF CR LF", "data: a\r\n\r\ndata: b\r\n\r\n", "a", "b"),
    case("CR at the very start", "\rdata: a\r\r", "a"),
    case("CR LF at the very start", "\r\ndata: a\r\n\r\n", "a"),
    case("LF at the very start", "\ndata: a\n\n", "a"),
    case("CR LF in a comment's end", ": c\r\ndata: a\r\n\r\n", "a"),

    # What is no line end
    case("U+2028 is no line end", "data: a\u2028data: b\n\n", "a\u2028data: b"),
    case("U+2029 is no line end", "data: a\u2029data: b\n\n", "a\u2029data: b"),
    case("U+0085 is no line end", "data: a\u0085data: b\n\n", "a\u0085data: b"),
    case("VT is no line end", "data: a\vdata: b\n\n", "a\vdata: b"),
    case("FF is no line end", "data: a\fdata: b\n\n", "a\fdata: b"),
    case("FS, GS and RS are no line ends", "data: a\x1cb\x1dc\x1ed\n\n",
         "a\x1cb\x1dc\x1ed"),
    case("NUL is no line end", "data: a\0b\n\n", "a\0b"),
    case("two U+2028 end no event", "data: a\u2028\u2028data: b\n\n",
         "a\u2028\u2028data: b"),
    case("the byte 0x85 is no line end", b"data: a\x85b\n\n", "a\ufffdb"),
    case("U+2028 in a comment", ": a\u2028data: b\n\n"),
    case("U+2029 in an event name", "event: a\u2029b\ndata: c\n\n",
         Seen("c", "a\u2029b")),

    # One space, and only one, and only a space
    case("no space", "data:a\n\n", "a"),
    case("one space", "data: a\n\n", "a"),
    case("two spaces", "data:  a\n\n", " a"),
    case("three spaces", "data:   a\n\n", "  a"),
    case("only a space", "data: \n\n", ""),
    case("only two spaces", "data:  \n\n", " "),
    case("a tab stays", "data:\ta\n\n", "\ta"),
    case("space, then tab", "data: \ta\n\n", "\ta"),
    case("trailing space stays", "data: a \n\n", "a "),
    case("trailing tab stays", "data: a\t\n\n", "a\t"),
    case("U+00A0 stays", "data:\u00a0a\n\n", "\u00a0a"),
    case("U+3000 stays", "data:\u3000a\n\n", "\u3000a"),
    case("two spaces in an event name", "event:  e\ndata: a\n\n", Seen("a", " e")),
    case("trailing space in an event name", "event: e \ndata: a\n\n", Seen("a", "e ")),
    case("two spaces in an id", "id:  1\ndata: a\n\n", Seen("a", None, " 1")),
    case("trailing space in an id", "id: 1 \ndata: a\n\n", Seen("a", None, "1 ")),

    # Field names
    case("field without a colon", "data\n\n", ""),
    case("unknown field", "foo: x\ndata: a\n\n", "a"),
    case("unknown field without a colon", "foo\ndata: a\n\n", "a"),
    case("unknown field ends no event", "data: a\nfoo\n\n", "a"),
    case("only unknown fields", "foo: x\nbar\n\n"),
    case("DATA", "DATA: x\n\n"),
    case("Data", "Data: x\ndata: a\n\n", "a"),
    case("Event", "Event: e\ndata: a\n\n", "a"),
    case("ID", "ID: 1\ndata: a\n\n", "a"),
    case("Retry", "Retry: 10\ndata: a\n\n", "a"),
    case("space before a field", " data: a\n\n"),
    case("tab before a field", "\tdata: a\n\n"),
    case("space before the colon", "data : a\n\n"),
    case("a space alone is a field", "data: a\n \ndata: b\n\n", "a\nb"),
    case("a tab alone is a field", "data: a\n\t\ndata: b\n\n", "a\nb"),
    case("dat", "dat: a\n\n"),
    case("dataa", "dataa: a\n\n"),
    case("data with NUL", "data\0: a\n\n"),
    case("NUL before data", "\0data: a\n\n"),
    case("the first colon counts", "data: a: b:c\n\n", "a: b:c"),
    case("two colons", "data:: a\n\n", ": a"),
    case("colons only", "data:::\n\n", "::"),
    case("a field inside a value", "data: event: e\n\n", "event: e"),
    case("= is no colon", "data= a\n\n"),
    case("a fullwidth colon is no colon", "data\uff1a a\n\n"),
    case("lastEventId is unknown", "lastEventId: 1\ndata: a\n\n", "a"),

    # Comments
    case("comment", ": hello\ndata: a\n\n", "a"),
    case("empty comment", ":\ndata: a\n\n", "a"),
    case("comment of a colon", "::\ndata: a\n\n", "a"),
    case("comment with a field in it", ":data: x\ndata: a\n\n", "a"),
    case("comment between data lines", "data: a\n: c\ndata: b\n\n", "a\nb"),
    case("comment ends no event", "data: a\n:\n:\n\n", "a"),
    case("only comments", ":\n\n: keepalive\n\n"),
    case("comment of invalid bytes", b":\xff\xfe\ndata: a\n\n", "a"),
    case("comment with NUL", ":\0\ndata: a\n\n", "a"),
    case("comment after data", "data: a\n: c\n\n", "a"),

    # data
    case("data alone", "data\n\n", ""),
    case("data and a colon", "data:\n\n", ""),
    case("data alone twice", "data\ndata\n\n", "\n"),
    case("data: twice", "data:\ndata:\n\n", "\n"),
    case("data and data:", "data\ndata:\ndata: \n\n", "\n\n"),
    case("two lines", "data: a\ndata: b\n\n", "a\nb"),
    case("three lines", "data: a\ndata: b\ndata: c\n\n", "a\nb\nc"),
    case("an empty line first", "data:\ndata: a\n\n", "\na"),
    case("an empty line last", "data: a\ndata:\n\n", "a\n"),
    case("an empty line between", "data: a\ndata\ndata: b\n\n", "a\n\nb"),
    case("two empty lines last", "data: a\ndata\ndata\n\n", "a\n\n"),
    case("data around other fields", "data: a\nevent: e\ndata: b\nid: 1\n\n",
         Seen("a\nb", "e", "1")),
    case("data is not kept over events", "data: a\n\ndata\n\n", "a", ""),
    case("JSON", 'data: {"a": [1, 2]}\n\n', '{"a": [1, 2]}'),
    case("long data", "data: " + "x" * 10_000 + "\n\n", "x" * 10_000),
    case("many data lines", "data: x\n" * 1000 + "\n", "\n".join(["x"] * 1000)),

    # No dispatch
    case("no data: event only", "event: e\n\n"),
    case("no data: retry only", "retry: 5\n\n", retry=5),
    case("no data: id only", "id: 1\n\n", last="1"),
    case("incomplete last event", "data: a\n\ndata: b\n", "a"),
    case("incomplete last line", "data: a\n\ndata: b", "a"),
    case("only an incomplete event", "data: a\n"),
    case("the blank line is missing after CR LF", "data: a\r\n\r\ndata: b\r\n", "a"),
    case("incomplete id is not in force", "id: 1\ndata: a\n\nid: 2\n",
         Seen("a", None, "1")),
    case("incomplete first id is not in force", "id: 1\ndata: a\n"),
    case("retry counts even in an incomplete event", "retry: 7\n", retry=7),
    case("retry counts not in an incomplete line", "retry: 7"),

    # event
    case("event name", "event: e\ndata: a\n\n", Seen("a", "e")),
    case("event name after data", "data: a\nevent: e\n\n", Seen("a", "e")),
    case("the last event name counts", "event: e\nevent: f\ndata: a\n\n",
         Seen("a", "f")),
    case("an empty event name is message", "event:\ndata: a\n\n", "a"),
    case("event alone is message", "event\ndata: a\n\n", "a"),
    case("an empty event name clears", "event: e\nevent\ndata: a\n\n", "a"),
    case("event name resets after dispatch", "event: e\ndata: a\n\ndata: b\n\n",
         Seen("a", "e"), "b"),
    case("event name resets after a block without data", "event: e\n\ndata: a\n\n",
         "a"),
    case("event name resets after a comment block", "event: e\n:\n\ndata: a\n\n", "a"),
    case("event name message", "event: message\ndata: a\n\n", Seen("a", "message")),
    case("event name error", "event: error\ndata: a\n\n", Seen("a", "error")),
    case("event name with NUL", "event: a\0b\ndata: c\n\n", Seen("c", "a\0b")),
    case("event name with a colon", "event: a:b\ndata: c\n\n", Seen("c", "a:b")),
    case("event name in Greek", "event: γεγονός\ndata: c\n\n", Seen("c", "γεγονός")),
    case("event name of one space", "event:  \ndata: a\n\n", Seen("a", " ")),

    # id
    case("id", "id: 1\ndata: a\n\n", Seen("a", None, "1")),
    case("id after data", "data: a\nid: 1\n\n", Seen("a", None, "1")),
    case("the last id counts", "id: 1\nid: 2\ndata: a\n\n", Seen("a", None, "2")),
    case("id persists", "id: 1\ndata: a\n\ndata: b\n\ndata: c\n\n",
         Seen("a", None, "1"), Seen("b", None, "1"), Seen("c", None, "1")),
    case("id changes", "id: 1\ndata: a\n\nid: 2\ndata: b\n\n",
         Seen("a", None, "1"), Seen("b", None, "2")),
    case("id: resets", "id: 1\ndata: a\n\nid:\ndata: b\n\n",
         Seen("a", None, "1"), Seen("b", None, "")),
    case("id alone resets", "id: 1\ndata: a\n\nid\ndata: b\n\n",
         Seen("a", None, "1"), Seen("b", None, "")),
    case("id and a space resets", "id: 1\ndata: a\n\nid: \ndata: b\n\n",
         Seen("a", None, "1"), Seen("b", None, "")),
    case("an empty id as the first", "id\ndata: a\n\n", Seen("a", None, "")),
    case("a reset persists", "id: 1\ndata: a\n\nid\n\ndata: b\n\n",
         Seen("a", None, "1"), Seen("b", None, "")),
    case("id without data takes effect", "id: 1\ndata: a\n\nid: 2\n\n",
         Seen("a", None, "1"), last="2"),
    case("id without data is the next event's", "id: 2\n\ndata: b\n\n",
         Seen("b", None, "2")),
    case("empty id without data takes effect", "id: 1\ndata: a\n\nid\n\n",
         Seen("a", None, "1"), last=""),
    case("id with NUL is ignored", "id: a\0b\ndata: c\n\n", "c"),
    case("id of NUL is ignored", "id: \0\ndata: c\n\n", "c"),
    case("id with NUL keeps the one before", "id: 1\nid: 2\0\ndata: a\n\n",
         Seen("a", None, "1")),
    case("id with NUL keeps an earlier event's", "id: 1\n\nid: \0\ndata: a\n\n",
         Seen("a", None, "1")),
    case("an overlong NUL is no NUL", b"id: \xc0\x80\ndata: a\n\n",
         Seen("a", None, "\ufffd\ufffd")),
    case("id in another alphabet", "id: ж→\ndata: a\n\n", Seen("a", None, "ж→")),
    case("id with a colon", "id: 12:00\ndata: a\n\n", Seen("a", None, "12:00")),
    case("id of zero", "id: 0\ndata: a\n\n", Seen("a", None, "0")),
    case("the reserved id is an id", f"id: {END_ID}\n\n", last=END_ID),
    case("the reserved id on an event", f"id: {END_ID}\ndata: a\n\n",
         Seen("a", None, END_ID)),

    # retry
    case("retry", "retry: 3000\n\n", retry=3000),
    case("retry without a space", "retry:3000\n\n", retry=3000),
    case("retry next to data", "retry: 10\ndata: a\n\n", "a", retry=10),
    case("the last retry counts", "retry: 1\nretry: 2\n\n", retry=2),
    case("retry 0", "retry: 0\n\n", retry=0),
    case("retry with leading zeros", "retry: 00010\n\n", retry=10),
    case("retry of zeros only", "retry: 000\n\n", retry=0),
    case("retry +5", "retry: +5\n\n"),
    case("retry -5", "retry: -5\n\n"),
    case("retry empty", "retry:\n\n"),
    case("retry alone", "retry\n\n"),
    case("retry a space", "retry: \n\n"),
    case("retry with two spaces", "retry:  5\n\n"),
    case("retry with a trailing space", "retry: 5 \n\n"),
    case("retry with a tab", "retry:\t5\n\n"),
    case("retry 1.5", "retry: 1.5\n\n"),
    case("retry 1e3", "retry: 1e3\n\n"),
    case("retry 1_000", "retry: 1_000\n\n"),
    case("retry 0x10", "retry: 0x10\n\n"),
    case("retry 5s", "retry: 5s\n\n"),
    case("retry with NUL", "retry: 5\0\n\n"),
    case("retry in Arabic digits", "retry: ٣\n\n"),
    case("retry in fullwidth digits", "retry: \uff11\uff13\n\n"),
    case("retry superscript two", "retry: ²\n\n"),
    case("retry of invalid bytes", b"retry: \xff5\n\n"),
    case("a bad retry keeps the one before", "retry: 5\nretry: x\n\n", retry=5),
    case("an empty retry keeps the one before", "retry: 5\n\nretry\n\n", retry=5),
    case("retry of 15 digits", f"retry: {DIGITS}\n\n", retry=DIGITS),
    case("retry of 16 digits", "retry: 1000000000000000\n\n", retry=DIGITS),
    case("retry of 5000 digits", "retry: " + "9" * 5000 + "\n\n", retry=DIGITS),
    case("retry of 5000 zeros and a digit", "retry: " + "0" * 5000 + "5\n\n", retry=5),

    # UTF-8
    case("two bytes", "data: é\n\n", "é"),
    case("three bytes", "data: €\n\n", "€"),
    case("four bytes", "data: 😀\n\n", "😀"),
    case("combining", "data: e\u0301\n\n", "e\u0301"),
    case("a noncharacter", "data: \uffff\n\n", "\uffff"),
    case("the last code point", "data: \U0010ffff\n\n", "\U0010ffff"),
    case("U+FFFD itself", "data: \ufffd\n\n", "\ufffd"),
    case("0xFF", b"data: a\xffb\n\n", "a\ufffdb"),
    case("lone continuation bytes", b"data: \x80\x80\n\n", "\ufffd\ufffd"),
    case("half of two bytes", b"data: \xc3\n\n", "\ufffd"),
    case("a third of three bytes", b"data: \xe2x\n\n", "\ufffdx"),
    case("two thirds of three bytes", b"data: \xe2\x82x\n\n", "\ufffdx"),
    case("three quarters of four bytes", b"data: \xf0\x9f\x98x\n\n", "\ufffdx"),
    case("a cut character and a whole one", b"data: \xe2\x82\xe2\x82\xac\n\n",
         "\ufffd€"),
    case("overlong slash", b"data: \xc0\xaf\n\n", "\ufffd" * 2),
    case("overlong four bytes", b"data: \xf0\x80\x80\x80\n\n", "\ufffd" * 4),
    case("a surrogate", b"data: \xed\xa0\x80\n\n", "\ufffd" * 3),
    case("beyond U+10FFFF", b"data: \xf4\x90\x80\x80\n\n", "\ufffd" * 4),
    case("a character over two lines is two errors", b"data: \xe2\x82\ndata: \xac\n\n",
         "\ufffd\n\ufffd"),
    case("a cut character before CR LF", b"data: \xf0\x9f\r\n\r\n", "\ufffd"),
    case("a cut character before a field", b"data: \xc3\nevent: e\n\n",
         Seen("\ufffd", "e")),
    case("invalid event name", b"event: \xff\ndata: a\n\n", Seen("a", "\ufffd")),
    case("invalid id", b"id: \xff\ndata: a\n\n", Seen("a", None, "\ufffd")),
    case("invalid field name", b"data\xff: a\n\n"),
    case("a cut character swallows no colon", b"data\xc3: a\n\n"),
    case("a cut character swallows no space", b"data:\xe2 a\n\n", "\ufffd a"),
    case("Latin-1", "data: é\n\n".encode("latin-1"), "\ufffd"),
]
# fmt: on

HOW = pytest.mark.parametrize("how", ["whole", "bytes", "random"])


def test_table_size() -> None:
    """The table holds at least 150 different cases."""
    assert len({param.values[0] for param in CASES}) >= 150
    assert len({param.id for param in CASES}) == len(CASES)


@HOW
@pytest.mark.parametrize(("wire", "expected"), CASES)
def test_decodes_as_the_standard_says(wire: bytes, expected: Outcome, how: str) -> None:
    """A stream gives the standard's events, however it is cut."""
    for chunks in cuts(wire, how):
        assert decode(chunks) == expected


@pytest.mark.parametrize(("wire", "expected"), CASES)
def test_reference_decodes_as_the_standard_says(wire: bytes, expected: Outcome) -> None:
    """The reference decoder below passes the same table."""
    assert reference(wire) == expected


@pytest.mark.parametrize(("wire", "expected"), CASES)
def test_cut_everywhere(wire: bytes, expected: Outcome) -> None:
    """A single cut at any place changes nothing."""
    for place in range(0, len(wire) + 1, 1 + len(wire) // 200):
        assert decode([wire[:place], wire[place:]]) == expected


def test_events_are_events() -> None:
    """What is decoded is an `Event`: equal to one that was made, without a retry."""
    (event,) = Decoder().feed(b": c\nid: 1\nevent: e\nretry: 5\ndata: a\ndata: b\n\n")
    assert event == Event("a\nb", event="e", id="1")
    assert type(event) is Event
    assert event.encode() == b"id: 1\nevent: e\ndata: a\ndata: b\n\n"


def test_cr_dispatches_at_once() -> None:
    """An event that ends in CR CR is given out without waiting for a LF."""
    decoder = Decoder()
    assert decoder.feed(b"data: a\r\r") == [Event("a")]
    assert decoder.feed(b"\n") == []
    assert decoder.feed(b"data: b\r\n\r") == [Event("b")]
    assert decoder.feed(b"\ndata: c\n\n") == [Event("c")]


@pytest.mark.parametrize("between", [[], [b""], [b"", b""]], ids=["0", "1", "2"])
def test_cr_and_its_lf_in_two_chunks(between: list[bytes]) -> None:
    """A LF right after a CR belongs to it, also in a later chunk."""
    chunks = [b"data: a\r", *between, b"\ndata: b\r", *between, b"\n\r", b"\n"]
    assert decode(chunks).events == [Seen("a\nb")]


def test_lf_after_another_byte_is_a_line_end() -> None:
    """Only the LF right after a CR belongs to it, not one further on."""
    assert decode([b"data: a\r", b":", b"\n", b"\n"]).events == [Seen("a")]
    assert decode([b"data: a\r", b"\n", b"\n"]).events == [Seen("a")]


def test_bom_in_three_chunks() -> None:
    """A byte order mark is removed once, also when it comes byte by byte."""
    assert decode([b"\xef", b"\xbb", b"\xbf", b"data: a\n\n"]).events == [Seen("a")]
    assert decode([b"\xef", b"\xbb\xbf\xef", b"\xbb\xbfdata: a\n\n"]).events == []


def test_events_come_as_soon_as_they_are_complete() -> None:
    """Each call returns the events that its bytes complete, oldest first."""
    decoder = Decoder()
    assert decoder.feed(b"data: a\n") == []
    assert decoder.feed(b"\ndata: b\n\ndata") == [Event("a"), Event("b")]
    assert decoder.feed(b"") == []
    assert decoder.feed(b": c") == []
    assert decoder.feed(b"\n\n") == [Event("c")]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_bytes_are_taken(kind: Any) -> None:
    """``bytearray`` and ``memoryview`` work too, and may be reused afterwards."""
    decoder = Decoder()
    chunk = bytearray(b"data: a")
    assert decoder.feed(kind(chunk)) == []
    chunk[:] = b"XXXXXXX"
    assert decoder.feed(kind(b"\n\n")) == [Event("a")]


def test_retry_is_known_at_once() -> None:
    """``.retry`` is None before one came, then the last one, with its line's end."""
    decoder = Decoder()
    assert decoder.retry is None
    decoder.feed(b"retry: 10")
    assert decoder.retry is None
    decoder.feed(b"\n")
    assert decoder.retry == 10
    decoder.feed(b"retry: x\n\n")
    assert decoder.retry == 10


def test_last_event_id_is_set_by_the_blank_line() -> None:
    """``.last_event_id`` changes when a block ends, with or without data."""
    decoder = Decoder()
    assert decoder.last_event_id is None
    decoder.feed(b"id: 1\n")
    assert decoder.last_event_id is None
    decoder.feed(b"\n")
    assert decoder.last_event_id == "1"
    decoder.feed(b"id\n\n")
    assert decoder.last_event_id == ""


def test_resumed_stream_keeps_its_id() -> None:
    """A decoder that continues another stream starts with that one's id."""
    decoder = Decoder(last_event_id="7")
    assert decoder.last_event_id == "7"
    assert decoder.feed(b"data: a\n\n") == [Event("a", id="7")]
    assert decoder.feed(b"id: 8\ndata: b\n\n") == [Event("b", id="8")]
    assert decoder.last_event_id == "8"


def test_close_discards_what_is_not_complete() -> None:
    """`close` ends the stream: half an event is dropped, with its id (§9.2.6)."""
    decoder = Decoder()
    assert decoder.feed(b"id: 1\ndata: a\n\nid: 2\ndata: b\n") == [Event("a", id="1")]
    decoder.close()
    assert decoder.last_event_id == "1"
    decoder.close()


@pytest.mark.parametrize("chunk", [b"", b"\n", b"data: a\n\n"])
def test_feed_after_close(chunk: bytes) -> None:
    """A closed decoder takes no bytes: ValueError."""
    decoder = Decoder()
    decoder.close()
    with pytest.raises(
        ValueError, match=r"feed\(\) must not be called after close\(\)"
    ):
        decoder.feed(chunk)


# Limits

LINE = "a line of the event stream is longer than 10 bytes"
EVENT = "an event holds more than 6 bytes of data"


def limited(
    name: str, wire: bytes, *data: str, error: str | None = None, **limits: int | None
) -> Any:
    return pytest.param(wire, limits, list(data), error, id=name)


# fmt: off
LIMITS = [
    limited("a line at its limit", b"data: 1234\n\n", "1234", max_line=10),
    limited("a line over its limit", b"data: 12345\n\n", error=LINE, max_line=10),
    limited("a line far over its limit", b"data: " + b"x" * 999, error=LINE,
            max_line=10),
    limited("line ends do not count", b"data: 1234\r\n\r\n", "1234", max_line=10),
    limited("a comment counts", b": 123456789\n\n", error=LINE, max_line=10),
    limited("an unknown field counts", b"unknown: 12\n\n", error=LINE, max_line=10),
    limited("an id counts", b"id: 1234567\n\n", error=LINE, max_line=10),
    limited("spaces count", b"data:      \n\n", error=LINE, max_line=10),
    limited("bytes count, not characters", "data: éé\n\n".encode(), "éé", max_line=10),
    limited("bytes over, characters not", "data: ééé\n\n".encode(), error=LINE,
            max_line=10),
    limited("a byte order mark counts", BOM + b"data: 12\n\n", error=LINE, max_line=10),
    limited("no line end yet", b"data: 12345", error=LINE, max_line=10),
    limited("no line end yet, at the limit", b"data: 1234", max_line=10),
    limited("events before the long line", b"data: a\n\ndata: b\n\ndata: 12345\n\n",
            "a", "b", error=LINE, max_line=10),
    limited("nothing after the long line", b"data: a\n\n:0123456789\ndata: b\n\n", "a",
            error=LINE, max_line=10),
    limited("many short lines", b"data: 1\n" * 50 + b"\n", "\n".join("1" * 50),
            max_line=10),
    limited("CR ends a line", b"data: 1234\rdata: 5678\r\r", "1234\n5678", max_line=10),
    limited("an event at its limit", b"data: 123456\n\n", "123456", max_event=6),
    limited("an event over its limit", b"data: 1234567\n\n", error=EVENT, max_event=6),
    limited("lines at the limit", b"data: 12\ndata: 456\n\n", "12\n456", max_event=6),
    limited("lines over the limit", b"data: 123\ndata: 567\n\n", error=EVENT,
            max_event=6),
    limited("empty lines at the limit", b"data\n" * 7 + b"\n", "\n" * 6, max_event=6),
    limited("empty lines over the limit", b"data\n" * 8 + b"\n", error=EVENT,
            max_event=6),
    limited("over the limit before the event ends", b"data: 1234\ndata: 5678\n",
            error=EVENT, max_event=6),
    limited("a new event starts from nothing", b"data: 123456\n\n" * 3,
            "123456", "123456", "123456", max_event=6),
    limited("other fields are no data", b"event: 1234567\nid: 1234567\n"
            b": 1234567\ndata: 1\n\n", "1", max_event=6),
    limited("data bytes count, not characters", "data: €€€\n\n".encode(), error=EVENT,
            max_event=6),
    limited("events before the big one", b"data: a\n\ndata: 1234567\n\ndata: c\n\n",
            "a", error=EVENT, max_event=6),
    limited("the line first, then the event", b"data: 12\ndata: 12345\n\n", error=LINE,
            max_line=10, max_event=6),
    limited("the event first, then the line", b"data: 12\ndata: 5678\n:0123456789\n",
            error=EVENT, max_line=10, max_event=6),
    limited("no limits", b"data: " + b"x" * 99_999 + b"\n\n", "x" * 99_999,
            max_line=None, max_event=None),
]
# fmt: on


@HOW
@pytest.mark.parametrize(("wire", "limits", "data", "error"), LIMITS)
def test_limits(
    wire: bytes, limits: dict[str, Any], data: list[str], error: str | None, how: str
) -> None:
    """What is over a limit ends the stream there, the same however it is cut."""
    for chunks in cuts(wire, how):
        outcome = decode(chunks, **limits)
        assert [event.data for event in outcome.events] == data
        assert outcome.error == error


def test_events_before_an_error_are_returned_first() -> None:
    """The call with events returns them; the error comes at the next, and for ever."""
    decoder = Decoder(max_line=10)
    assert decoder.feed(b"data: a\n\n" + b"x" * 11) == [Event("a")]
    for chunk in (b"", b"\n", b"data: b\n\n"):
        with pytest.raises(RemoteProtocolError, match="longer than 10 bytes"):
            decoder.feed(chunk)


def test_error_without_events_is_raised_at_once() -> None:
    """The call that finds an error and has no event raises it."""
    with pytest.raises(RemoteProtocolError) as caught:
        Decoder(max_event=6).feed(b"data: 1234567\n")
    assert isinstance(caught.value, ProtocolError)
    assert isinstance(caught.value, SyncStreamError)


def test_close_raises_the_error_that_feed_had_to_report() -> None:
    """An error behind the last events is not lost when the stream ends there."""
    decoder = Decoder(max_line=10)
    assert decoder.feed(b"data: a\n\n" + b"x" * 11) == [Event("a")]
    with pytest.raises(RemoteProtocolError, match="longer than 10 bytes"):
        decoder.close()
    with pytest.raises(ValueError, match="after close"):
        decoder.feed(b"")


def test_a_long_line_is_refused_before_it_has_ended() -> None:
    """No more than ``max_line`` bytes are kept of a line, and a chunk."""
    decoder = Decoder(max_line=1000)
    assert decoder.feed(b"x" * 1000) == []
    with pytest.raises(RemoteProtocolError):
        decoder.feed(b"x")


@pytest.mark.parametrize("name", ["max_line", "max_event"])
@pytest.mark.parametrize("limit", [0, -1])
def test_limits_are_positive(name: str, limit: int) -> None:
    """A limit of zero or less is a ValueError that names it and shows its repr."""
    with pytest.raises(
        ValueError, match=f"{name} must be positive or None, got {limit}"
    ):
        Decoder(**{name: limit})


def test_default_limits() -> None:
    """Without a word, a line and an event may be 4 MiB."""
    most = b"x" * (4 * 1024 * 1024 - 5)
    assert len(decode([b"data:" + most, b"\n\n"]).events) == 1
    assert decode([b"data:" + most + b"x"]).error is not None
    assert decode([b"data:" + most + b"\ndata:1234\n\n"]).error is None
    assert decode([b"data:" + most + b"\ndata:12345\n\n"]).error is not None


# Hypothesis


def reference(wire: bytes) -> Outcome:
    """Decode a whole stream by the standard's steps, in its order and words."""
    text = wire.decode("utf-8", "replace")  # "UTF-8 decode", which …
    text = text.removeprefix("\ufeff")  # … strips one leading byte order mark
    lines = re.split("\r\n|\n|\r", text)
    lines.pop()  # the line that has no end
    events: list[Seen] = []
    data = event_type = ""
    id_buffer: str | None = None
    last_event_id: str | None = None
    retry: int | None = None
    for line in lines:
        if line == "":
            last_event_id = id_buffer
            if data != "":
                events.append(Seen(data[:-1], event_type or None, last_event_id))
            data = event_type = ""
            continue
        if line[0] == ":":
            continue
        if ":" in line:
            field, value = line.split(":", 1)
            if value.startswith(" "):
                value = value[1:]
        else:
            field, value = line, ""
        if field == "event":
            event_type = value
        elif field == "data":
            data += value + "\n"
        elif field == "id" and "\0" not in value:
            id_buffer = value
        elif field == "retry" and re.fullmatch("[0-9]+", value):
            significant = value.lstrip("0") or "0"
            retry = DIGITS if len(significant) > 15 else int(significant)
    return Outcome(events, retry, last_event_id, None)


PIECES = [
    *(b"data", b"event", b"id", b"retry", b"Data", b"foo", b"", b" ", b"  ", b"\t"),
    *(b":", b": ", b":  ", b"::", b"x", b"1", b"007", b"-1", b"\0", b"\v", b"\x85"),
    *(b"\n", b"\r", b"\r\n", b"\n\n", b"\r\r", b"\r\n\r\n", b"\n\r"),
    *(BOM, b"\xef", b"\xbb", b"\xbf", b"\xff", b"\xe2\x82", b"\xf0\x9f", b"\x80"),
    *("é".encode(), "€".encode(), "😀".encode(), "\u2028".encode(), "٣".encode()),
    *(b"data: a\n", b"data\n", b"event: e\n", b"id: 1\n", b"id\n", b"retry: 5\n"),
    *(b"data: a\n\n", b"id: 2\r\rdata: b\r\r", b": keepalive\n\n"),
]
WIRES = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=40).map(b"".join),
    st.binary(max_size=60),
    st.lists(st.one_of(st.sampled_from(PIECES), st.binary(max_size=4))).map(b"".join),
)
PLACES = st.lists(st.integers(0, 10_000), max_size=12)
TEXT = st.text()
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0")).filter(
    lambda name: name != END_ID
)
MANY = settings(max_examples=400)


@MANY
@given(WIRES, PLACES)
def test_same_as_the_reference(wire: bytes, places: list[int]) -> None:
    """Any bytes, cut anywhere, give what the standard's algorithm gives."""
    expected = reference(wire)
    assert decode([wire]) == expected
    assert decode([wire[i : i + 1] for i in range(len(wire))]) == expected
    assert decode(cut_at(wire, places)) == expected


@MANY
@given(WIRES, PLACES, st.integers(1, 30), st.integers(1, 30))
def test_limits_do_not_depend_on_the_cuts(
    wire: bytes, places: list[int], max_line: int, max_event: int
) -> None:
    """Under limits every cut gives the same events, ids, retry and error."""
    limits = {"max_line": max_line, "max_event": max_event}
    whole = decode([wire], **limits)
    assert decode([wire[i : i + 1] for i in range(len(wire))], **limits) == whole
    assert decode(cut_at(wire, places), **limits) == whole
    unlimited = reference(wire)
    if whole.error is None:
        assert whole == unlimited
    else:
        assert whole.events == unlimited.events[: len(whole.events)]


def normalised(text: str) -> str:
    return re.sub("\r\n|\r|\n", "\n", text)


@MANY
@given(
    data=st.none() | TEXT,
    event=st.none() | NAMES,
    id=st.none() | NAMES | st.integers(),
    retry=st.none() | st.integers(0, DIGITS),
    comment=st.none() | TEXT,
    places=PLACES,
)
@example("a\r\n\r\nevent: forged", "e", "1", 5, "\rdata: forged\n\n", [])
@example("\n", "", "", None, "\r", [])
@example("\r", " ", " ", None, None, [])
@example("\ufeff", "\ufeff", "\ufeff", None, "\ufeff", [])
@example("a\u2028b\u2029c\x85d\ve\f", "\u2028", "\x85", None, "\u2028", [])
def test_what_is_encoded_is_decoded(
    data: str | None,
    event: str | None,
    id: str | int | None,
    retry: int | None,
    comment: str | None,
    places: list[int],
) -> None:
    """An encoded event comes back as it was, line ends as LF, and forges nothing."""
    if data is event is id is retry is comment is None:
        return
    wire = Event(data, event=event, id=id, retry=retry, comment=comment).encode()
    seen_id = None if id is None else str(id)
    mine = [] if data is None else [Seen(normalised(data), event or None, seen_id)]
    # The plain event after it shows that no name, id or data leaked out of it.
    outcome = decode(cut_at(wire + b"data: next\n\n", places))
    assert outcome == Outcome(
        [*mine, Seen("next", None, seen_id)], retry, seen_id, None
    )


@MANY
@given(
    data=TEXT,
    event=st.none() | NAMES,
    id=st.none() | NAMES,
    retry=st.none() | st.integers(0, 10**15 - 1),
    comment=st.none() | TEXT,
)
def test_fields_are_never_forged(
    data: str, event: str | None, id: str | None, retry: int | None, comment: str | None
) -> None:
    """The wire holds the fields that were given, each as often as it has lines."""
    wire = Event(data, event=event, id=id, retry=retry, comment=comment).encode()
    expected = [] if comment is None else [""] * len(normalised(comment).split("\n"))
    expected += ["id"] * (id is not None) + ["event"] * (event is not None)
    expected += ["retry"] * (retry is not None)
    expected += ["data"] * len(normalised(data).split("\n"))
    lines = re.split(b"\r\n|\r|\n", wire)
    assert [line.split(b": ")[0].decode() for line in lines] == [
        *expected,
        "",
        "",
    ]


@MANY
@given(st.lists(st.tuples(TEXT, st.none() | NAMES, st.none() | NAMES)), PLACES)
def test_streams_round_trip(
    rows: list[tuple[str, str | None, str | None]], places: list[int]
) -> None:
    """A stream of events comes back event by event, ids kept until the next one."""
    wire = b"".join(Event(d, event=e, id=i).encode() for d, e, i in rows)
    expected, last = [], None
    for data, event, id in rows:
        last = last if id is None else id
        expected.append(Seen(normalised(data), event or None, last))
    assert decode(cut_at(wire, places)) == Outcome(expected, None, last, None)
