"""Publishing from elsewhere: over HTTP, and from the command line."""

import io
import json
import subprocess
import sys
import tempfile
import traceback
from contextlib import closing
from urllib.parse import urlencode

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from werkzeug.test import Client, EnvironBuilder, run_wsgi_app
from werkzeug.wrappers import Response

from syncstream import Hub
from syncstream.__main__ import main
from syncstream.errors import Unavailable, Uncertain
from syncstream.publish import MAX_BODY, MAX_LINES, publish_app
from tests import ROOT

NDJSON = "application/x-ndjson"
TOKEN = {"Authorization": "Bearer secret"}


FUZZED = Hub(max_payload=30)  # in memory


def latin(text):
    """Return text as a server would: its bytes as characters."""
    return text.encode(errors="replace").decode("latin-1")


@pytest.fixture
def hub():
    hub = Hub(max_payload=1000)
    yield hub
    hub.close()


@pytest.fixture
def client(hub):
    return Client(publish_app(hub, token=["older", "secret"]), Response)


def post(client, path="/news", data=b"hello", headers=(), **options):
    return client.post(path, data=data, headers={**TOKEN, **dict(headers)}, **options)


def test_an_event_is_published(hub, client):
    """Its body is the data, whatever it is; the answer has its id."""
    with_events = hub.subscribe("news", "a:é")
    with_events.read(0)
    for data in ("hello", "", '{"a": 1}', "two\nlines", "é"):
        answer = post(client, data=data.encode())
        assert answer.status_code == 200
        (event,) = with_events.read(0)
        assert event.data == data
        assert answer.json["ids"][0] in str(event.id)
    answer = post(client, "/a:%C3%A9?event=ping&retry=5")
    (event,) = with_events.read(0)
    assert (event.event, event.data, event.retry) == ("ping", "hello", 5)


@pytest.mark.parametrize("name", ["x-ndjson", "ndjson", "jsonl", "x-jsonlines"])
def test_several_events_are_published_in_one_go(hub, client, name):
    """The JSON of one a line, as it stands."""
    subscription = hub.subscribe("news")
    subscription.read(0)
    lines = '{"a": 1}\n\n[2]\r\n"x"\n'
    kind = f"application/{name}; charset=utf-8"
    answer = post(client, data=lines.encode(), content_type=kind)
    assert len(answer.json["ids"]) == 3
    assert [e.data for e in subscription.read(0)] == ['{"a": 1}', "[2]", '"x"']


def test_an_empty_list_is_nobody_even_without_a_name(hub, client):
    """A view may have given somebody an empty tag."""
    with closing(hub.subscribe("news", tags=[""])) as nameless:
        nameless.begin()
        post(client, "/news?only=", b"1")
        post(client, "/news", b"2")
        assert [event.data for event in nameless.read(0)] == ["2"]


def test_tags_choose_who_gets_it(hub, client):
    """``only`` and ``exclude``, several of each."""
    a, b = (hub.subscribe("news", tags=[tag]) for tag in "ab")
    for subscription in (a, b):
        subscription.read(0)
    post(client, "/news?only=a&only=c", b"1")
    post(client, "/news?exclude=a", b"2")
    post(client, "/news?only=", b"3")  # an empty list is nobody
    assert [e.data for e in a.read(0)] == ["1"]
    assert [e.data for e in b.read(0)] == ["2"]


