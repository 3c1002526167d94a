"""Capacity: who gets a place, what the others are told, and every place comes back."""

import gc
import logging
import random
import threading
import time

import pytest
from werkzeug.test import Client, EnvironBuilder

from syncstream import NDJSONResponse, SSEResponse, StreamMiddleware
from syncstream.runtime.process import stats
from syncstream.streams.capacity import Capacity
from tests.support.pairs import Threads, check_script
from tests.support.waits import TIMEOUT, await_true

PLACE = Threads()
EVENTS = [("Content-Type", "text/event-stream")]


pytestmark = pytest.mark.usefixtures("own_record")


def capacity(**options):
    names = ("max_streams", "reserve_threads", "limit_by", "max_per_key")
    return Capacity(*(options.get(name) for name in names))


@pytest.mark.parametrize("limit", [1, 3, None])
def test_places_are_exact(limit):
    """20 threads come and go: never one too many, none is lost."""
    places = capacity(max_streams=limit)
    held, most, refused = [], [], []

    def work():
        for _ in range(300):
            place = places.admit({}, lambda: None)
            if place is None:
                refused.append(1)
                continue
            held.append(1)
            most.append(len(held))
            held.pop()
            place.release()
            place.release()

    for join in [PLACE.start(work) for _ in range(20)]:
        join()
    assert places.count == 0
    assert limit is None or max(most) <= limit
    assert len(most) + len(refused) == 6000
    all_free = [places.admit({}, lambda: None) for _ in range(limit or 5)]
    assert None not in all_free
    if limit:
        assert places.admit({}, lambda: None) is None


def test_each_has_its_own_places():
    """So many for a key; those without a key count in all only."""
    places = capacity(limit_by=lambda environ: environ["who"], max_per_key=2)
    taken = [places.admit({"who": who}, lambda: None) for who in "abab"]
    assert None not in taken
    assert places.admit({"who": "a"}, lambda: None) is None
    assert places.admit({"who": None}, lambda: None)
    taken[0].release()
    taken[0].release()
    assert places.admit({"who": "a"}, lambda: None)
    assert places.admit({"who": "a"}, lambda: None) is None


def test_keys_are_exact_and_forgotten():
    """20 threads, five keys; afterwards nothing is left of them."""
    places = capacity(limit_by=lambda e: e["who"], max_per_key=2, max_streams=7)
    held, too_many = {who: [] for who in "abcde"}, []

    def work():
        for _ in range(300):
            who = random.choice("abcde")
            place = places.admit({"who": who}, lambda: None)
            if place is not None:
                held[who].append(1)
                if len(held[who]) > 2 or sum(map(len, held.values())) > 7:
                    too_many.append(1)
                held[who].pop()
                place.release()

    for join in [PLACE.start(work) for _ in range(20)]:
        join()
    assert too_many == []
    assert (places.count, places.counts) == (0, {})


def test_one_release_from_two_threads():
    """Gives one place back."""
    places = capacity(max_streams=2)
    for _ in range(200):
        first, second = (places.admit({}, lambda: None) for _ in range(2))
        for join in [PLACE.start(first.release), PLACE.start(first.release)]:
            join()
        assert places.count == 1
        second.release()


@pytest.mark.parametrize(
    ("threads", "admitted"), [(None, 9), (8, 5), (4, 1), (3, 0), (1, 0)]
)
def test_threads_are_reserved(threads, admitted):
    """What the server has, less three; no limit where it has none."""
    places = capacity(reserve_threads=3, max_streams=9)
    got = [places.admit({}, lambda: threads) for _ in range(12)]
    assert sum(place is not None for place in got) == admitted


def test_who_leaves_waits_for_who_leaves(monkeypatch):
    """Of 50 subscribers on 3 threads none is refused, and none waits for one that
    stays; nor does a generator wait."""
    monkeypatch.setattr(
        "syncstream.streams.capacity.MOMENT", 60
    )  # on a busy machine, too
    places = capacity(reserve_threads=1)
    held, most = [], []

    def work():
        place = places.admit({}, lambda: 4, leaves=True)
        assert place
        held.append(1)
        most.append(len(held))
        PLACE.pause()
        assert places.admit({}, lambda: 2) is None
        held.pop()
        place.leave_thread()

    for join in [PLACE.start(work) for _ in range(50)]:
        join()
    assert (places.threads, places.leaving) == (0, 0)
    assert max(most) <= 3
    stays = [places.admit({}, lambda: 4, leaves=leaves) for leaves in (0, 1, 1)]
    for place in stays:
        place.stay()
        place.stay()
    start = time.monotonic()
    assert places.admit({}, lambda: 4, leaves=True) is None
    assert time.monotonic() - start < 60
    for place in stays:
        place.release()
    assert (places.threads, places.leaving, places.count) == (0, 0, 50)


