"""`syncstream.sources`: sources that are made of other sources."""

import asyncio
import contextlib
import gc
import itertools
import queue
import subprocess
import sys
import threading
import time

import pytest

from syncstream import (
    ClientDisconnected,
    Closed,
    Event,
    Hub,
    SSEResponse,
    current_stream,
)
from syncstream.runtime.backoff import Backoff
from syncstream.sources import batched, retrying
from syncstream.testing import Client
from tests import ROOT

SOON = (0.001, 0.002)  # seconds between attempts
LONG = 60.0  # seconds that no test waits


@pytest.fixture
def hub():
    with contextlib.closing(Hub()) as hub:
        yield hub


def data(events):
    return [event.data for event in events]


async def listed(source):
    return [item async for item in source]


class Upstream:
    """Five numbered events, whose source breaks where the test says so.

    Attributes:
        asked: The last event id of each attempt.
        closed: How often a source was closed.
    """

    def __init__(self, *breaks, error=ConnectionError):
        self.breaks, self.error = list(breaks), error
        self.asked, self.closed, self.caught = [], [], []

    def _events(self, id):
        self.asked.append(id)
        end = self.breaks.pop(0) if self.breaks else 5
        yield from (Event(n, id=n) for n in range(int(id or 0) + 1, end + 1))
        if end < 5:
            raise self.error(end)

    def make(self, id):
        try:
            for event in self._events(id):
                try:
                    yield event
                except ValueError as error:
                    self.caught.append(error)
                    raise
        finally:
            self.closed.append(id)

    async def amake(self, id):
        try:
            for event in self._events(id):
                try:
                    yield event
                except ValueError as error:
                    self.caught.append(error)
                    raise
                await asyncio.sleep(0)
        finally:
            self.closed.append(id)


def read(upstream, kind, **options):
    """Read it all by attempts, in either way."""
    options = {"on": ConnectionError, "backoff": SOON, **options}
    if kind == "plain":
        return list(retrying(upstream.make, **options))
    return asyncio.run(listed(retrying(upstream.amake, **options)))


both = pytest.mark.parametrize("kind", ["plain", "async"])


# retrying


@both
def test_it_resumes_after_the_last_event(kind):
    """Nothing is lost or doubled; each source is closed, once, before the next one."""
    upstream = Upstream(2, 2, 4)
    assert data(read(upstream, kind)) == [1, 2, 3, 4, 5]
    assert upstream.asked == upstream.closed == [None, "2", "2", "4"]


@both
def test_it_begins_where_it_is_told(kind):
    upstream = Upstream()
    assert data(read(upstream, kind, last_event_id="3")) == [4, 5]
    assert upstream.asked == ["3"]


@both
def test_it_gives_up_after_failures_in_a_row(kind):
    """The last error itself is raised, and each one before it was told."""
    upstream, told = Upstream(1, 1, 2, 2, 2, 2), []
    with pytest.raises(ConnectionError) as caught:
        read(upstream, kind, attempts=3, on_error=told.append)
    assert caught.value.args == (2,)
    # 1 came, and 2 came: each begins a new row.
    assert upstream.asked == [None, "1", "1", "2", "2"]
    assert len(told) == 4


@both
@pytest.mark.parametrize(
    ("error", "on"),
    [(LookupError, ConnectionError), (lambda _: Closed("kicked"), Exception)],
    ids=["of another kind", "a subscription's end"],
)
def test_it_raises_others_at_once(kind, error, on):
    upstream = Upstream(2, error=error)
    with pytest.raises((LookupError, Closed)):
        read(upstream, kind, on=on)
    assert upstream.asked == [None]


@pytest.mark.parametrize("kind", [ClientDisconnected, GeneratorExit, KeyboardInterrupt])
def test_ends_are_never_retried(kind):
    upstream = Upstream(2, error=kind)
    with pytest.raises(kind):
        read(upstream, "plain", on=Exception)
    assert upstream.asked == upstream.closed == [None]


def test_errors_of_making_a_source_are_retried():
    answers = iter([ConnectionError(), ConnectionError(), ["a"]])

    def make(id):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def amake(id):
        return Upstream().amake("4")

    assert list(retrying(make, on=ConnectionError, backoff=SOON)) == ["a"]
    assert data(asyncio.run(listed(retrying(amake, on=OSError)))) == [5]


