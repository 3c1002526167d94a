"""``end=`` with a last event of the application, and ``framed=`` text."""

import logging

import pytest

from syncstream import Event, Hub, SSEResponse, current_stream, sse
from syncstream.protocol.sse import Decoder
from syncstream.runtime.process import process
from tests.support.waits import await_true
from tests.wsgi.asking import ASK, get

BACK = {**ASK, "Last-Event-ID": "syncstream-end"}


@pytest.mark.parametrize(
    ("end", "last"),
    [
        (Event("[DONE]"), b"data: [DONE]\n\n"),
        (Event("", event="close"), b"event: close\ndata: \n\n"),
        ({"type": "message_stop"}, b'data: {"type":"message_stop"}\n\n'),
        ({"data": "x", "event": "bye"}, b"event: bye\ndata: x\n\n"),
        ("[DONE]", b"data: [DONE]\n\n"),
        (b"data: [DONE]\n\n", b"data: [DONE]\n\n"),
        (b"data: [DONE]\r\n\r\n", b"data: [DONE]\r\n\r\n"),
        (17, b"data: 17\n\n"),
    ],
    ids=repr,
)
def test_a_finished_stream_ends_with_the_applications_event(end, last):
    """For every client; an EventSource is told to stay away after it, too."""
    answer = get(SSEResponse(["a"], end=end))
    assert answer.data == b": ok\n\ndata: a\n\n" + last
    answer = get(SSEResponse(["a"], end=end), headers=ASK)
    assert answer.data == b": ok\ndata: a\n\n" + last + b"id: syncstream-end\n\n"
    assert get(SSEResponse(["a"], end=end), headers=BACK).status_code == 204


def fails():
    yield "a"
    raise RuntimeError("broken")


def stops(reason):
    yield "a"
    current_stream().stop(reason)
    yield "b"


@pytest.mark.parametrize("is_told", [True, False])
def test_a_failed_stream_lacks_it(is_told):
    """With or without an event that tells of the failure."""
    options = {"on_error": lambda error: "failed"} if is_told else {}
    response = SSEResponse(fails(), end=Event("[DONE]"), **options)
    found = b""
    try:
        for chunk in response.response:
            found += chunk
    except RuntimeError:
        assert not is_told
    response.close()
    assert b"data: a\n\n" in found
    assert b"DONE" not in found


@pytest.mark.parametrize(
    "reason", ["finished", "closed", "kicked", "denied", "shutdown"]
)
def test_only_a_normal_end_has_it(reason):
    """Not every end that the application decides."""
    answer = get(SSEResponse(stops(reason), end=Event("[DONE]")), headers=ASK)
    assert (b"DONE" in answer.data) is (reason == "finished")


WHOLE = "data: 1\n\n"
INCOMPLETE = [
    *("data: x", "data: x\n", "data: x\r", "data: x\r\n", "data:x\n: note\n"),
    *("data: x\n: no", "da|ta: x|\n", "data: x\r|\n", "data: x\n|: note\n"),
]


async def later(items):
    for item in items:
        yield item


@pytest.mark.parametrize("text", INCOMPLETE)
@pytest.mark.parametrize("kind", ["text", "bytes"])
@pytest.mark.parametrize("source", [iter, later])
def test_a_last_event_without_its_blank_line_gets_one(source, kind, text, caplog):
    """So that clients have it, and the end behind it; the log says so, once."""
    process().said.clear()
    items = [WHOLE, *text.split("|")]
    if kind == "bytes":
        items = [item.encode() for item in items]
    for headers in (ASK, {}):
        options = {"framed": kind == "text", "end": Event("[DONE]")}
        answer = get(SSEResponse(source(items), **options), headers=headers)
        assert b"".join(i.encode() if kind == "text" else i for i in items) in (
            answer.data
        )
        decoder = Decoder()
        events = decoder.feed(answer.data)
        assert [event.data for event in events] == ["1", "x", "[DONE]"]
        assert decoder.last_event_id == ("syncstream-end" if headers else None)
    said = "GET '/' ends with an event that has no blank line behind it"
    await_true(lambda: said in caplog.text)
    assert caplog.text.count(said) == 1


@pytest.mark.parametrize("text", [WHOLE, WHOLE + ": a\n", "data: x\r\r", ""])
def test_a_whole_event_gets_no_other_blank_line(text, caplog):
    """Nor a word in the log."""
    answer = get(SSEResponse([text], framed=True, end=Event("[DONE]")))
    assert answer.data == b": ok\n\n" + text.encode() + b"data: [DONE]\n\n"
    assert caplog.messages == []


@pytest.mark.parametrize("reason", ["finished", "closed", "shutdown"])
def test_half_an_event_of_a_source_that_is_stopped_stays_half(reason):
    """Its rest would have come: nothing of ours makes an event of it."""

    def source():
        yield "data: ha"
        current_stream().stop(reason)
        yield "lf\n\n"

    response = SSEResponse(source(), framed=True, end=Event("[DONE]"))
    answer = get(response, headers=ASK)
    assert answer.data == b": ok\ndata: ha"