@pytest.mark.parametrize("how", ["leaves", "stays", "neither"])
def test_how_long_a_subscriber_waits(how, monkeypatch):
    """Until another one has left its thread, or is known to stay, or for a moment."""
    monkeypatch.setattr(
        "syncstream.streams.capacity.MOMENT", 0.02 if how == "neither" else 60
    )
    places = capacity(reserve_threads=1)
    first = places.admit({}, lambda: 2, leaves=True)
    join = PLACE.start(lambda: places.admit({}, lambda: 2, leaves=True))
    await_true(lambda: places.waiters)
    if how == "leaves":
        first.leave_thread()
    elif how == "stays":
        first.stay()
    assert (join() is None) == (how != "leaves")


def test_a_subscriber_in_a_greenlet_waits_in_its_hub():
    """The others of the hub go on, the one that it waits for too."""
    pytest.importorskip("gevent")
    assert check_script(IN_A_HUB) == ""


IN_A_HUB = """
import gevent
from syncstream.streams.capacity import Capacity

places = Capacity(None, 1, None, None)

def subscribe():
    place = places.admit({}, lambda: 2, leaves=True)
    assert place
    gevent.sleep(0.01)
    place.leave_thread()

greenlets = [gevent.spawn(subscribe) for _ in range(20)]
gevent.joinall(greenlets, timeout=10, raise_error=True)
assert all(greenlet.successful() for greenlet in greenlets), greenlets
"""


def test_a_thread_is_given_back_before_its_place():
    """Who is handed over holds no thread, but a place still."""
    places = capacity(reserve_threads=3, max_streams=3)
    first, second = (places.admit({}, lambda: 4) for _ in range(2))
    assert first is not None
    assert second is None
    first.leave_thread()
    second, third, fourth = (places.admit({}, lambda: 5) for _ in range(3))
    assert None not in (second, third)
    assert fourth is None
    for place in (first, second, third):
        place.release()
        place.leave_thread()
    assert (places.count, places.threads) == (0, 0)


@pytest.mark.parametrize("key", [[], {}])
def test_a_key_that_cannot_be_one_takes_no_place(key):
    """The error is the application's to see."""
    places = capacity(limit_by=lambda environ: key, max_per_key=1)
    with pytest.raises(TypeError):
        places.admit({}, lambda: None)
    assert (places.count, places.counts) == (0, {})


@pytest.mark.parametrize("value", [0, -1, 1.5, "1", True])
@pytest.mark.parametrize("name", ["max_streams", "reserve_threads", "max_per_key"])
def test_limits_that_are_none(name, value):
    """Said at construction, by name."""
    error = ValueError if type(value) is int else TypeError
    with pytest.raises(error, match=f"{name} must be"):
        StreamMiddleware(lambda *args: [], **{name: value})


def test_keys_and_their_limit_belong_together():
    """One without the other is a mistake."""
    for options in ({"limit_by": len}, {"max_per_key": 1}):
        with pytest.raises(ValueError, match="must be given together"):
            StreamMiddleware(lambda *args: [], **options)
    with pytest.raises(TypeError, match="limit_by must be callable"):
        StreamMiddleware(lambda *args: [], limit_by=1, max_per_key=1)


# Under the middleware.


class Answer:
    """What a server gets from an application, until it is closed."""

    def __init__(self, app, method="GET", headers=None, take=1, **more):
        environ = EnvironBuilder(method=method, headers=headers).get_environ()
        environ.update(more)
        self.statuses = []
        self.written = []
        self.app_iter = app(environ, self.start_response)
        self.chunks = iter(self.app_iter)
        self.body = [chunk for _, chunk in zip(range(take), self.chunks, strict=False)]

    def start_response(self, status, headers, exc_info=None):
        self.statuses.append(status)
        self.headers = {name.lower(): value for name, value in headers}
        return self.written.append

    def rest(self):
        self.body += self.chunks
        return b"".join(self.body)

    def close(self):
        close = getattr(self.app_iter, "close", None)
        if close is not None:
            close()


