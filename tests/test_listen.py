"""`syncstream listen`: what it prints, where, and its exit status."""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import json
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
from functools import partial

import pytest

from syncstream import Event
from syncstream import listen as module
from syncstream.__main__ import main
from syncstream.channels.gap import gap
from syncstream.client import EventSource
from tests import ROOT
from tests.support.raw_server import HEAD, RawServer, answer

pytestmark = pytest.mark.timeout(60)

END = answer(204, kind="")
TIME = r"\d\d:\d\d:\d\d\.\d{3}"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    source = partial(EventSource, backoff=(0.001, 0.002))
    monkeypatch.setattr(module, "EventSource", source)


def body(*events: Event) -> bytes:
    return answer(body=b"".join(bytes(event) for event in events))


def listen(server, *words):
    return main(["listen", server.url, *words])


FIRST = body(Event(retry=1), Event("a", id="é 1"), Event({"b": 1}, event="x"))
SECOND = body(Event.comment("beat"), Event("two\nlines", id=""))


def test_events_of_two_connections(capsys):
    """A line each, without colours in a pipe; the rest is on the standard error."""
    with RawServer([FIRST, SECOND, END]) as server:
        assert listen(server) == 0
    out, err = capsys.readouterr()
    assert re.sub(TIME, "TIME", out) == (
        "TIME  message  id é 1  a\n"
        'TIME  x  id é 1  {"b":1}\n'
        "TIME  message\n"
        "    two\n"
        "    lines\n"
    )
    assert err == (
        "-- connected\n"
        "-- retry: 1 ms\n"
        "-- the server has ended the response; reconnecting after id é 1\n"
        "-- connected again\n"
        "-- the server has ended the response; reconnecting\n"
        "-- the stream has ended\n"
    )
    ids = [request.headers.get("last-event-id") for request in server.requests]
    assert ids == [None, "é 1".encode().decode("latin-1"), None]


def test_json_lines(capsys):
    """One object an event, whose data are text as they came."""
    with RawServer([FIRST, SECOND, END]) as server:
        assert listen(server, "--json") == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"id": "é 1", "event": "message", "data": "a"},
        {"id": "é 1", "event": "x", "data": '{"b":1}'},
        {"id": "", "event": "message", "data": "two\nlines"},
    ]


def test_raw_bytes(capfdbinary):
    """In a pipe they are those of the stream, whatever they are."""
    odd = answer(body=b"data: \x1b[31m\xff\r\n\r\nunfinished", Server="a\x9bb")
    with RawServer([FIRST, odd, END]) as server:
        assert listen(server, "--raw") == 0
    out, err = capfdbinary.readouterr()
    assert out == FIRST.partition(b"\r\n\r\n")[2] + odd.partition(b"\r\n\r\n")[2]
    assert b"-- connected again to a" in err


def test_a_compressed_stream(capsys):
    """Is shown as text, raw too."""
    data = gzip.compress(b"data: a\n\n")
    with RawServer([answer(body=data, Content_Encoding="gzip"), END]) as server:
        assert listen(server, "--raw") == 0
    assert capsys.readouterr().out == "data: a\n\n"


def test_a_gap(capsys):
    """A hub's reset is an event, and is explained; another reset is an event alone."""
    events = gap("news", "lagged", "5"), Event("{", event="reset")
    with RawServer([body(*events), END]) as server:
        assert listen(server, "--json") == 0
    out, err = capsys.readouterr()
    assert out.count('"reset"') == 2
    assert err.count("gap") == 1
    assert "-- gap: events of news are missing (lagged)\n" in err