class Handle:
    """An iterable that is closed, as a response is; its iterator, too."""

    def __init__(self, items, closed, error=None):
        self.items, self.closed, self.error = items, closed, error

    def __iter__(self):
        return Handle(iter(self.items), self.closed, self.error)

    def __next__(self):
        for item in self.items:
            return item
        if self.error is not None:
            raise self.error
        raise StopIteration

    def close(self):
        self.closed.append("iterator" if hasattr(self.items, "__next__") else "source")


def test_an_iterable_is_closed_after_its_iterator():
    closed = []
    sources = [Handle([1], closed, OSError()), Handle([2], closed)]
    items = retrying(lambda id: sources.pop(0), on=OSError, backoff=SOON)
    assert list(items) == [1, 2]
    assert closed == ["iterator", "source"] * 2


def test_an_error_of_closing_after_the_end_is_not_retried():
    """The source has finished: another attempt would double its events."""
    made = []

    class Source:
        def __iter__(self):
            return iter([1])

        def close(self):
            raise OSError("close")

    def attempt(id):
        made.append(id)
        return Source()

    with pytest.raises(OSError, match="close"):
        list(retrying(attempt, on=OSError, backoff=SOON))
    assert made == [None]


@both
def test_closing_closes_the_source_once(kind):
    upstream = Upstream()
    if kind == "plain":
        items = retrying(upstream.make, on=OSError)
        next(items)
        items.close()
        items.close()
    else:

        async def run():
            items = retrying(upstream.amake, on=OSError)
            await anext(items)
            await items.aclose()
            await items.aclose()

        asyncio.run(run())
    assert upstream.closed == [None]


@both
def test_the_consumers_errors_are_not_retried(kind):
    """They are raised at the source's yield, which may catch them."""
    upstream, error = Upstream(), ValueError("cannot be encoded")

    def throw():
        items = retrying(upstream.make, on=Exception)
        next(items)
        items.throw(error)

    async def athrow():
        items = retrying(upstream.amake, on=Exception)
        await anext(items)
        await items.athrow(error)

    with pytest.raises(ValueError, match="cannot be encoded") as caught:
        throw() if kind == "plain" else asyncio.run(athrow())
    assert caught.value is error
    assert upstream.caught == [error]
    assert upstream.asked == upstream.closed == [None]


@both
def test_the_clients_leaving_ends_the_wait(kind):
    upstream, waits = Upstream(1), threading.Event()
    options = {"on": OSError, "backoff": (LONG, LONG)}
    make = upstream.make if kind == "plain" else upstream.amake
    items = retrying(make, on_error=lambda error: waits.set(), **options)
    with Client(SSEResponse(items)).stream("GET", "/") as stream:
        assert data(stream.events(1)) == ["1"]
        assert waits.wait(LONG)
        began = time.monotonic()
        stream.disconnect()
        assert time.monotonic() - began < 2
        assert stream.reason == "disconnected"
    assert upstream.asked == upstream.closed == [None]


def test_waits_grow():
    """From the first to the longest; none is the same for all that wait."""
    backoff = Backoff(1.0, 8.0)
    for low, high in [(1, 1.25), (1, 2), (2, 4), (4, 8), (4, 8)]:
        backoff.fail()
        found = [backoff.seconds() for _ in range(50)]
        assert low <= min(found) < max(found) <= high
    backoff.reset()
    assert backoff.seconds() <= 1.25