class Counted:
    """An application's iterable that says how it was treated."""

    def __init__(self, log, items=()):
        self.log = log
        self.items = iter(items)

    def __iter__(self):
        return self

    def __next__(self):
        self.log.append("next")
        return next(self.items)

    def close(self):
        self.log.append("close")


def ours(log):
    def app(environ, start_response):
        return SSEResponse(Counted(log, ["a"] * 99))(environ, start_response)

    return app


def hand_written(log):
    def app(environ, start_response):
        start_response("200 OK", EVENTS)
        return Counted(log, [b"data: a\n\n"] * 99)

    return app


def lazy(log):
    def app(environ, start_response):
        try:
            start_response("200 OK", EVENTS)
            log.append("runs")
            yield b"data: a\n\n"
            log.append("next")
            yield b"data: b\n\n"
        finally:
            log.append("close")

    return app


def ndjson(log):
    def app(environ, start_response):
        return NDJSONResponse(Counted(log, [1] * 99))(environ, start_response)

    return app


APPS = pytest.mark.parametrize("app", [ours, hand_written, lazy, ndjson])
EVENT_SOURCE = {"Accept": "text/event-stream", "Cache-Control": "no-cache"}


@APPS
@pytest.mark.parametrize("headers", [None, EVENT_SOURCE], ids=["plain", "EventSource"])
def test_one_too_many_is_refused(app, headers, caplog):
    """In its own terms; the source does not run, is closed once; its place stays."""
    logs = [[], [], []]
    number = iter(logs)
    limited = StreamMiddleware(lambda *args: app(next(number))(*args), max_streams=1)
    first = Answer(limited, headers=headers)
    second = Answer(limited, headers=headers)
    body = second.rest()
    second.close()
    length = second.headers["content-length"]
    assert int(length) == len(body)
    assert second.headers["cache-control"] == "no-store"
    if headers:
        assert second.statuses == ["200 OK"]
        assert second.headers["content-type"] == "text/event-stream"
        assert body.startswith(b"retry: ")
        assert 2000 <= int(body.split()[1]) <= 6000
    else:
        assert second.statuses == ["503 Service Unavailable"]
        assert 2 <= int(second.headers["retry-after"]) <= 6
    assert "next" not in logs[1]
    assert logs[1].count("close") == 1
    assert caplog.messages == [
        "a stream was refused, the limits of StreamMiddleware are reached: raise them,"
        " or add processes. Further refusals are logged at DEBUG"
    ]
    first.close()
    third = Answer(limited, headers=headers)
    assert third.statuses == ["200 OK"]
    assert "content-length" not in third.headers
    third.close()
    assert limited.capacity.count == 0
    assert len(caplog.messages) == 1


@APPS
@pytest.mark.parametrize("end", ["close", "exhausted", "dropped"])
def test_every_end_frees_the_place(app, end):
    """Closed, read to its end, or dropped by a server that forgets to close."""
    limited = StreamMiddleware(app([]), max_streams=1)
    for take in (0, 1, 3):
        answer = Answer(limited, take=take)
        assert answer.statuses in (["200 OK"], [])
        if end == "exhausted":
            answer.rest()
        if end != "dropped":
            answer.close()
        del answer
        gc.collect()
        assert limited.capacity.count == 0


def test_head_takes_no_place():
    """Nor does anything else without a body, nor what is no stream."""

    def plain(environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"plain"]

    def empty(environ, start_response):
        start_response("204 No Content", EVENTS)
        return []

    def sized(environ, start_response):
        start_response("200 OK", [*EVENTS, ("Content-Length", "0")])
        return []

    for app in (plain, empty, sized):
        limited = StreamMiddleware(app, max_streams=1)
        answers = [Answer(limited) for _ in range(3)]
        assert limited.capacity.count == 0
        for answer in answers:
            answer.close()
    for app in (ours, hand_written, lazy):
        log = []
        limited = StreamMiddleware(app(log), max_streams=1)
        answers = [Answer(limited, "HEAD") for _ in range(3)]
        assert limited.capacity.count == 0
        for answer in answers:
            assert answer.statuses == ["200 OK"]
            answer.close()
        assert log.count("close") == 3
        assert log.count("next") == 0


