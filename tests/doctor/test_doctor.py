"""`syncstream doctor`: what it makes of what it sees, and what it sees."""

import contextlib
import gzip
import random
import re
import socket
import ssl
import subprocess
import sys
import threading
import time

import pytest

from syncstream.__main__ import main
from syncstream.doctor import checks, timing
from syncstream.doctor import listen as doctor
from syncstream.doctor.checks import judge
from syncstream.doctor.observation import Arrival, Finding, Head, Observation
from syncstream.doctor.report import report
from syncstream.doctor.response import Response
from syncstream.protocol.sse import END_ID
from tests import ROOT
from tests.support.live import LiveServer, free_port
from tests.support.programs import certificate, program
from tests.support.waits import await_true

# Seconds of listening: what ends by itself may take its time on a busy machine; to
# what does not, in silence too, the test listens to the end.
PATIENCE = 10.0
WHILE = 1.0

TYPE = ("Content-Type", "text/event-stream; charset=utf-8")
CACHE = ("Cache-Control", "no-cache, no-transform")
ACCEL = ("X-Accel-Buffering", "no")
NDJSON = ("Content-Type", "application/x-ndjson")


def head(*headers, status=200, version="1.1", **options):
    """Return a head whose headers are good ones, but for those that are given."""
    names = {name for name, _ in headers}
    good = [pair for pair in (TYPE, CACHE, ACCEL) if pair[0] not in names]
    given = [pair for pair in headers if pair[1] is not None]
    return Head(version, status, "Reason", (*good, *given), **options)


def steady(step=0.5, until=20.0):
    """Return an opening, and an event in each step."""
    times = [step * n for n in range(1, int(until / step))]
    return (Arrival(0.01, 18, 0, 1), *(Arrival(at, 40, 1) for at in times))


def seen(**changes):
    """Return a healthy observation with changes."""
    healthy = {
        "url": "http://example.com/events",
        "connected": 0.01,
        "head": head(),
        "head_at": 0.01,
        "arrivals": steady(),
        "listened": 20.0,
        "last_id": "40",
        "retry": 1000,
    }
    return Observation(**{**healthy, **changes})


def burst(at, events=10, torn=False, size=None):
    return Arrival(at, size or 40 * events, events, is_torn=torn)


def packed(coding="gzip", **changes):
    """Return what a probe has seen."""
    return seen(head=head(("Content-Encoding", coding)), listened=10.0, **changes)