@pytest.mark.parametrize(
    ("item", "id"),
    [
        (Event("a", id="7"), "7"),
        ({"data": "a", "id": 7}, "7"),
        (type("Record", (), {"data": "a", "id": "7"})(), "7"),
        ({"data": "a", "id": 7, "more": 1}, None),
        ({"id": 7}, None),
        (Event("a"), None),
        (Event("a", id=""), None),
        ("text", None),
        (b"id: 7\n\n", None),
        (7, None),
        ([7], None),
    ],
)
def test_ids_of_items(item, id):
    """The id is that of which the client is told."""
    asked = []

    def make(last):
        asked.append(last)
        yield item
        if len(asked) == 1:
            raise OSError

    assert list(retrying(make, on=OSError, backoff=SOON)) == [item, item]
    assert asked == [None, id]


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (Upstream().make(None), {}, "cannot be begun again"),
        (list, {"on": GeneratorExit}, "on must be a subclass of Exception"),
        (list, {"on": ()}, "on must be"),
        (list, {"attempts": 0}, "attempts must be 1 or more"),
        (list, {"attempts": True}, "attempts must be an int"),
        (list, {"backoff": 1}, "backoff must be"),
        (list, {"backoff": (2, 1)}, "backoff must be"),
        (list, {"last_event_id": 7}, "last_event_id must be a str"),
        (list, {"on_error": listed}, "on_error must be a plain function"),
    ],
)
def test_wrong_arguments_of_retrying(make, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        retrying(make, **{"on": OSError, **options})


def test_a_lambda_around_an_asynchronous_source():
    items = retrying(lambda id: Upstream().amake(id), on=OSError)
    with pytest.raises(TypeError, match=r"functools\.partial"):
        next(items)


# batched


@both
def test_lists_of_at_most_max(kind):
    """The rest comes at the end; the source is closed once."""
    upstream = Upstream()
    if kind == "plain":
        lists = list(batched(upstream.make(None), max=2))
    else:
        lists = asyncio.run(listed(batched(upstream.amake(None), max=2)))
    assert [data(found) for found in lists] == [[1, 2], [3, 4], [5]]
    assert upstream.closed == [None]


@both
def test_an_error_comes_after_the_rest(kind):
    upstream, lists = Upstream(3), []

    def read():
        for found in batched(upstream.make(None), max=2):
            lists.append(data(found))

    async def aread():
        async for found in batched(upstream.amake(None), max=2, within=LONG):
            lists.append(data(found))

    with pytest.raises(ConnectionError):
        read() if kind == "plain" else asyncio.run(aread())
    assert lists == [[1, 2], [3]]
    assert upstream.closed == [None]


def test_a_queue():
    """What is there is joined; what is held goes when its time is over."""
    items = queue.Queue()
    for n in range(5):
        items.put(n)
    lists = batched(items, max=3, within=0.05)
    assert next(lists) == [0, 1, 2]
    began = time.monotonic()
    assert next(lists) == [3, 4]
    assert 0.05 <= time.monotonic() - began < 1
    lists.close()
    items.put(5)


@pytest.mark.skipif(sys.version_info < (3, 13), reason="queues have no shutdown")
def test_a_queue_that_is_shut_down():
    items = queue.Queue()
    items.put(1)
    items.shutdown()
    assert list(batched(items, max=3, within=LONG)) == [[1]]


def test_a_steady_trickle_is_not_held():
    """The time counts from the first event of a list, not from the last one."""
    items = queue.Queue()
    stop = threading.Event()

    def trickle():
        while not stop.wait(0.02):
            items.put(time.monotonic())

    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        first, *_ = next(batched(items, max=1000, within=0.1))
        assert time.monotonic() - first < 1
    finally:
        stop.set()
        thread.join()


def test_a_subscription(hub):
    """A page of many events makes several lists, and its end comes after the rest."""
    hub.publish_many("a", [str(n) for n in range(5)])
    subscription = hub.subscribe("a", after="start")
    lists = batched(subscription, max=3, within=0.05)
    assert data(next(lists)) == ["0", "1", "2"]
    assert data(next(lists)) == ["3", "4"]
    subscription = hub.subscribe("a", after=1)
    lists = batched(subscription, max=3, within=LONG)
    timer = threading.Timer(0.05, subscription.close, ["kicked"])
    timer.start()
    assert data(next(lists)) == ["4"]
    with pytest.raises(Closed, match="kicked"):
        next(lists)
    timer.join()


def test_closing_a_batch_closes_a_subscription(hub):
    """Also if it was never read, as for a HEAD request."""
    subscription = hub.subscribe("a")
    lists = batched(subscription, max=3, within=1)
    lists.close()
    lists.close()
    assert subscription.reason == "closed"


@both
def test_closing_closes_what_has_not_begun_once(kind):
    closed = []

    class Source:
        def __aiter__(self):
            raise AssertionError

        async def aclose(self):
            closed.append("source")

    async def run():
        lists = batched(Source(), max=2, within=1)
        await lists.aclose()
        await lists.aclose()

    if kind == "plain":
        lists = batched(Handle([1], closed), max=2)
        lists.close()
        lists.close()
    else:
        asyncio.run(run())
    assert closed == ["source"]


def test_a_batch_that_is_dropped_closes_its_source():
    """It refers to nothing that refers to it."""
    upstream = Upstream()
    gc.disable()
    try:
        lists = batched(upstream.make(None), max=2)
        next(lists)
        del lists
        assert upstream.closed == [None]
    finally:
        gc.enable()


def test_the_time_of_an_asynchronous_source():
    """The source is not cancelled when the time is over, and keeps its task."""
    tasks = []

    async def slow():
        for n in range(3):
            tasks.append(asyncio.current_task())
            yield n
            await asyncio.sleep(0.1 if n else 0)

    async def run():
        return await listed(batched(slow(), max=3, within=0.05))

    assert asyncio.run(run()) == [[0, 1], [2]]
    assert len(set(tasks)) == 1


def test_its_stream_is_there_in_the_task_of_a_batch():
    """A source that is read in a task of its own finds its stream."""
    found = []

    async def source():
        found.append(current_stream())
        yield 1

    lists = batched(source(), max=2, within=LONG)
    with Client(SSEResponse(lists)).stream("GET", "/") as stream:
        assert data(stream.events()) == ["[1]"]
    assert found != [None]


def test_an_asynchronous_source_waits_for_its_reader():
    """It is at most ``max`` events ahead."""
    made = []

    async def fast():
        for n in itertools.count():
            made.append(n)
            yield n

    async def run():
        lists = batched(fast(), max=3, within=LONG)
        assert await anext(lists) == [0, 1, 2]
        await asyncio.sleep(0.01)
        assert len(made) <= 6
        await lists.aclose()

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["queue", "subscription", "async"])
def test_the_clients_leaving_ends_a_batch(kind, hub):
    """At once, with an event held; the event is dropped, the source closed."""
    ended = threading.Event()

    async def one():
        try:
            yield 1
            await asyncio.sleep(LONG)
        finally:
            ended.set()

    items = queue.Queue()
    items.put(1)
    hub.publish("a", 1)
    subscription = hub.subscribe("a", after="start")
    source = {"queue": items, "subscription": subscription, "async": one()}[kind]
    lists = batched(source, max=2, within=LONG)
    with Client(SSEResponse(lists)).stream("GET", "/") as stream:
        assert stream.lines(2) == [": ok", ""]
        began = time.monotonic()
        stream.disconnect()
        assert time.monotonic() - began < 2
        assert stream.reason == "disconnected"
    if kind == "subscription":
        assert subscription.reason is not None
    if kind == "async":
        assert ended.wait(LONG)