def test_head_is_answered_where_all_is_full():
    """By the headers that GET would have."""
    limited = StreamMiddleware(hand_written([]), max_streams=1)
    first = Answer(limited)
    second = Answer(limited, "HEAD")
    assert second.statuses == ["200 OK"]
    second.close()
    first.close()


@pytest.mark.parametrize("when", ["called", "first step"])
def test_an_application_that_fails_frees_its_place(when):
    """After start_response, before it has returned, or in its first step."""

    def fails(environ, start_response):
        start_response("200 OK", EVENTS)
        raise RuntimeError("broken")

    def fails_later(environ, start_response):
        start_response("200 OK", EVENTS)
        raise RuntimeError("broken")
        yield

    def fails_with_ours(environ, start_response):
        SSEResponse([])(environ, start_response)
        raise RuntimeError("broken")

    apps = (fails, fails_with_ours) if when == "called" else (fails_later,)
    for app in apps:
        limited = StreamMiddleware(app, max_streams=1)
        for _ in range(3):
            if when == "called":
                with pytest.raises(RuntimeError, match="broken"):
                    Answer(limited)
            else:
                answer = Answer(limited, take=0)
                with pytest.raises(RuntimeError, match="broken"):
                    list(answer.chunks)
                answer.close()
            gc.collect()
            assert limited.capacity.count == 0


@pytest.mark.parametrize("is_full", [False, True])
@pytest.mark.parametrize("second", ["error page", "stream"])
def test_start_response_called_twice(second, is_full):
    """For an error: the first call's place, or refusal, is taken back."""

    def app(environ, start_response):
        start_response("200 OK", EVENTS)
        try:
            raise RuntimeError("broken")
        except RuntimeError:
            import sys

            info = sys.exc_info()
            if second == "stream":
                start_response("200 OK", EVENTS, info)
                return iter([b"data: sorry\n\n"])
            headers = [("Content-Type", "text/plain"), ("Content-Length", "5")]
            start_response("500 Internal Server Error", headers, info)
            return [b"sorry"]

    limited = StreamMiddleware(app, max_streams=1)
    held = limited.capacity.admit({}, lambda: None) if is_full else None
    answer = Answer(limited)
    if second == "error page":
        assert limited.capacity.count == (1 if is_full else 0)
        assert answer.statuses[-1] == "500 Internal Server Error"
        assert answer.rest() == b"sorry"
    else:
        assert limited.capacity.count == 1
        assert answer.statuses[-1].startswith("503" if is_full else "200")
        assert (b"data: sorry\n\n" in answer.rest()) is not is_full
    answer.close()
    if held is not None:
        held.release()
    assert limited.capacity.count == 0


UNIX = ["", b"", (), "localhost", "<local>"]


@pytest.mark.parametrize("address", UNIX, ids=repr)
def test_an_empty_key_is_nobody_s_and_said_once(address, caplog):
    """On a Unix socket all have the same: none of them locks the others out."""
    limited = StreamMiddleware(
        ours([]), limit_by=lambda environ: environ["REMOTE_ADDR"], max_per_key=1
    )
    answers = [Answer(limited, REMOTE_ADDR=address) for _ in range(3)]
    assert [answer.statuses[0] for answer in answers] == ["200 OK"] * 3
    for answer in answers:
        answer.close()
    [record] = caplog.records
    assert "max_per_key limits no client" in record.message
    assert "ProxyFix" in record.message


@pytest.mark.parametrize("name", ["X-Forwarded-For", "Forwarded", "X-Real-IP"])
def test_a_proxy_s_address_is_said_once(name, caplog):
    """The key of all its clients: the refusal says what to count by."""
    limited = StreamMiddleware(
        ours([]), limit_by=lambda environ: environ["REMOTE_ADDR"], max_per_key=1
    )
    headers = {name: "203.0.113.9"}
    answers = [
        Answer(limited, headers=headers, REMOTE_ADDR="10.0.0.1") for _ in range(3)
    ]
    for answer in answers:
        answer.close()
    warnings = [r.message for r in caplog.records if "the proxy's" in r.message]
    assert len(warnings) == 1
    assert "ProxyFix" in warnings[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-Forwarded-For", "198.51.100.7, 203.0.113.9"),
        ("X-Real-IP", "203.0.113.9"),
        ("Forwarded", "for=203.0.113.9;proto=https"),
        ("Forwarded", 'for="[2001:db8::9]"'),
    ],
)
def test_a_client_s_address_is_no_proxy_s(name, value, caplog):
    """ProxyFix, or its like, has put into REMOTE_ADDR what the proxy reports."""
    address = "2001:db8::9" if "[" in value else "203.0.113.9"
    limited = StreamMiddleware(
        ours([]), limit_by=lambda environ: environ["REMOTE_ADDR"], max_per_key=1
    )
    headers = {name: value}
    answers = [Answer(limited, headers=headers, REMOTE_ADDR=address) for _ in range(2)]
    assert [answer.statuses[0][:3] for answer in answers] == ["200", "503"]
    for answer in answers:
        answer.close()
    assert "the proxy's" not in caplog.text