CASES = {
    "healthy": (seen(), ""),
    "healthy-ndjson": (seen(head=head(NDJSON), arrivals=steady()[1:]), ""),
    "healthy-finished": (seen(end="whole", last_id=END_ID), ""),
    "healthy-behind-nginx": (
        seen(head=head(("Server", "nginx/1.22"), (ACCEL[0], None))),
        "",
    ),
    "healthy-replay": (seen(arrivals=(burst(0.01, 90), *steady()[1:])), ""),
    "redirect": (seen(redirects=((301, "http://b/"),)), "note:redirect"),
    "no-content": (seen(head=head(status=204)), "fault:status"),
    "unauthorised": (seen(head=head(status=401)), "fault:status"),
    "forbidden": (seen(head=head(status=403)), "fault:status"),
    "not-found": (seen(head=head(status=404)), "fault:status"),
    "teapot": (seen(head=head(status=418)), "fault:status"),
    "partial": (seen(head=head(status=206)), "fault:status"),
    "server-error": (seen(head=head(status=500)), "fault:status"),
    "strange-error": (seen(head=head(status=599)), "fault:status"),
    "lost-redirect": (seen(head=head(status=302)), "fault:status"),
    "no-type": (seen(head=head((TYPE[0], None))), "fault:content-type"),
    "html": (seen(head=head((TYPE[0], "text/html"))), "fault:content-type"),
    "latin-1": (
        seen(head=head((TYPE[0], 'text/event-stream; Charset="iso-8859-1"'))),
        "fault:charset",
    ),
    "no-charset": (seen(head=head((TYPE[0], "Text/Event-Stream"))), ""),
    "no-charset-beyond-ascii": (
        seen(head=head((TYPE[0], "text/event-stream")), is_ascii=False),
        "note:charset",
    ),
    "no-cache-control": (seen(head=head((CACHE[0], None))), "fault:cache-control"),
    "max-age": (seen(head=head((CACHE[0], "max-age=60"))), "fault:cache-control"),
    "no-store": (seen(head=head((CACHE[0], "No-Store"))), "note:cache-control"),
    "from-cache": (seen(head=head(("Age", "12"))), "fault:cached"),
    "no-accel": (seen(head=head((ACCEL[0], None))), "note:x-accel-buffering"),
    "accel-yes": (seen(head=head((ACCEL[0], "yes"))), "note:x-accel-buffering"),
    "length": (seen(head=head(("Content-Length", "5"))), "fault:content-length"),
    "ndjson-length": (
        seen(head=head(NDJSON, ("Content-Length", "5"))),
        "note:content-length",
    ),
    "length-and-chunks": (
        seen(head=head(("Content-Length", "5"), ("Transfer-Encoding", "chunked"))),
        "fault:framing",
    ),
    "chunked-twice": (
        seen(head=head(*[("Transfer-Encoding", "chunked")] * 2)),
        "fault:framing",
    ),
    "malformed-head": (seen(head=head(malformed=2)), "fault:head"),
    "connection": (
        seen(head=head(("Connection", "keep-alive"), ("Connection", "close"))),
        "note:connection",
    ),
    "connection-alone": (seen(head=head(("Connection", "keep-alive"))), ""),
    "http-1.0": (seen(head=head(version="1.0")), "note:http-1.0"),
    "encoded": (seen(head=head(("Content-Encoding", "br"))), "fault:compressed"),
    "gzip-flushed": (seen(probe=packed()), "note:gzip"),
    "gzip-held": (seen(probe=packed(arrivals=(burst(0.01, 0),))), "fault:gzip"),
    "gzip-late": (seen(probe=packed(arrivals=(burst(5, 9),))), "fault:gzip"),
    "gzip-unknown": (seen(probe=packed("br", arrivals=())), "note:gzip"),
    "gzip-nothing-to-compare": (
        seen(
            arrivals=(*(Arrival(n, 9, 0, 1) for n in range(19)), burst(19.5, 1)),
            probe=packed(arrivals=()),
        ),
        "note:gzip",
    ),
    "gzip-not-done": (seen(probe=seen(arrivals=())), ""),
    "no-second-connection": (
        seen(probe=seen(head=None, failure=Finding("no-head", "none", "do"))),
        "note:second-connection",
    ),
    "one-connection-each": (
        seen(probe=seen(head=head(status=429))),
        "note:second-connection",
    ),
    "silent": (seen(arrivals=()), "fault:silent"),
    "silent-ndjson": (seen(head=head(NDJSON), arrivals=()), "note:silent"),
    "head-withheld": (
        seen(head_at=3.0, arrivals=(Arrival(3.0, 40, 1), *steady()[7:])),
        "fault:head-withheld",
    ),
    "slow": (seen(head_at=3.0, arrivals=(*steady()[7:],)), "note:slow"),
    "no-opening": (seen(arrivals=steady()[4:]), "note:no-opening"),
    "buffer-full": (
        seen(arrivals=tuple(burst(n, 100, True, 4096) for n in range(3, 19, 3))),
        "fault:buffering note:no-opening",
    ),
    "large-event-in-pieces": (
        seen(
            arrivals=tuple(
                Arrival(n + part / 100, 9000, part == 2, is_torn=part < 2)
                for n in range(20)
                for part in range(3)
            )
        ),
        "",
    ),
    "an-event-is-being-typed": (
        seen(arrivals=tuple(Arrival(n / 2, 9, n % 3 == 0, 0, True) for n in range(40))),
        "",
    ),
    "held-until-the-end": (
        seen(arrivals=(burst(3, 5),), end="whole", last_id=END_ID, listened=3.0),
        "fault:buffering note:no-opening",
    ),
    "bursts": (
        seen(
            arrivals=(
                Arrival(0.01, 5, 0, 1),
                *(burst(n + part / 100, 2) for n in range(2, 19, 2) for part in (0, 1)),
            ),
        ),
        "note:bursts",
    ),
    "no-keepalive": (
        seen(arrivals=(Arrival(0.01, 5, 0, 1), burst(1, 1))),
        "note:keepalive",
    ),
    "keepalive-of-ours": (
        seen(
            arrivals=tuple(Arrival(15.1 * n, 13, 0, 1) for n in range(4)), listened=60
        ),
        "",
    ),
    "long-silence": (
        seen(arrivals=(Arrival(0.01, 5, 0, 1), burst(90, 1)), listened=91.0),
        "fault:keepalive",
    ),
    "stray": (seen(stray=3, sample="{"), "fault:stray-lines"),
    "no-blank-line": (
        seen(arrivals=tuple(Arrival(n / 2, 9, is_torn=True) for n in range(40))),
        "fault:no-blank-line",
    ),
    "dataless": (seen(dataless=1), "note:no-data"),
    "not-utf-8": (seen(is_utf8=False), "fault:utf-8"),
    "broken": (seen(end="broken", problem="a chunk"), "fault:broken"),
    "no-ids": (seen(last_id=None), "note:no-ids"),
    "retry-0": (seen(retry=0), "note:retry"),
    "no-retry": (seen(retry=None), ""),
    "cut": (seen(end="cut"), "fault:cut"),
    "reset": (seen(end="reset"), "fault:cut"),
    "ended": (seen(end="whole"), "note:ended"),
    "closed": (seen(end="closed"), "note:ended"),
    "answered": (seen(end="whole", last_id=None, is_posted=True), ""),
    "enough": (seen(end="enough"), ""),
    "ended-within": (
        seen(end="whole", arrivals=(*steady(), Arrival(20, 5, is_torn=True))),
        "fault:ended-within-event",
    ),
    "no-connection": (
        Observation("http://a/", failure=Finding("dns", "no", "do")),
        "fault:dns",
    ),
    "redirected-to-nowhere": (
        Observation(
            "http://a/",
            redirects=((302, "http://a/"),),
            failure=Finding("dns", "no", "do"),
        ),
        "fault:dns note:redirect",
    ),
}