def test_what_on_error_says_is_completed_too():
    """Text of the application's that lacks its blank line."""

    def source():
        yield WHOLE
        raise RuntimeError("broken")

    framed = {"framed": True, "on_error": lambda error: "event: error\ndata: x\n"}
    answer = get(SSEResponse(source(), **framed), headers=ASK)
    events = Decoder().feed(answer.data)
    assert [(event.data, event.event) for event in events][1:] == [("x", "error")]


@pytest.mark.parametrize(
    ("end", "error"),
    [
        ("never", "end must be 'stop', 'reconnect' or an event, got 'never'"),
        ("Stop", "use Event.'Stop'."),
        (b"", "for which nothing is sent"),
        (b"data: x\n", "a whole event with its blank line"),
        (Event(event="close"), "an event with data"),
        (Event.comment("over"), "an event with data"),
        (Event(retry=5), "an event with data"),
        (True, "got True"),
        (False, "got False"),
        (3j, "cannot encode builtins.complex as JSON"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("make", [lambda **options: SSEResponse([], **options), sse])
def test_a_bad_end_is_refused_where_it_is_given(make, end, error):
    """What is no event, and what is probably a slip."""
    with pytest.raises((TypeError, ValueError), match=error):
        make(end=end)


def test_an_end_is_encoded_by_the_responses_encoder():
    """As each item of the source is."""
    answer = get(SSEResponse([], end={"a": 1}, dumps=lambda value: "mine"))
    assert answer.data == b": ok\n\ndata: mine\n\n"


def test_a_subscription_that_finishes_ends_with_it():
    """Its application may stop it as finished."""
    hub = Hub()
    subscription = hub.subscribe("a")
    response = SSEResponse(subscription, end=Event("[DONE]"), handover=False)
    chunks = iter(response.response)
    assert next(chunks) == b": ok\n\n"
    hub.publish("a", "1")
    assert b"data: 1\n\n" in next(chunks)
    response.response.stop("finished")
    assert list(chunks) == [b"data: [DONE]\n\n"]


# Framed text.

TEXT = "event: a\ndata: 1\n\ndata: \N{SNOWMAN}\n\n"


class Text(str):
    """As an enum's text is: its `__str__` shows something else."""

    def __str__(self):
        return "other"


@pytest.mark.parametrize(
    ("items", "sent"),
    [
        ([TEXT], TEXT),
        ([TEXT[:10], TEXT[10:]], TEXT),
        ([Text(TEXT)], TEXT),
        (["data: a\r\n\r\n", b"data: b\n\n"], "data: a\r\n\r\ndata: b\n\n"),
        ([":\n\n", ": mine\n\n", ""], ":\n\n: mine\n\n"),
        (["data: a\n\n", {"n": 1}], 'data: a\n\ndata: {"n":1}\n\n'),
        (["data: a\n\n", Event("b"), None, 5], "data: a\n\ndata: b\n\ndata: 5\n\n"),
    ],
    ids=repr,
)
def test_framed_text_is_sent_as_it_is(items, sent):
    """Other items are events as ever."""
    answer = get(SSEResponse(items, framed=True), headers=ASK)
    end = b"id: syncstream-end\n\n"
    assert answer.data == b": ok\n" + sent.encode() + end


def test_keepalives_come_between_framed_events_only():
    """An event may come in several pieces."""
    items = ["data: a", None, "\n", None, "\n", None, "data: b\n\n"]
    response = SSEResponse(items, framed=True, keepalive=1e-9)
    expected = b": ok\n\ndata: a\n\n: keepalive\n\ndata: b\n\n"
    assert get(response).data == expected


def test_text_that_means_nothing_is_told_of(caplog, own_record):
    """As bytes are that no client takes for an event."""
    assert get(SSEResponse(['{"a": 1}'], framed=True)).data
    assert "no client takes for an event" in caplog.text


@pytest.mark.parametrize(("framed", "is_told"), [(True, False), (False, True)])
def test_framed_text_is_told_of_where_it_is_data(framed, is_told, caplog, own_record):
    """With the cure: ``framed=True``. It is sent as data all the same."""
    caplog.set_level(logging.WARNING)
    answer = get(SSEResponse(["data: a\n\n"], framed=framed))
    assert (b"data: data: a" in answer.data) is is_told
    assert ("framed=True" in caplog.text) is is_told


def test_framed_text_that_utf8_lacks_is_thrown_at_its_yield():
    """So the traceback shows the line."""
    seen = []

    def source():
        try:
            yield "data: \ud800\n\n"
        except ValueError as error:
            seen.append(error)

    assert get(SSEResponse(source(), framed=True)).data
    assert len(seen) == 1


@pytest.mark.parametrize("framed", [1, None, "yes"])
def test_framed_is_a_bool(framed):
    """Neither a number nor a text."""
    with pytest.raises(TypeError, match="framed must be True or False, got"):
        SSEResponse([], framed=framed)