def test_other_keys_may_be_false():
    """A user's number 0 is a key as any other; so is a host by that name."""
    places = capacity(limit_by=lambda environ: environ["who"], max_per_key=1)
    for who in (0, "localhost", False):
        place = places.admit({"who": who}, lambda: None)
        assert place
        assert places.admit({"who": who}, lambda: None) is None
        place.release()


def test_a_limit_for_each_client():
    """The second of one client is refused, another client's is not."""
    limited = StreamMiddleware(
        ours([]), limit_by=lambda environ: environ.get("HTTP_WHO"), max_per_key=1
    )
    answers = [Answer(limited, headers={"Who": who}) for who in "aabb"]
    answers += [Answer(limited) for _ in range(3)]  # nobody's
    assert [answer.statuses[0][:3] for answer in answers] == [
        *("200", "503", "200", "503"),
        *("200", "200", "200"),
    ]
    for answer in answers:
        answer.rest()
        answer.close()
    assert limited.capacity.counts == {}


def test_what_was_refused_is_counted():
    """Streams of ours, by that reason."""
    limited = StreamMiddleware(ours([]), max_streams=1)
    answers = [Answer(limited) for _ in range(3)]
    for answer in answers:
        answer.close()
    ended = stats()["ended"]
    assert {reason: total["streams"] for reason, total in ended.items()} == {
        "refused": 2,
        "closed": 1,
    }


@APPS
def test_many_come_at_once(app, caplog):
    """40 threads, four places: four at most stream, and in the end all are free."""
    caplog.set_level(logging.INFO, "syncstream")
    limited = StreamMiddleware(app([]), max_streams=4)
    together, held, most, codes = threading.Barrier(40), [], [], []

    def client():
        together.wait(TIMEOUT)
        for _ in range(10):
            answer = Answer(limited)
            codes.append(answer.statuses[-1][:3])
            if codes[-1] == "200":
                held.append(1)
                most.append(limited.capacity.count)
                held.pop()
            answer.close()

    for join in [PLACE.start(client) for _ in range(40)]:
        join()
    assert max(most) <= 4
    assert len(codes) == 400
    assert limited.capacity.count == 0
    assert len(caplog.messages) <= 1


def test_a_lazy_application_that_delegates_gives_its_place_back():
    """It calls start_response in its first step, through a response of ours."""

    def app(environ, start_response):
        chunks = SSEResponse(["a"], end="reconnect")(environ, start_response)
        try:
            yield from chunks
        finally:
            chunks.close()

    client = Client(StreamMiddleware(app, max_streams=2))
    for _ in range(5):
        response = client.get("/")
        assert (response.status_code, response.data) == (200, b": ok\n\ndata: a\n\n")
        response.close()


def test_places_are_counted_one_at_a_time():
    """Two that come at once for the last place: one gets it."""
    counting, tried, places, looks = threading.Event(), threading.Event(), [], []

    class Slow:
        """Whose stream it is; to look up how many it has takes a moment."""

        def __hash__(self):
            looks.append(1)
            if len(looks) == 2:  # the first look is whether it is anybody's
                counting.set()
                tried.wait(0.1)
            return 1

    capacity = Capacity(1, None, lambda environ: environ["key"], 5)

    def admit(key):
        places.append(capacity.admit({"key": key}, lambda: None))

    thread = threading.Thread(target=admit, args=(Slow(),))
    thread.start()
    assert counting.wait(TIMEOUT)
    admit("another")
    tried.set()
    thread.join()
    assert len([place for place in places if place is not None]) == 1