@pytest.mark.parametrize(("observation", "expected"), CASES.values(), ids=CASES)
def test_judgement(observation, expected):
    """Each thing that can be seen has its finding, and no other."""
    findings = judge(observation)
    assert " ".join(f"{f.level}:{f.name}" for f in findings) == expected
    for finding in findings:
        assert finding.text, finding
        assert finding.cure, finding
    text = report(observation, findings)
    assert text.isascii()
    assert all(len(line) <= 100 for line in text.splitlines())
    assert text.count("cure: ") == len(findings)
    status = checks.exit_status(observation, findings)
    assert status == (2 if observation.connected is None else "fault" in expected)


@pytest.mark.parametrize("finding", ["silent", "head-withheld", "buffering"])
@pytest.mark.parametrize(
    ("header", "cure"),
    [
        (("Server", "nginx"), "proxy_buffering off"),
        (("Server", "Apache/2.4"), "flushpackets=on"),
        (("CF-Ray", "8"), "Cloudflare"),
        (("Via", "1.1 varnish"), "do_stream"),
        (("Via", "1.1 x.cloudfront.net (CloudFront)"), "CachingDisabled"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_cure_is_the_proxys_own(finding, header, cure):
    """A proxy that shows is named, with its own setting."""
    changes = {
        "silent": {"arrivals": ()},
        "head-withheld": {"head_at": 3.0, "arrivals": (Arrival(3.0, 40, 1),)},
        "buffering": {"arrivals": (burst(3, 9, True, 4096),)},
    }
    findings = judge(seen(head=head(header), **changes[finding]))
    assert cure in next(f.cure for f in findings if f.name == finding)


@pytest.mark.parametrize(
    ("listened", "last", "who"),
    [(30.2, 29.0, "gunicorn"), (80.0, 20.1, "nginx"), (200.0, 99.9, "Cloudflare")],
)
def test_a_cut_at_a_known_time(listened, last, who):
    """A cut after a timeout that is well known names its owner."""
    cut = seen(arrivals=(burst(last, 1),), listened=listened, end="cut")
    assert who in next(f.text for f in judge(cut) if f.name == "cut")


# --- The network --------------------------------------------------------------------


STOP = b"stop\r\n\r\n"


class RawServer:
    """Answer each connection by what a test says, byte by byte if it wants.

    Args:
        answer: Called with the connection, the request's head, and a function that
            waits for a moment and tells whether the client is still there.
    """

    def __init__(self, answer, context=None):
        self._answer = answer
        self._context = context
        self.requests = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        while True:
            conn, _ = self._server.accept()
            conn.settimeout(10)
            with conn, contextlib.suppress(OSError):
                if self._context is not None:
                    conn = self._context.wrap_socket(conn, server_side=True)
                with conn:
                    request = b""
                    while b"\r\n\r\n" not in request:
                        data = conn.recv(65536)
                        if not data:
                            break
                        request += data
                    if request == STOP:
                        return
                    self.requests.append(request.decode())
                    self._answer(conn, self.requests[-1])

    def close(self):
        context = ssl._create_unverified_context() if self._context else None
        while self._thread.is_alive():
            # Read to its end: a reset (of a TLS ticket that nobody reads, say) may
            # be faster than the word.
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", self.port), 10) as conn,
                context.wrap_socket(conn) if context else conn as sock,
            ):
                sock.sendall(STOP)
                while sock.recv(1000):
                    pass
            self._thread.join(0.5)
        self._server.close()


@pytest.fixture
def serve():
    """Return the function that starts a `RawServer`."""
    with contextlib.ExitStack() as stack:
        yield lambda *args: stack.enter_context(contextlib.closing(RawServer(*args)))


@pytest.fixture
def _unhurried(monkeypatch):
    """A busy machine holds something back, too: that is no finding here."""
    monkeypatch.setattr(timing, "SLOW", PATIENCE)
    monkeypatch.setattr(timing, "SILENCE", PATIENCE)
    # Nor has it the time for a flood up to the bounds.
    monkeypatch.setattr(doctor, "MAX_BYTES", 2**22)
    monkeypatch.setattr(doctor, "MAX_EVENTS", 20_000)


def is_left(conn, pause=0.02):
    """Wait for a moment; tell whether the client has left meanwhile."""
    conn.settimeout(pause)
    try:
        return conn.recv(1) == b""
    except TimeoutError:
        return False
    finally:
        conn.settimeout(10)


def say(*pieces, hold=False):
    """Return an answer: these bytes, then the end, or nothing more."""

    def answer(conn, request):
        for piece in pieces:
            conn.sendall(piece)
        while hold and not is_left(conn):
            pass

    answer.is_open = hold
    return answer


def repeat(first, piece, pause=0.0):
    """Return an answer that goes on until the client leaves."""

    def answer(conn, request):
        conn.sendall(first)
        while not pause or not is_left(conn, pause):
            conn.sendall(piece)

    answer.is_open = pause > 0
    return answer


START = b"HTTP/1.1 200 OK\r\n"
LIVE = (
    b"Content-Type: text/event-stream; charset=utf-8\r\n"
    b"Cache-Control: no-cache, no-transform\r\nX-Accel-Buffering: no\r\n"
)
HEAD = START + LIVE + b"\r\n"
CHUNKED = START + LIVE + b"Transfer-Encoding: chunked\r\n\r\n"
EVENT = b"id: 1\ndata: 1\n\n"
BOMB = gzip.compress(b"\n" * 100_000_000)
LINES = HEAD.replace(TYPE[1].encode(), NDJSON[1].encode())
GZIP = START + LIVE + b"Content-Encoding: gzip\r\n\r\n"

ANSWERS = {
    "nothing": (say(), "no-head"),
    "no-answer": (say(hold=True), "no-head"),
    "half-a-head": (say(START, hold=True), "no-head"),
    "trickled-head": (repeat(START + b"X: ", b"a", 0.05), "no-head"),
    "endless-head": (repeat(START, b"X: a\r\n"), "head"),
    "endless-header": (repeat(START + b"X: ", b"a" * 65536), "head"),
    "endless-continue": (repeat(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), "head"),
    "endless-interim": (repeat(b"", b"HTTP/1.1 103 Hints\r\n\r\n"), "head"),
    "ssh": (say(b"SSH-2.0-OpenSSH\r\n", hold=True), "not-http"),
    "http-2": (say(b"\0\0\x12\x04\0\0\0\0\0", hold=True), "not-http"),
    "http-3.0": (say(b"HTTP/3.0 200 OK\r\n\r\n"), "not-http"),
    "no-status": (say(b"HTTP/1.1 OK\r\n\r\n"), "not-http"),
    "foreign-digits": (say("HTTP/1.1 ٢٠٠ OK\r\n\r\n".encode()), "not-http"),
    "tls": (say(b"\x15\x03\x03\0\x02\x02\x32"), "tls"),
    "no-colon": (say(START + LIVE + b"oops\r\n\r\n" + EVENT), "head ended"),
    "no-colon-before-the-framing": (
        say(START + b"oops\r\n a: b\r\n", CHUNKED[len(START) :], b"F\r\n", EVENT),
        "cut head",
    ),
    "cut-head": (say(START + b"A: b\r\nContent"), "no-head"),
    "cut-trailer": (say(CHUNKED, b"0\r\nA: b\r\n"), "cut"),
    "line-feeds": (
        say((START + LIVE).replace(b"\r", b"") + b"\n" + EVENT, hold=True),
        "",
    ),
    "interim": (say(b"HTTP/1.1 103 Hints\r\nLink: a\r\n\r\n" + HEAD + EVENT), "ended"),
    "no-reason": (say(b"HTTP/1.1 200\r\n" + LIVE + b"\r\n" + EVENT), "ended"),
    "open": (say(HEAD, EVENT, hold=True), ""),
    "trickled-body": (repeat(HEAD + EVENT, b":", 0.05), ""),
    "chunked": (say(CHUNKED, b"F\r\n", EVENT, b"\r\n0\r\nA: b\r\n\r\n"), "ended"),
    "chunk-extension": (
        say(CHUNKED, b"00f ; a=b\r\n", EVENT, b"\r\n0\r\n\r\n"),
        "ended",
    ),
    "truncated": (say(CHUNKED, b"F\r\n", EVENT, b"\r\n"), "cut"),
    "truncated-chunk": (say(CHUNKED, b"FF\r\n", EVENT), "cut"),
    "no-size": (say(CHUNKED, b"\x1b[31mx\r\n", hold=True), "broken"),
    "endless-size": (repeat(CHUNKED, b"0" * 1000), "broken"),
    "endless-trailer": (repeat(CHUNKED + b"0\r\n", b"a: b\r\n"), "broken"),
    "negative-size": (say(CHUNKED, b"-5\r\n", EVENT, hold=True), "broken"),
    "long-chunk": (say(CHUNKED, b"2\r\n", EVENT, hold=True), "broken"),
    "broken-at-once": (say(CHUNKED + b"x\r\n", hold=True), "broken"),
    "short-of-length": (
        say(START + LIVE + b"Content-Length: 99\r\n\r\n" + EVENT),
        "cut content-length",
    ),
    "length-0": (
        say(START + LIVE + b"Content-Length: 0\r\n\r\n", hold=True),
        "content-length ended",
    ),
    "length-of-many-digits": (
        say(START + LIVE + b"Content-Length: %s\r\n\r\n" % (b"9" * 9999), hold=True),
        "silent content-length",
    ),
    "json-lines": (say(HEAD, b'{"a": 1}\n', hold=True), "stray-lines"),
    "no-blank-line": (say(HEAD, b"data: 1\n", hold=True), "no-blank-line"),
    "dataless": (say(HEAD, EVENT, b"event: a\n\n", hold=True), "no-data"),
    "not-utf-8": (say(HEAD, b"data: \xff\nid: 1\n\n", hold=True), "utf-8"),
    "ended-within": (say(HEAD, EVENT, b"data: 2\n"), "ended-within-event"),
    "carriage-returns": (
        say(HEAD, EVENT.replace(b"\n", b"\r"), b":\r\r", hold=True),
        "",
    ),
    "mark-first": (say(HEAD, b"\xef\xbb\xbf", EVENT, hold=True), ""),
    "flood": (repeat(HEAD, EVENT * 1000), ""),
    "endless-line": (repeat(HEAD, b"data: " + b"a" * 65536), "broken"),
    "gzip": (say(GZIP, gzip.compress(EVENT), hold=True), "compressed"),
    "gzip-members": (say(GZIP, gzip.compress(EVENT) * 2, hold=True), "compressed"),
    "no-gzip": (say(GZIP, b"plain", hold=True), "compressed broken"),
    "bomb": (say(GZIP, BOMB, hold=True), "compressed"),
    "unknown-coding": (
        say(GZIP.replace(b"gzip", b"br"), b"\0\1\2", hold=True),
        "compressed",
    ),
    "ndjson": (
        say(LINES, b"1\n", hold=True),
        "",
    ),
    "no-json": (
        say(LINES, b"a\n", hold=True),
        "broken",
    ),
    "half-json": (
        say(LINES, b'{"a":'),
        "broken",
    ),
    "escapes": (
        say(b"HTTP/1.1 500 \x1b[2J\x9b\x07\r\nServer: \x1b]0;a\x07\r\n\r\n"),
        "status",
    ),
    "loop": (say(b"HTTP/1.1 302 Found\r\nLocation: /a\r\n\r\n"), "status redirect"),
    "no-location": (say(b"HTTP/1.1 302 Found\r\n\r\n"), "status"),
    "other-scheme": (
        say(b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n"),
        "status",
    ),
}


@pytest.mark.usefixtures("_unhurried")
@pytest.mark.parametrize(("answer", "expected"), ANSWERS.values(), ids=ANSWERS)
def test_odd_answers(serve, answer, expected):
    """Whatever a server says, it is named, in time, and shown without its escapes."""
    server = serve(answer)
    begin = time.monotonic()
    observation = doctor.examine(
        server.url, seconds=WHILE if answer.is_open else PATIENCE
    )
    assert time.monotonic() - begin < PATIENCE
    findings = judge(observation)
    assert " ".join(f.name for f in findings) == expected
    text = report(observation, findings)
    assert re.fullmatch(r"[\n -~]*", text)
    assert checks.exit_status(observation, findings) == any(
        f.level == "fault" for f in findings
    )


@pytest.mark.usefixtures("_unhurried")
def test_a_reset(serve):
    """A connection that is reset in the middle is a cut."""

    def answer(conn, request):
        conn.sendall(HEAD + EVENT)
        is_left(conn)
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    observation = doctor.examine(serve(answer).url, seconds=5)
    assert observation.end == "reset"
    assert [f.name for f in judge(observation)] == ["cut"]


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (b"x\r\n", 'a chunk has the size "x"'),
        (b"2\r\n" + EVENT, 'a chunk is followed by ": " instead of a line end'),
        (b"0\r\n" + b"a: b\r\n" * 20000, "the trailer is larger than 64 KiB"),
    ],
    ids=["size", "long-chunk", "trailer"],
)
def test_broken_chunks_are_told_apart(serve, answer, problem):
    """What breaks the framing is shown."""
    observation = doctor.examine(serve(say(CHUNKED + answer)).url, seconds=PATIENCE)
    (finding,) = [f for f in judge(observation) if f.name == "broken"]
    assert problem in finding.text


def test_a_read_of_many_chunks_is_one_arrival(serve):
    """Chunks that came together count as one read, with its time."""
    chunks = (b"F\r\n" + EVENT + b"\r\n") * 3
    server = serve(say(CHUNKED + chunks, hold=True))
    (arrival,) = doctor.examine(server.url, seconds=WHILE).arrivals
    assert (arrival.events, arrival.size) == (3, 3 * len(EVENT))


class Pieces:
    """A connection whose reads return one piece each."""

    def __init__(self, pieces):
        self._pieces = list(pieces)

    def settimeout(self, seconds):
        assert seconds > 0

    def recv_into(self, buffer):
        piece = self._pieces.pop(0) if self._pieces else b""
        buffer[: len(piece)] = piece
        return len(piece)


@pytest.mark.parametrize("seed", [None, *range(10)])
def test_cuts_do_not_matter(seed):
    """A response means the same, however its bytes are cut."""
    events = b"".join(b"id: %d\ndata: %d\n\n" % (n, n) for n in range(10))
    chunks = [events[n : n + 7] for n in range(0, len(events), 7)]
    wire = b"HTTP/1.1 100 Continue\r\n\r\n" + CHUNKED
    wire += b"".join(b"%x;a\r\n%b\r\n" % (len(c), c) for c in chunks)
    wire += b"0\r\nA: b\r\n\r\n"
    rng = random.Random(seed)
    pieces = []
    while wire:
        size = 1 if seed is None else rng.randrange(1, 60)
        pieces.append(wire[:size])
        wire = wire[size:]
    response, body = Response(Pieces(pieces), time.monotonic() + PATIENCE), b""
    assert response.read_head().status == 200
    while piece := response.read():
        body += piece
    assert body == events
    assert response.end == "whole"


def test_what_is_asked(serve):
    """The request is an EventSource's, with the user's words instead of its own."""
    server = serve(say(HEAD, EVENT, hold=True))
    headers = [("accept", "application/x-ndjson"), ("Cookie", "a=ü")]
    doctor.examine(
        f"{server.url}/ä b?q=ö#c", seconds=WHILE, headers=headers, last_event_id="7"
    )
    first, second = server.requests
    for request, coding in ((first, "identity"), (second, "gzip")):
        lines = request.split("\r\n")
        assert lines[0] == "GET /%C3%A4%20b?q=%C3%B6 HTTP/1.1"
        assert f"Host: 127.0.0.1:{server.port}" in lines
        assert {
            f"Accept-Encoding: {coding}",
            "accept: application/x-ndjson",
            "Cache-Control: no-cache",
            "Cookie: a=ü",
            "Last-Event-ID: 7",
        } <= set(lines)
        assert "Accept: text/event-stream" not in lines


@pytest.mark.parametrize(
    ("data", "media_type"),
    [
        ('{"prompt": "hé"}', "application/json"),
        ("prompt=x", "application/x-www-form-urlencoded"),
        ("", "application/x-www-form-urlencoded"),
    ],
)
def test_what_is_asked_by_post(serve, data, media_type, capsys):
    """``--data`` is sent once, for it may cost something; its type is seen."""
    server = serve(say(HEAD, EVENT, hold=True))
    main(["doctor", f"{server.url}/ask", "--data", data, "--seconds", str(WHILE)])
    (request,) = server.requests
    head, _, body = request.partition("\r\n\r\n")
    lines = head.split("\r\n")
    assert lines[0] == "POST /ask HTTP/1.1"
    assert f"Content-Length: {len(data.encode())}" in lines
    assert f"Content-Type: {media_type}" in lines
    assert "Accept: text/event-stream" in lines
    assert data.startswith(body)  # what the server has read with the head
    assert capsys.readouterr().out.endswith("healthy\n")


def test_what_is_asked_by_post_may_end(serve, capsys):
    """Nobody comes back by himself: an end is no fault, nor are ids missed."""
    server = serve(say(HEAD, b": ok\n\ndata: 1\n\n"))
    main(["doctor", server.url, "--data", "{}", "--seconds", str(WHILE)])
    assert capsys.readouterr().out.endswith("\n\nhealthy\n")


def test_a_type_of_ones_own(serve):
    """A header of the user's wins."""
    server = serve(say(HEAD, EVENT, hold=True))
    given = [("content-type", "text/plain")]
    doctor.examine(server.url, seconds=WHILE, headers=given, data=b"[]")
    (request,) = server.requests
    assert "content-type: text/plain" in request
    assert "Content-Type" not in request


@pytest.mark.usefixtures("_unhurried")
@pytest.mark.parametrize("status", [303, 307])
@pytest.mark.parametrize("is_other", [False, True])
def test_a_body_that_is_redirected(serve, status, is_other):
    """307 keeps it, 303 does not; another origin is not given it."""
    there = serve(say(HEAD, EVENT, hold=True))
    to = there.url if is_other else ""
    moved = f"HTTP/1.1 {status} Moved\r\nLocation: {to}/b\r\n\r\n".encode()
    here = serve(
        lambda conn, request: conn.sendall(HEAD + EVENT if " /b " in request else moved)
    )
    observation = doctor.examine(f"{here.url}/a", seconds=WHILE, data=b"[1]")
    last = (there if is_other else here).requests[-1]
    is_kept = status == 307 and not is_other
    assert last.startswith("POST /b " if is_kept else "GET /b ")
    assert ("application/json" in last) == is_kept
    assert observation.has_dropped_headers == is_other


def test_the_cures_name_what_is_ours():
    """The keepalive by its argument; a renderer where REST framework answers 406."""
    found = judge(seen(arrivals=(Arrival(0.01, 5, 0, 1), burst(1, 1))))
    assert "keepalive=15.0" in found[0].cure
    found = judge(seen(head=head(status=406)))
    assert "REST framework" in found[0].cure


@pytest.mark.usefixtures("_unhurried")
def test_redirects(serve):
    """Redirects are followed; another origin is not given the user's headers."""
    there = serve(say(HEAD, EVENT, hold=True))
    location = f"Location: {there.url}/b\r\n\r\n".encode()
    here = serve(
        lambda conn, request: conn.sendall(
            b"HTTP/1.1 301 Moved\r\nLocation: /b?\xc3\xa4\r\n\r\n"
            if request.startswith("GET /a ")
            else b"HTTP/1.1 307 Moved\r\n" + location
        )
    )
    secret = [("Authorization", "secret")]
    observation = doctor.examine(f"{here.url}/a", seconds=WHILE, headers=secret)
    assert observation.url == f"{there.url}/b"
    assert [status for status, _ in observation.redirects] == [301, 307]
    assert all("secret" in request for request in here.requests)
    assert here.requests[1].startswith("GET /b?%C3%A4 ")
    assert not any("secret" in request for request in there.requests)
    (finding,) = judge(observation)
    assert finding.name == "redirect"
    assert "not sent to the other origin" in finding.text


@pytest.mark.usefixtures("_unhurried")
def test_a_redirect_to_nobody(serve):
    """Where the last address cannot be reached, there is no connection."""
    url = f"http://127.0.0.1:{free_port()}/"
    answer = f"HTTP/1.1 302 Found\r\nLocation: {url}\r\n\r\n".encode()
    observation = doctor.examine(serve(say(answer)).url, seconds=1)
    findings = judge(observation)
    assert [f.name for f in findings] == ["connection", "redirect"]
    assert checks.exit_status(observation, findings) == 2


@pytest.fixture(scope="module")
def certified(tmp_path_factory):
    """Return the files of a certificate for example.com, and its key."""
    return certificate(tmp_path_factory.mktemp("tls"), "example.com")


@pytest.mark.usefixtures("_unhurried")
def test_tls(serve, certified):
    """A certificate that is not trusted is named; --insecure takes it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certified)
    server = serve(say(HEAD, EVENT, hold=True), context)
    url = server.url.replace("http:", "https:")
    refused = doctor.examine(url, seconds=1)
    (finding,) = judge(refused)
    assert "not trusted: self-signed certificate" in finding.text.replace(
        "self signed", "self-signed"
    )
    assert "--insecure" in finding.cure
    assert checks.exit_status(refused, [finding]) == 2
    taken = doctor.examine(url, seconds=WHILE, insecure=True)
    assert judge(taken) == []
    assert taken.events == 1


@pytest.mark.parametrize("hold", [True, False])
def test_no_tls(serve, hold, monkeypatch):
    """https to a port that speaks none is named, also if it says nothing at all."""
    monkeypatch.setattr(doctor, "CONNECT", 0.3)
    done = threading.Event()

    def answer(conn, request):
        conn.sendall(b"" if hold else b"HTTP/1.1 400 Bad\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept():
            conn, _ = server.accept()
            with conn:
                answer(conn, "")
                done.wait(10)

        thread = threading.Thread(target=accept)
        thread.start()
        url = f"https://127.0.0.1:{server.getsockname()[1]}"
        observation = doctor.examine(url, seconds=0.3)
        done.set()
        thread.join()
    (finding,) = judge(observation)
    assert finding.name == "tls"
    assert "http://" in finding.cure


def unresolved(*args, **options):
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def test_no_name(monkeypatch):
    """A name without an address, and a resolver that never answers."""
    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    (finding,) = judge(doctor.examine("http://nowhere.invalid/"))
    assert "nowhere.invalid has no address: Name or service" in finding.text
    monkeypatch.setattr(doctor, "CONNECT", 0.05)
    done = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **o: done.wait(10) and [])
    (finding,) = judge(doctor.examine("http://nowhere.invalid/"))
    done.set()
    assert "no answer in time" in finding.text


def test_nobody_answers(monkeypatch):
    """A port whose queue is full does not answer: that takes its time, and no more."""
    monkeypatch.setattr(doctor, "CONNECT", 0.3)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        address = full.getsockname()
        with socket.create_connection(address):  # fills the queue
            observation = doctor.examine(f"http://127.0.0.1:{address[1]}", seconds=9)
    (finding,) = judge(observation)
    assert "did not answer in time" in finding.text
    assert checks.exit_status(observation, [finding]) == 2


# --- The command, on a real server --------------------------------------------------


@pytest.fixture(scope="module")
def server():
    with LiveServer("gunicorn-gthread", "tests.apps.doctor_app:app") as server:
        yield server


LIVE_CASES = {
    "good": (0, [], ["comments    1", "retry       1000 ms", "healthy"]),
    "ndjson": (0, [], ["application/x-ndjson"]),
    "finished": (0, [], [f'the last is "{END_ID}"', "with its end mark"]),
    "html": (1, ["content-type", "cache-control"], ["text/html"]),
    "bare": (1, ["cache-control", "x-accel-buffering"], []),
    "gzip": (1, ["gzip"], ["held back", "compression gzip"]),
    "silent": (1, ["silent"], ["first byte  none"]),
    "length": (1, ["content-length"], []),
    "failing": (1, ["cut"], ["without its end mark"]),
    "missing": (1, ["status"], ["404 Not Found"]),
}


@pytest.mark.parametrize(
    ("path", "status", "names", "texts"),
    [(path, *case) for path, case in LIVE_CASES.items()],
    ids=LIVE_CASES,
)
def test_live(server, capsys, path, status, names, texts):
    """Good streams are healthy, bad ones have their finding."""
    assert main(["doctor", f"{server.url}/{path}", "--seconds", "1.5"]) == status
    out = capsys.readouterr().out
    assert set(names) <= set(re.findall(r"\[([a-z.0-9-]+)\]$", out, re.M)), out
    words = re.sub("\n +", " ", out)  # unwrapped
    assert all(text in words for text in texts), out
    assert ("fault:" in out) == status


def test_live_buffering(server, capsys):
    """A buffer on the way is found, by where its pieces end."""
    url = f"{server.url}/buffered"
    assert main(["doctor", url, "--seconds", "5"]) == 1
    out = capsys.readouterr().out
    assert "[buffering]" in out
    assert "(after 5000 bytes)" in " ".join(out.split())
    assert "[head-withheld]" in out


@pytest.fixture
def nginx(server, tmp_path):
    """Return the address of an nginx before the server, which is set up badly."""
    command = program("nginx", "nginx-light")
    port = free_port()
    temporary = "".join(
        f"{name}_temp_path {tmp_path}/{name};"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {tmp_path}/pid; events {{}}\n"
        f"http {{ access_log off; {temporary} server {{ listen 127.0.0.1:{port};\n"
        f"location / {{ proxy_pass {server.url}; }}\n"
        "location /deaf/ { proxy_ignore_headers X-Accel-Buffering;\n"
        f"  proxy_pass {server.url}/; }}\n"
        "location /gzip/ { gzip on; gzip_types text/event-stream; gzip_proxied any;\n"
        f"  proxy_pass {server.url}/; }} }} }}\n"
    )
    log = tmp_path / "log"
    process = subprocess.Popen(
        [command, "-e", log, "-c", tmp_path / "nginx.conf"], stderr=subprocess.DEVNULL
    )

    def is_up():
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port)).close()
            return True
        return False

    try:
        await_true(is_up)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize(
    ("path", "seconds", "status", "expected"),
    [
        ("/good", "1", 0, []),
        ("/deaf/good", "5", 1, ["head-withheld", "buffering"]),
        ("/gzip/good", "1", 0, ["gzip"]),
    ],
)
def test_behind_nginx(nginx, capsys, path, seconds, status, expected):
    """nginx lets a good stream through; where it is told not to, that is found."""
    assert main(["doctor", nginx + path, "--seconds", seconds]) == status
    out = capsys.readouterr().out
    assert "(proxy: nginx)" in out
    assert re.findall(r"\[([a-z-]+)\]$", out, re.M) == expected, out
    assert ("proxy_buffering off" in " ".join(out.split())) == status


def test_what_is_sent(server, capsys):
    """--header and --last-event-id reach the server."""
    words = ["--header", "Cookie: a=b", "--last-event-id", "7"]
    assert main(["doctor", f"{server.url}/echo", "--seconds", "1", *words]) == 1
    assert "403 7 a=b text/event-stream" in capsys.readouterr().out


def test_the_command(capsys):
    """Nobody listens: one finding, status 2, and nothing but a line on stderr."""
    url = f"http://127.0.0.1:{free_port()}/"
    done = subprocess.run(
        [sys.executable, "-m", "syncstream", "doctor", url],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert done.returncode == 2
    assert "nothing listens on port" in done.stdout
    assert "cure: start the server" in done.stdout
    assert done.stderr == "syncstream: listening for 20 s\n"


def test_who_reads_has_seen_enough():
    """A pipe that is closed is no traceback."""
    command = [sys.executable, "-m", "syncstream", "doctor"]
    process = subprocess.Popen(
        [*command, f"http://127.0.0.1:{free_port()}/"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b"syncstream: listening for 20 s\n"
    assert process.wait(60) == 2


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["localhost:8000/events"], "must start with http:// or https://"),
        (["ftp://a/"], "must start with http:// or https://"),
        (["http:///a"], "must name a host"),
        (["http://a b/"], "must name a host"),
        (["http://a:99999/"], "is no address"),
        (["http://[a/"], "is no address"),
        (["http://a.." + "ü" * 70], "is no address"),
        (["http://me:secret@a/"], "must hold no password"),
        (["http://a/", "--header", "no colon"], "must be 'Name: value'"),
        (["http://a/", "--header", "a: b\r\nc: d"], "must be one line"),
        (["http://a/", "--last-event-id", "a\nb"], "must be one line"),
        (["http://a/", "--seconds", "0"], "must be seconds, above 0"),
        (["http://a/", "--seconds", "nan"], "must be seconds, above 0"),
        (["http://a/", "--seconds", "soon"], "must be seconds, above 0"),
        ([], "required: url"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_wrong_usage(words, reason, capsys):
    """What cannot be asked is refused with its reason, and status 2."""
    try:
        status = main(["doctor", *words])
    except SystemExit as error:
        status = error.code
    assert status == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert reason in captured.err