@contextlib.contextmanager
def terminal(monkeypatch, columns=80, **environ):
    """Make both outputs a terminal; yield a function that returns all it shows."""
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    shown, shows = os.openpty()
    fcntl.ioctl(shows, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def read():
        data = b""  # the terminal passes it on a bit later, and piece by piece
        while b"the stream has ended" not in data or not data.endswith(b"\n"):
            data += os.read(shown, 65536)
        return data.decode().replace("\r\n", "\n")

    with open(shows, "w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        monkeypatch.setattr(sys, "stderr", file)
        yield read
        monkeypatch.undo()
    os.close(shown)


def test_colours_on_a_terminal(monkeypatch):
    """Names, ids and times have one each, and a gap its own; notes are dim."""
    events = Event("a", id=1), gap("news", "unknown", "2")
    with RawServer([body(*events), END]) as server, terminal(monkeypatch) as read:
        assert listen(server) == 0
        shown = re.sub(TIME, "TIME", read())
    assert shown.startswith("\x1b[2m-- connected\x1b[0m\n")
    time = "\x1b[2mTIME\x1b[0m"
    assert f"{time}  \x1b[1;36mmessage\x1b[0m  \x1b[33mid 1\x1b[0m  a\n" in shown
    assert f"{time}  \x1b[1;31mreset\x1b[0m  \x1b[33mid 2\x1b[0m" in shown
    assert "\x1b[1;31m-- gap: events of news are missing (unknown)\x1b[0m" in shown


@pytest.mark.parametrize(
    ("environ", "is_coloured"),
    [
        ({"NO_COLOR": "1"}, False),
        ({"NO_COLOR": ""}, True),  # https://no-color.org/: if not empty
        ({"TERM": "dumb"}, False),
        ({"TERM": "xterm"}, True),
    ],
    ids=str,
)
def test_who_wants_no_colours(monkeypatch, environ, is_coloured):
    """NO_COLOR and a dumb terminal get none."""
    server = RawServer([body(Event("a")), END])
    with server, terminal(monkeypatch, **environ) as read:
        assert listen(server) == 0
        assert ("\x1b" in read()) == is_coloured


def test_long_json_is_indented(monkeypatch):
    """Where a line of the terminal is too short; other long text stays one line."""
    events = [Event({"a": [1]}), Event({"a": "b" * 40}), Event("c" * 60)]
    with (
        RawServer([body(*events), END]) as server,
        terminal(monkeypatch, columns=50, NO_COLOR="1") as read,
    ):
        assert listen(server) == 0
        lines = re.sub(TIME, "TIME", read()).splitlines()
    assert lines[1:-2] == [
        'TIME  message  {"a":[1]}',
        "TIME  message",
        "    {",
        f'      "a": "{"b" * 40}"',
        "    }",
        "TIME  message",
        "    " + "c" * 60,
    ]


@pytest.mark.parametrize("form", [[], ["--raw"]], ids=["pretty", "raw"])
def test_no_escape_sequence_gets_to_the_terminal(monkeypatch, form):
    """Data, names, ids and headers come from the server."""
    evil = "\x1b]0;x\x07\x9b31m"
    stream = f"event: {evil}\nid: {evil}\ndata: {evil}\ndata: é\tß\n\n".encode()
    wire = answer(body=stream, Server="\x9b31m")
    server = RawServer([wire, END])
    with server, terminal(monkeypatch, NO_COLOR="1") as read:
        assert listen(server, *form) == 0
        shown = read()
    assert re.sub(r"[\n\t]", "", shown).isprintable()
    assert shown.count(r"\x1b]0;x\x07\x9b31m") >= 3
    assert "é\tß" in shown


@pytest.mark.parametrize(
    ("wire", "status", "text"),
    [
        (body(Event("a")), 0, "-- the stream has ended"),
        (HEAD + b"data: a\n\n", 0, "-- the stream has ended"),
        (body(Event("a"))[:-1], 1, "syncstream: the response broke off"),
        (answer(500), 1, "syncstream: the server answered 500"),
    ],
    ids=["whole", "without a length", "cut", "500"],
)
def test_once(capsys, wire, status, text):
    """One request; the status tells whether its answer was whole."""
    with RawServer([wire]) as server:
        assert listen(server, "--once") == status
    assert len(server.requests) == 1
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wire", "text"),
    [
        (answer(404), "the server answered 404"),
        (answer(kind="text/html"), "its Content-Type is 'text/html'"),
        (answer(body=b"data: " + b"a" * (5 << 20)), "longer than 4194304 bytes"),
    ],
    ids=["404", "html", "too large"],
)
def test_what_fails_for_good(capsys, wire, text):
    """Is one line, and the status is 1."""
    with RawServer([wire]) as server:
        assert listen(server) == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("syncstream: ")
    assert text in last


def test_a_server_that_fails_now_and_then(capsys):
    """Is asked again."""
    with RawServer([answer(503), body(Event("a")), END]) as server:
        assert listen(server) == 0
    assert "-- the server answered 503; reconnecting\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["--data", '{"a": "é"}'], "application/json"),
        (["--data", "a=1"], "application/x-www-form-urlencoded"),
        (["--data", "x", "-H", "content-type: text/plain"], "text/plain"),
    ],
    ids=["json", "form", "text"],
)
def test_what_is_asked_by_post(words, kind):
    """The body goes with each request, under its type."""
    with RawServer([body(Event("a")), END]) as server:
        assert listen(server, *words) == 0
    assert [r.method for r in server.requests] == ["POST"] * 2
    assert {r.body for r in server.requests} == {words[1].encode()}
    assert {r.headers["content-type"] for r in server.requests} == {kind}