GEVENT = """
from gevent import monkey; monkey.patch_all()
import queue, time
import gevent
from syncstream.sources import batched, retrying

def make(id):
    if id is None:
        yield {"data": 1, "id": 1}
        raise OSError
    yield 2

items = queue.Queue()
items.put(1)
beats = []
def beat():
    while True:
        beats.append(1)
        gevent.sleep(0.005)
other = gevent.spawn(beat)
assert next(batched(items, max=2, within=0.05)) == [1]
assert list(retrying(make, on=OSError, backoff=(0.05, 0.1)))[1:] == [2]
assert len(beats) >= 4, beats
other.kill()
"""


def test_under_gevent():
    """Waits let the other greenlets run."""
    command = [sys.executable, "-X", "dev", "-c", GEVENT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("events", "options", "message"),
    [
        ([], {"max": 0}, "max must be 1 or more"),
        ([], {"max": 1.5}, "max must be an int"),
        ([], {"max": 1, "within": 1}, "have a thread put its events into a queue"),
        (queue.Queue(), {"max": 1, "within": 0}, "within must be positive"),
        ("text", {"max": 1}, "a single item is not a stream"),
        (Upstream().make, {"max": 1}, "it has not been called"),
    ],
)
def test_wrong_arguments_of_batched(events, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        batched(events, **options)
