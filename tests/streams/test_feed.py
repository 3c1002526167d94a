"""Sources that need no thread: whatever is a `Feed`, not subscriptions alone."""

import threading

import pytest

from syncstream.channels.options import Failed
from syncstream.errors import Closed, Unavailable
from syncstream.streams.contract import is_feed
from tests.support.pairs import Line, serve, stream_of


class Frames:
    """A feed's chunks, of some events each."""

    def __init__(self, chunks):
        self.chunks, self.events = iter(chunks), 0

    def __next__(self):
        for chunk in self.chunks:
            self.events += chunk.count(b"\n\n")
            return chunk
        raise Closed("kicked")


class Source:
    """A feed that has all of its events from the beginning."""

    begins_with_user_code = False

    def __init__(self, chunks=(), begin=None):
        self.chunks, self.failure = chunks, begin
        self.begun = self.closed = 0
        self.reader = None

    def begin(self):
        self.begun += 1
        if self.failure is not None:
            raise self.failure

    def step(self):
        raise AssertionError("it does not leave its thread")

    def frames(self, is_events, dumps, scope):
        return Frames(self.chunks if is_events else ())

    def detach(self, waiter):
        raise AssertionError("it does not leave its thread")

    def count(self, events):
        raise AssertionError("its frames count for themselves")

    def __iter__(self):
        raise AssertionError("its frames are what is read")

    def close(self):
        self.closed += 1


def test_what_is_a_feed():
    """By what it can do: generators and lists are none."""
    assert is_feed(Source())
    assert not is_feed(iter(()))
    assert not is_feed([])


def test_a_feed_is_sent_from_its_thread(caplog):
    """The loop serves subscriptions: all others stay, and end as subscriptions do."""
    source = Source([b"data: a\n\ndata: b\n\n", b"data: c\n\n"])
    stream = stream_of(source, Line())
    assert not stream.may_leave
    with caplog.at_level("DEBUG", "syncstream.stream"):
        *chunks, last = serve(stream)
    assert chunks == [b": ok\n\n", *source.chunks]
    assert last.startswith(b"retry: ")  # and comes back
    assert (stream.reason, source.begun, source.closed) == ("kicked", 1, 1)
    assert "3 events" in caplog.messages[-1]


@pytest.mark.parametrize(
    "failure",
    [Unavailable("down"), Closed("denied"), KeyError, Failed(Unavailable("theirs"))],
)
def test_a_feed_that_cannot_begin(failure, caplog):
    """It waits for its broker; or has ended, or failed, before its first chunk."""
    source = Source([b"data: a\n\n"], begin=failure)
    stream, chunks = stream_of(source, Line()), []
    try:
        chunks += serve(stream)
    except ConnectionResetError:
        assert not isinstance(failure, Unavailable | Closed)
    begins = isinstance(failure, Unavailable)
    assert (b"data: a\n\n" in chunks) == begins
    is_denied = isinstance(failure, Closed)
    reason = "kicked" if begins else "denied" if is_denied else "error"
    assert (stream.reason, source.closed) == (reason, 1)
    # The application's own error is told as it was raised.
    assert ("Unavailable: theirs" in caplog.text) == isinstance(failure, Failed)


def test_a_feed_has_one_response():
    """A second one is an error at once, and leaves it to the first, whatever it is."""
    source = Source([b"data: a\n\n"])
    first, second, third = (stream_of(source) for _ in range(3))
    first.connect(Line())
    with pytest.raises(RuntimeError, match="a subscription has one reader"):
        second.connect(Line())
    second.close()
    third.close()  # as the answer to HEAD does
    assert source.closed == 0
    assert b"data: a\n\n" in serve(first)
    assert source.closed == 1


class Contended(Source):
    """A feed whose second response comes just when the first one takes it."""

    def __init__(self, *words):
        self.between, self._reader = None, None
        super().__init__(*words)

    @property
    def reader(self):
        return self._reader

    @reader.setter
    def reader(self, reader):
        between, self.between = self.between, None
        if between is not None:
            thread = threading.Thread(target=between)
            thread.start()
            thread.join()
        self._reader = reader


@pytest.mark.parametrize("second_one", ["is served", "is closed"])
def test_a_feed_has_one_response_of_two_at_once(second_one):
    """Whichever gets it, the other does nothing with it."""
    source, story = Contended([b"data: a\n\n"]), []
    first, second = stream_of(source), stream_of(source)

    def comes_too():
        if second_one == "is closed":
            second.close()  # as the answer to HEAD does
            return
        try:
            second.connect(Line())
        except RuntimeError as error:
            story.append(str(error))

    source.between = comes_too
    first.connect(Line())
    assert source.closed == 0
    assert len(story) == (second_one == "is served")
    second.close()
    assert source.closed == 0
    assert b"data: a\n\n" in serve(first)
    assert source.closed == 1


@pytest.mark.parametrize("closes", [False, True])
def test_a_failure_that_an_end_overtakes_is_logged(caplog, closes):
    """Between the failure and its report the opening leaves, which may take long."""
    stream = stream_of(Source(begin=KeyError("broken")), Line())
    chunks = iter(stream)
    assert next(chunks) == b": ok\n\n"
    if closes:
        stream.close()
    else:
        stream.stop()
        assert list(chunks) == []
    del chunks
    assert stream.reason == "closed"
    said = ["the source of GET '/test' failed at its end (closed)"]
    assert caplog.messages == said