@pytest.mark.parametrize(
    ("path", "data", "options", "status", "text"),
    [
        ("/", b"x", {}, 400, "channel must be"),
        ("/a b", b"x", {}, 400, "channel must be"),
        ("/a:*", b"x", {}, 400, "channel must be"),
        ("/a", b"\xff", {}, 400, "UTF-8"),
        ("/a?retry=-1", b"x", {}, 400, "retry must be"),
        ("/a?event=a%0Ab", b"x", {}, 400, "event must"),
        ("/a", b"{}\n{", {"content_type": "application/x-ndjson"}, 400, "line 2"),
        ("/a", b"NaN", {"content_type": "application/x-ndjson"}, 400, "line 1"),
        ("/a", b"\n", {"content_type": "application/x-ndjson"}, 400, "one line"),
        ("/a?x=1", b"x", {}, 400, "the query may contain"),
        ("/a?retry=1&retry=2", b"x", {}, 400, "once"),
        ("/a?event=%FF", b"x", {}, 400, "UTF-8"),
        (f"/a?{'only=a&' * 1200}", b"x", {}, 400, "the query must have 8192"),
        ("/", b"x", {"environ_overrides": {"PATH_INFO": "/\xff"}}, 400, "UTF-8"),
        ("/a", b"\xef\xbb\xbf1", {"content_type": NDJSON}, 400, "line 1"),
        ("/a", b"1\n" * (MAX_LINES + 1), {"content_type": NDJSON}, 413, "lines"),
        ("/a", b"\n" * (MAX_LINES + 1), {"content_type": NDJSON}, 413, "lines"),
        ("/a", b"x" * 1001, {}, 413, "1000 bytes at most"),
        ("/a", b"x" * (MAX_BODY + 1), {}, 413, "bytes at most"),
    ],
)
def test_what_is_wrong_is_said(hub, client, path, data, options, status, text):
    """And nothing is published."""
    answer = post(client, path, data, **options)
    assert answer.status_code == status
    assert text in answer.json["error"]
    assert hub.stats()["published"] == 0


@pytest.mark.parametrize(
    ("data", "text"),
    [(b"[" * 100_000, "nested too deeply"), (b"9" * 5000, "digits at most")],
    ids=["deep", "digits"],
)
def test_json_that_python_cannot_read(data, text):
    """Is refused in a sentence, by a hub that takes events as large."""
    hub = Hub()
    try:
        client = Client(publish_app(hub, token="secret"), Response)
        answer = post(client, "/a", data, content_type=NDJSON)
        assert answer.status_code == 400
        assert text in answer.json["error"]
        assert hub.stats()["published"] == 0
    finally:
        hub.close()


@pytest.mark.parametrize(
    ("environ", "status"),
    [
        ({"CONTENT_LENGTH": "0" * 5000 + "1"}, 413),
        ({"CONTENT_LENGTH": "x"}, 400),
        ({"CONTENT_LENGTH": "-1"}, 400),
        ({"CONTENT_LENGTH": "9" * 5000}, 413),
        ({"CONTENT_LENGTH": "9"}, 400),
        ({"CONTENT_LENGTH": "", "HTTP_TRANSFER_ENCODING": "chunked"}, 411),
        ({"CONTENT_LENGTH": "9", "wsgi.input_terminated": True}, 400),
        ({"CONTENT_LENGTH": "3", "wsgi.input_terminated": True}, 400),
    ],
    ids=["zeros", "word", "negative", "huge", "short", "chunked", "left", "both"],
)
def test_bodies_of_a_wrong_length(hub, client, environ, status):
    """Are no empty events."""
    answer = post(client, environ_overrides=environ)
    assert answer.status_code == status
    assert hub.stats()["published"] == 0