def test_what_is_asked():
    """Headers and the first id come from the command line."""
    with RawServer([END]) as server:
        words = ["-H", "Cookie: a=é", "--header", "X-B: c", "--last-event-id", "7"]
        assert listen(server, *words) == 0
    headers = server.requests[0].headers
    assert headers["cookie"].encode("latin-1").decode() == "a=é"
    assert (headers["x-b"], headers["last-event-id"]) == ("c", "7")
    assert headers["user-agent"].startswith("syncstream-listen/")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["ftp://a/"], "must start with http:// or https://"),
        (["http://me:secret@a/"], "must hold no password"),
        (["http://a/", "-H", "no colon"], "must be 'Name: value'"),
        (["http://a/", "-H", "A: 1", "-H", "a: 2"], "header a must be given once"),
        (["http://a/", "-H", "last-event-id: 2"], "needs --last-event-id"),
        (["http://a/", "--last-event-id", "a\nb"], "must not contain CR, LF"),
        (["http://a/", "--raw", "--json"], "not allowed with"),
        ([], "required: url"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_wrong_usage(words, text, capsys):
    """What cannot be asked is refused with its reason, and status 2."""
    try:
        status = main(["listen", *words])
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert text in err
    assert "secret" not in err


def test_without_requests(monkeypatch, capsys):
    """It says what to install."""
    monkeypatch.setitem(sys.modules, "requests", None)
    assert main(["listen", "http://127.0.0.1/"]) == 1
    assert capsys.readouterr().err == (
        "syncstream: EventSource needs the package requests,"
        " run pip install 'syncstream-wsgi[client]'\n"
    )


def endless(request, sock):
    sock.sendall(HEAD)
    with contextlib.suppress(OSError):
        while True:
            sock.sendall(b": beat\n\ndata: a\n\n")


@pytest.mark.parametrize("form", [[], ["--json"], ["--raw"]], ids=str)
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_closed_pipe(monkeypatch, form, name):
    """Its reader has seen enough: the command ends, and all is well."""
    reader, writer = os.pipe()
    os.close(reader)
    with RawServer(endless) as server, open(writer, "w") as file:
        monkeypatch.setattr(sys, name, file)
        assert listen(server, *form) == 0
        monkeypatch.undo()
    assert len(server.requests) == 1


@pytest.mark.parametrize("form", [[], ["--raw"]], ids=str)
def test_a_full_disk(monkeypatch, capsys, form):
    """Is a failure."""
    with RawServer(endless) as server, open("/dev/full", "w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        assert listen(server, *form) == 1
        monkeypatch.undo()
    assert "cannot be written: No space left on device" in capsys.readouterr().err


def test_no_output(monkeypatch, capsys):
    """A standard output that is closed from the start is a failure, too."""
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["listen", "http://127.0.0.1/"]) == 1
    assert "standard output is closed" in capsys.readouterr().err


def test_no_errors(monkeypatch, capsys):
    """Where the standard error is closed, notes and errors go nowhere else."""
    monkeypatch.setattr(sys, "stderr", None)
    with RawServer([body(Event("a")), answer(404)]) as server:
        assert listen(server, "--json") == 1
    assert capsys.readouterr().out.count("\n") == 1


def start(server, *words, **options):
    command = [sys.executable, "-m", "syncstream", "listen", server.url, *words]
    return subprocess.Popen(command, cwd=ROOT, **options)


def test_head():
    """`2>&1 | head -4`: status 0, and not a word more."""
    with RawServer(endless) as server:
        process = start(server, stdout=-1, stderr=subprocess.STDOUT)
        lines = [process.stdout.readline() for _ in range(4)]
        process.stdout.close()
        assert process.wait(30) == 0
    assert lines[0] == b"-- connected\n"
    assert all(line.endswith(b"  message  a\n") for line in lines[1:])


def test_ctrl_c():
    """Status 130, and no traceback, while the server is silent."""

    def silent(request, sock):
        sock.sendall(HEAD + b"data: a\n\n")
        server.wait_for_hang_up(sock)

    with RawServer(silent) as server:
        with start(server, "--json", stdout=-1, stderr=-1) as process:
            assert json.loads(process.stdout.readline())["data"] == "a"
            process.send_signal(signal.SIGINT)
            assert process.stderr.read() == b"-- connected\n"
            assert process.wait(30) == 130
        assert server.hung_up.wait(15)


@pytest.mark.parametrize("command", ["", "demo", "listen", "publish", "doctor"])
def test_help_teaches_by_examples(command, capsys, monkeypatch):
    """Each example is a command that exists, and the exit status is told."""
    with pytest.raises(SystemExit, match="0"):
        main([*command.split(), "--help"])
    text = capsys.readouterr().out
    examples = re.findall(r"^  (?:.*\| )?syncstream (.*)$", text, re.MULTILINE)
    assert len(examples) >= 4
    assert command in ("", *(example.split()[0] for example in examples))
    assert re.search("^Exit status", text, re.MULTILINE)
    for name in ("_demo", "_listen", "_publish", "_doctor"):
        monkeypatch.setattr(f"syncstream.__main__.{name}", lambda options: 42)
    for example in examples:
        words = shlex.split(re.split(r" [|<>] | {3,}", example)[0])
        assert main(words) == 42, example