@pytest.mark.parametrize(("more", "status"), [(b"", 200), (b"\n", 413)])
def test_a_chunked_body_is_not_cut_short(more, status):
    """What is beyond the limit refuses all of it."""
    line = b'"' + b"x" * (MAX_BODY // 32 - 3) + b'"\n'
    environ = {
        "CONTENT_LENGTH": "",
        "HTTP_TRANSFER_ENCODING": "chunked",
        "wsgi.input_terminated": True,
    }
    with closing(Hub()) as hub:
        client = Client(publish_app(hub, token="secret"), Response)
        body = line * 32 + more
        answer = post(
            client, "/a", body, content_type=NDJSON, environ_overrides=environ
        )
        assert answer.status_code == status
        assert hub.stats()["published"] == (32 if status == 200 else 0)


@pytest.mark.parametrize(
    "value",
    [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic c2VjcmV0", "Bearer secret2"],
)
def test_a_token_is_needed(hub, client, value):
    """For every method; what is not one tells nothing."""
    headers = {} if value is None else {"Authorization": value}
    for method in ("POST", "GET", "OPTIONS"):
        answer = client.open("/news", method=method, data=b"x", headers=headers)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert hub.stats()["published"] == 0


def test_other_methods(client):
    """Are refused."""
    answer = client.get("/news", headers=TOKEN)
    assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")


def test_each_token_will_do(client):
    """So that one can replace another."""
    answer = client.post("/a", headers={"Authorization": "Bearer older"}, data=b"x")
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("error", "status"), [(Unavailable("down"), 503), (Uncertain("lost"), 504)]
)
def test_a_broker_that_is_down(hub, client, monkeypatch, error, status):
    """Whether to try again can be told."""

    def publish(items, *, connection=None):
        raise error

    monkeypatch.setattr(hub.broker, "publish", publish)
    answer = post(client)
    assert answer.status_code == status
    assert ("Retry-After" in answer.headers) is (status == 503)


def test_a_hub_that_is_closed(hub, client):
    """Is a server about to stop, and no mistake of who posts."""
    hub.close()
    answer = post(client)
    assert answer.status_code == 503
    assert "Retry-After" in answer.headers


def often(usual, other):
    """Return what is right three times of four: all wrong at once is soon refused."""
    return st.integers(0, 3).flatmap(lambda n: other if n == 3 else usual)


@settings(max_examples=150)
@given(
    path=often(st.sampled_from(["/news", "/a:b"]), st.text(max_size=8)),
    query=often(
        st.lists(
            st.tuples(
                st.sampled_from(["event", "only", "exclude"]), st.text(max_size=5)
            ),
            max_size=3,
        ).map(urlencode),
        st.text(max_size=20) | st.integers().map("retry={}".format),
    ),
    body=often(
        st.lists(st.sampled_from([b"1\n", b"{}\r\n", b"\n", b'"x"\n'])).map(b"".join),
        st.binary(max_size=40)
        | st.lists(st.sampled_from([b"[", b"NaN"])).map(b"".join),
    ),
    kind=often(st.just(NDJSON), st.sampled_from(["text/plain", "", "a/b; x=", ";"])),
    length=often(st.none(), st.text(max_size=4) | st.integers().map(str)),
    token=often(st.just("Bearer secret"), st.text(max_size=8)),
)
def test_whatever_is_posted(path, query, body, kind, length, token):
    """Is answered in JSON: nothing that comes from outside is an error of ours."""
    environ = EnvironBuilder(method="POST", input_stream=io.BytesIO(body)).get_environ()
    environ |= {
        "PATH_INFO": latin(path),
        "QUERY_STRING": latin(query),
        "CONTENT_TYPE": kind,
        "CONTENT_LENGTH": str(len(body)) if length is None else latin(length),
        "HTTP_AUTHORIZATION": latin(token),
    }
    chunks, status, _ = run_wsgi_app(publish_app(FUZZED, token="secret"), environ)
    assert status < "500"
    answer = json.loads(b"".join(chunks))
    assert answer.keys() == ({"ids"} if status == "200 OK" else {"error"})


@pytest.mark.parametrize(
    ("token", "error"), [("", ValueError), ([], ValueError), ([5], TypeError)]
)
def test_wrong_tokens(hub, token, error):
    """Are refused where the application is made."""
    with pytest.raises(error, match="token must"):
        publish_app(hub, token=token)


# The command line.


@pytest.fixture
def url():
    with tempfile.TemporaryDirectory(prefix="ss-") as folder:  # short, for sockets
        yield f"local:{folder}/events"


def test_the_command_publishes(url, capsys):
    """To all processes that have the same hub; it prints the id."""
    hub = Hub(url)
    try:
        assert main(["publish", url, "news", "hello", "--event", "ping"]) == 0
        id = capsys.readouterr().out.strip()
        (event,) = hub.subscribe("news", after="start").read(10)
        assert (event.data, event.event, event.id) == ("hello", "ping", id)
    finally:
        hub.close()


@pytest.mark.parametrize(
    ("options", "expected"), [([], ["a\n\nb"]), (["--lines"], ["a", "", "b"])]
)
def test_the_command_reads(url, capsys, monkeypatch, options, expected):
    """What stands on standard input, whole or line by line."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\n\nb")))
    assert main(["publish", url, "news", "-", *options]) == 0
    assert len(capsys.readouterr().out.split()) == len(expected)
    hub = Hub(url)
    try:
        found = hub.subscribe("news", after="start").read(10)
        assert [event.data for event in found] == expected
    finally:
        hub.close()


DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    ("options", "data", "expected", "status", "text"),
    [
        (["--lines"], b"a\nb\xff\nc\n", ["a"], 2, "line 2: data must be UTF-8"),
        (["--lines"], b"a\n" + b"b" * (1 << 20), ["a"], 2, "line 2: an event must"),
        (["--lines"], b"a\n" + b"b" * (2 << 20), ["a"], 2, "line 2: data must have"),
        (["--lines"], b"a\r\n" + DEEP, ["a", DEEP.decode()], 0, ""),
        ([], b"\xff", [], 2, "data must be UTF-8"),
        ([], b"b" * (2 << 20), [], 2, "data must have 1048576 bytes at most"),
    ],
    ids=["UTF-8", "framed", "long", "deep", "whole UTF-8", "whole long"],
)
def test_lines_that_cannot_be_published(
    url, capsys, monkeypatch, options, data, expected, status, text
):
    """The error names the line; those before it are stored, their ids printed."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert main(["publish", url, "news", "-", *options]) == status
    out, err = capsys.readouterr()
    assert text in err
    assert len(out.split()) == len(expected)
    hub = Hub(url)
    try:
        found = hub.subscribe("news", after="start").read(10 if expected else 0)
        assert [event.data for event in found] == expected
    finally:
        hub.close()


def test_ids_that_nobody_reads(url):
    """A closed pipe is no traceback: what was stored is said."""
    command = [sys.executable, "-m", "syncstream", "publish", url, "news", "-"]
    with subprocess.Popen(
        [*command, "--lines"], stdin=-1, stdout=-1, stderr=-1, cwd=ROOT
    ) as process:
        process.stdout.close()
        process.stdin.write(b"a\nb\n")
        process.stdin.close()
        told = process.stderr.read().decode()
    assert told == (
        "syncstream: line 1: the event is stored, but its id cannot be printed\n"
    )
    assert process.returncode == 3


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["memory:", "a", "x"], 2, "memory:"),
        (["nothing:", "a", "x"], 2, "url must"),
        (["local:", "a b", "x"], 2, "channel must"),
        (["local:", "a", "x", "--lines"], 2, "--lines"),
        (["local:", "a", "\udcff"], 2, "data must be UTF-8"),
        (["redis://127.0.0.1:1", "a", "x"], 1, ""),
    ],
)
def test_what_is_wrong_with_a_command(words, status, text, capsys):
    """Is said, and the status tells whether to try again."""
    assert main(["publish", *words]) == status
    out, err = capsys.readouterr()
    assert not out
    assert text in err
    assert err.startswith("syncstream: ")


def test_no_escape_sequence_gets_to_the_terminal(capsys):
    """An error's text may come from a server, or hold a name from outside."""
    url = "local:/\x1b[31m\x9b31m/missing"  # short, as a socket's path has to be
    assert main(["publish", url, "a", "b"]) == 1
    told = capsys.readouterr().err
    assert r"\x1b[31m\x9b31m/missing" in told
    assert told.removesuffix("\n").isprintable()


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://app:s3cr3t@h/x",
        "app:s3cr3t@h",
        "http://[s3cr3t",
        "s3cr3t",
        "local://app:s3cr3t@h",
    ],
)
def test_no_password_of_a_url_is_shown(url, capsys):
    """Neither in the error, nor in what it is chained to, nor by the command."""
    with pytest.raises(ValueError, match="url must") as caught:
        Hub(url)
    assert "s3cr3t" not in "".join(traceback.format_exception_only(caught.value))
    assert caught.value.__context__ is None
    assert main(["publish", url, "a", "b"]) == 2
    assert "s3cr3t" not in "".join(capsys.readouterr())


def test_the_answer_is_json(client):
    """Whatever it says."""
    for answer in (post(client), client.get("/")):
        assert answer.mimetype == "application/json"
        assert json.loads(answer.get_data())
