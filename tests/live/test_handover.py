"""Subscribers that leave their servers get what they got, and hold nothing there."""

import json
import os
import re
import signal
import statistics
import time
import zlib
from contextlib import ExitStack

import psutil
import pytest

from tests.apps.handover_app import JUNK
from tests.live.listener import Listener
from tests.soak.handover import (
    CHURNED,
    OPENING,
    OPTIONS,
    Asker,
    Crowd,
    await_return,
    await_state,
    churn,
    idle_cpu,
    leave,
    listen,
    serving,
    settled,
    state,
    warmed,
    wire,
)
from tests.support.live import TABLE, UNMARKED, unique_key
from tests.support.programs import certificate
from tests.support.waits import await_true

KINDS = (*TABLE, *OPTIONS)
GUNICORN = tuple(kind for kind in KINDS if kind.startswith("gunicorn"))
THREADED = "gunicorn-gthread", "gunicorn-gevent", "gunicorn-sync"
RETRY = re.compile(rb"retry: ([0-9]+)\n\n")


@pytest.fixture(scope="module", params=KINDS)
def server(request):
    """Each server in turn."""
    with serving(request.param) as server:
        server.name = request.param
        warm_up(server)
        yield server


@pytest.fixture(scope="module", params=THREADED)
def few(request):
    """One of each kind: threads, greenlets, and a single thread."""
    with serving(request.param, env={"DEBUG": "1"}) as server:
        server.name = request.param
        warm_up(server)
        yield server


def warm_up(server):
    """Let the loop, its worker and the watch be there."""
    churn(server, 4, workers=2, seed="warm")


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(request):
    """The process holds after a test what it held before, and has not complained."""
    for name in ("server", "few"):
        if name in request.fixturenames:
            server = request.getfixturevalue(name)
            await_state(server, lambda now: not now["open"])
            before, complaints = settled(server), server.tracebacks()
            break
    else:
        yield
        return
    yield
    await_state(server, lambda now: not now["open"] and now["fds"] <= before["fds"])
    expected = complaints + getattr(request.function, "complaints", 0)
    assert server.tracebacks() == expected, server.log()[-5000:]


@pytest.fixture
def channel():
    return unique_key()


@pytest.fixture
def asker(request):
    name = "server" if "server" in request.fixturenames else "few"
    with Asker(request.getfixturevalue(name)) as asker:
        yield asker


# What they get.


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_every_byte(server, asker, channel, version):
    """The opening, each event with its id, in the server's framing, and no more."""
    with Listener(server, f"/events/{channel}?retry=2500", version):
        pass  # the opening
    with Listener(server, f"/events/{channel}", version) as listener:
        for n in range(5):
            texts = [f"{channel} {n} {k}" for k in range(1 + n % 3)]
            listener.expect(wire(asker.publish(channel, texts), texts))
        head = bytes(listener.data).partition(b"\r\n\r\n")[0].lower()
        assert head.count(b"\r\nconnection: close") == 1
        is_framed = version == "1.1" and server.kind not in UNMARKED
        assert (b"transfer-encoding" in head) == is_framed


def test_resume(server, asker, channel):
    """From any id, by the header or the query; with what comes meanwhile."""
    texts = [f"{channel} {n}" for n in range(10)]
    ids = asker.publish(channel, texts)
    for n in (0, 4, 9):
        more = f"?last_event_id={ids[n]}" if n == 4 else ""
        given = {} if n == 4 else {"Last_Event_ID": ids[n]}
        with Listener(server, f"/events/{channel}{more}", **given) as listener:
            listener.expect(wire(ids[n + 1 :], texts[n + 1 :]))
            late = asker.publish(channel, ["late"])
            listener.expect(wire(late, ["late"]))
            ids, texts = [*ids, *late], [*texts, "late"]
    with Listener(server, f"/events/{channel}?after=2") as listener:
        listener.expect(wire(ids[-2:], texts[-2:]))


def test_a_reset(server, asker, channel):
    """For an id that nobody knows: then what is kept, or a snapshot."""
    texts = ["1", "2"]
    ids = asker.publish(channel, texts)
    path = f"/events/{channel}"
    with Listener(server, path, Last_Event_ID="abc") as listener:
        listener.await_text("2")
        (reset_id, name, data), *rest = listener.events()
        assert (name, json.loads(data)["reason"]) == ("reset", "unknown")
        assert [(id, text) for id, _, text in rest] == list(
            zip(ids, texts, strict=True)
        )
    with Listener(server, path, Last_Event_ID=reset_id) as listener:
        listener.expect(wire(ids, texts))
    with Listener(server, f"{path}?on_gap=snapshot", Last_Event_ID="abc") as listener:
        assert listener.await_text('{"snapshot":2}')[1:] == [
            '{"snapshot":1}',
            '{"snapshot":2}',
        ]
        late = asker.publish(channel, ["late"])
        listener.read_until(lambda body: body.endswith(wire(late, ["late"])))


def test_the_server_is_free(server, asker, channel):
    """Twenty streams are open; it answers others; then all get an event."""
    with ExitStack() as stack:
        here = [
            stack.enter_context(Listener(server, f"/events/{channel}"))
            for _ in range(20)
        ]
        for n in range(10):
            assert asker.ask(f"/plain?tag={n}") == str(n).encode()
        data = wire(asker.publish(channel, ["all"]), ["all"])
        for listener in here:
            listener.expect(data)
        now = state(server)
        assert (now["parked"], now["attached"]) == (20, 0)
        assert now["subscribers"] == 20


def test_who_announces_a_body_holds_no_thread(few, asker, channel):
    """A GET may have one; it is neither read nor waited for."""
    with ExitStack() as stack:
        for _ in range(10):  # more than there are threads
            path, headers = f"/events/{channel}", {"Content_Length": "1"}
            one = stack.enter_context(Listener(few, path, is_parked=False, **headers))
        await_state(few, lambda now: now["parked"] == 10 and not now["attached"])
        data = wire(asker.publish(channel, ["one"]), ["one"])
        one.expect(data)


@pytest.mark.parametrize("how", ["FIN", "RST", "bytes, FIN", "half-close"])
def test_who_leaves_is_known(server, channel, how):
    """At once, for its one reason; the callback runs once."""
    path = f"/events/{channel}?note={channel}&who=ann"
    times = []
    for _ in range(5):
        with Listener(server, path) as listener:
            began = time.monotonic()
            leave(listener.client.socket, how)
            reason = server.control.next(f"{channel}-closed")
            times.append(time.monotonic() - began)
            assert reason == "disconnected"
    assert statistics.median(times) < 0.5  # usually 0.002
    assert server.control.pending(f"{channel}-closed") == []
    with Asker(server) as asker:
        assert json.loads(asker.ask(f"/presence/{channel}")) == []


def test_kick_and_close_and_presence(server, asker, channel):
    """A word when to come back, and a whole response, for who does; who left is told.

    Whoever does not come back is cut.
    """
    path = f"/events/{channel}?note={channel}&announce=1"
    before = state(server)["ended"].get("kicked", {"streams": 0})["streams"]
    with (
        Listener(server, f"/events/{channel}") as watching,
        Listener(server, f"{path}&who=ann{channel}", is_source=True) as listener,
    ):
        watching.await_text(f'{{"who":"ann{channel}"}}')
        assert f"ann{channel}" in json.loads(asker.ask(f"/presence/{channel}"))
        assert asker.ask(f"/kick/ann{channel}") == b"1"
        rest, is_whole = listener.rest()
        assert RETRY.search(rest)
        assert is_whole == (server.kind not in UNMARKED)
        assert server.control.next(f"{channel}-closed") == "kicked"
        watching.read_until(lambda _: len(watching.events()) == 2)
        assert [name for _, name, _ in watching.events()] == ["join", "leave"]
    now = await_state(server, lambda now: not now["open"])
    assert now["ended"]["kicked"]["streams"] == before + 1


# What stays with its server.


def attached(server, path, asker, channel, **options):
    """Check a stream that has not left: it goes on as it was."""
    before = state(server)
    with server.connect() as client:
        client.request("GET", path, **options)
        if not path.startswith(("/gzip", "/large", "/ndjson")):
            assert client.block() == OPENING
            data = wire(asker.publish(channel, ["one"]), ["one"])
            assert client.block() == data
        now = await_state(server, lambda now: now["attached"] > before["attached"])
        assert now["parked"] == before["parked"]
        leave(client.socket, "FIN")
    await_state(server, lambda now: not now["open"])


ATTACHED = {
    "by the response": "/events/{}?handover=0",
    "by the environ": "/environ/events/{}",
    "by the middleware": "/middleware/events/{}",
    "by its length": "/length/events/{}",
}


@pytest.fixture(scope="module", params=[k for k in KINDS if k != "gunicorn-sync"])
def threaded(request):
    """Each server that has a second thread or greenlet to ask."""
    with serving(request.param) as server:
        yield server


@pytest.mark.parametrize("why", ATTACHED)
def test_what_stays(threaded, channel, why):
    """It was asked to; or the head says that it has an end."""
    with Asker(threaded) as asker:
        attached(threaded, ATTACHED[why].format(channel), asker, channel)
    assert threaded.tracebacks() == 0


def test_what_is_compressed_stays(threaded, channel):
    """What a middleware makes of it is the client's, whole."""
    with Asker(threaded) as asker, threaded.get(f"/gzip/events/{channel}") as client:
        data, found = zlib.decompressobj(wbits=31), b""
        while found != OPENING:
            found += data.decompress(client.chunk())
            assert OPENING.startswith(found)
        expected = OPENING + wire(asker.publish(channel, ["one"]), ["one"])
        while found != expected:
            found += data.decompress(client.chunk())
            assert expected.startswith(found)
        assert state(threaded)["parked"] == 0
    await_state(threaded, lambda now: not now["open"])
    assert threaded.tracebacks() == 0


def test_what_is_lengthened_stays(threaded, channel):
    """More than the opening is not what is known; all of it arrives."""
    with Asker(threaded) as asker, threaded.get(f"/large/events/{channel}") as client:
        expected = JUNK + OPENING
        found = client.chunk()
        while len(found) < len(expected):
            found += client.chunk()
        assert found == expected
        expected = JUNK + wire(asker.publish(channel, ["one"]), ["one"])
        found = client.chunk()
        while len(found) < len(expected):
            found += client.chunk()
        assert found == expected
    await_state(threaded, lambda now: not now["open"])


def test_lines_stay(threaded, channel):
    """NDJSON has nothing to begin with."""
    with Asker(threaded) as asker, threaded.get(f"/ndjson/{channel}") as client:
        await_state(threaded, lambda now: now["attached"] == 1)
        (id,) = asker.publish(channel, ["one"])
        client.read_head()
        assert json.loads(client.chunk()) == {"id": id, "data": "one"}
        assert state(threaded)["parked"] == 0
    await_state(threaded, lambda now: not now["open"])


def test_head(server, channel):
    """There is no stream, and the subscription has not begun."""
    with server.connect() as client:
        client.request("HEAD", f"/events/{channel}", headers={"Connection": "close"})
        client.read_head()
        assert client.status == 200
        # pywsgi and waitress mark the end of a body that there must not be.
        assert client.socket.recv(100) in (b"", b"0\r\n\r\n")
    assert state(server)["subscribers"] == 0


@pytest.mark.parametrize("kind", ["gunicorn-gthread", "gunicorn-gevent"])
def test_tls_stays(kind, channel, tmp_path):
    """Who has the keys is the server."""
    cert, key = map(str, certificate(tmp_path))
    with (
        serving(kind, "--certfile", cert, "--keyfile", key, tls=True) as server,
        Asker(server) as asker,
    ):
        attached(server, f"/events/{channel}", asker, channel)
        assert server.tracebacks() == 0


# How it ends with the server.

STOPS = {
    **dict.fromkeys(GUNICORN, "SIGTERM"),
    **dict.fromkeys(
        ("pywsgi", "werkzeug", "waitress", "cheroot", "runserver"), "SIGINT"
    ),
    "uwsgi": "SIGTERM",
}


@pytest.mark.parametrize("kind", STOPS)
def test_farewell(kind, channel, record_property):
    """Everybody is told when to come back; callbacks run; then the process ends."""
    with serving(kind, env={"DEBUG": "1"}) as server, ExitStack() as stack:
        # In the log: a process that ends has a second for all of them.
        path = f"/events/{channel}?say={channel}-closed"
        listeners = (Listener(server, path, is_source=True) for _ in range(20))
        here = [stack.enter_context(listener) for listener in listeners]
        process = psutil.Process(state(server)["pid"])
        server.signal_one(getattr(signal, STOPS[kind]))
        retries = set()
        for listener in here:
            rest, is_whole = listener.rest()
            if kind == "uwsgi":  # it does not always leave time for that
                assert not rest or RETRY.fullmatch(rest)
                continue
            retries.add(int(RETRY.fullmatch(rest)[1]))
            assert is_whole or kind in UNMARKED
        if kind == "uwsgi":
            record_property("cell", "most of the time")
            return
        if not kind.startswith("gunicorn"):
            record_property("cell", "on Ctrl-C")
        assert len(retries) > 5
        assert min(retries) >= 1000
        assert max(retries) <= 3000
        await_true(lambda: not is_running(process))
        for word in ("ended", f"{channel}-closed"):
            ends = re.findall(rf"{word}: (\w+)", server.log())
            assert ends == ["shutdown"] * 20, word


def is_running(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("kind", GUNICORN[:3])
@pytest.mark.parametrize("how", ["preload", "SIGHUP", "SIGKILL"])
def test_however_gunicorn_ends(kind, how, channel):
    """With --preload; told anew; or killed: clients see an end, and come back."""
    options = ["--preload"] if how == "preload" else []
    with serving(kind, *options) as server, ExitStack() as stack:
        path = f"/events/{channel}"
        listeners = (Listener(server, path, is_source=True) for _ in range(5))
        here = [stack.enter_context(listener) for listener in listeners]
        pid = state(server)["pid"]
        worker = psutil.Process(pid)
        if how == "SIGKILL":
            os.kill(pid, signal.SIGKILL)
        else:
            server.signal_one(signal.SIGTERM if how == "preload" else signal.SIGHUP)
        for listener in here:
            rest, is_whole = listener.rest()
            if how == "SIGKILL":
                assert (rest, is_whole) == (b"", False)
            else:
                assert RETRY.fullmatch(rest)
                assert is_whole
        if how != "preload":
            # It may answer still, and has a hub of its own.
            await_true(lambda: not is_running(worker))
            await_true(lambda: state_or_none(server, pid))
            with Listener(server, path) as listener, Asker(server) as asker:
                listener.expect(wire(asker.publish(channel, ["new"]), ["new"]))


def state_or_none(server, pid):
    """Return the state of a process that has taken the place of another."""
    try:
        now = state(server)
    except (OSError, EOFError):
        return None
    return now if now["pid"] != pid else None


# Options.


def test_all_options_at_once(few, asker, channel):
    """Tags, several channels, a throttle, keepalives: as with a thread."""
    base = f"/events/{channel},{channel}b"
    with (
        Listener(few, f"{base}?tags=vip&keepalive=0.3&throttle=0.05") as vip,
        Listener(few, f"/events/{channel}:*") as wild,
        Listener(few, f"{base}?keepalive=0.3") as other,
    ):
        for n in range(20):
            asker.publish(channel, [f"all {n}"])
            asker.publish(f"{channel}b", [f"vip {n}"], "?only=vip")
            asker.publish(f"{channel}b", [f"other {n}"], "?exclude=vip")
            asker.publish(f"{channel}:{n % 3}", [f"wild {n}"])
        asker.publish(channel, ["last"])
        for listener, names in ((vip, ["all", "vip"]), (other, ["all", "other"])):
            # In the order of each channel: the last one of all may come earlier.
            listener.read_until(lambda _, one=listener: len(one.texts()) >= 41)
            found = listener.texts()
            for name in names:
                mine = [text for text in found if text.startswith(name)]
                assert mine == [f"{name} {n}" for n in range(20)]
            assert len(found) == 41
            assert b": keepalive\n\n" not in listener.body
            count = listener.body.count(b": keepalive\n")
            listener.read_until(
                lambda body, most=count + 2: body.count(b": keepalive\n") >= most
            )
        wild.read_until(lambda _: len(wild.texts()) >= 20)
        assert sorted(wild.texts()) == sorted(f"wild {n}" for n in range(20))


def test_the_latest_of_each_key(few, asker, channel):
    """A client that is behind gets the newest of each."""
    with Listener(few, f"/events/{channel}?conflate=1&throttle=0.2") as listener:
        asker.publish(channel, [f"{'xy'[n % 2]} {n}" for n in range(50)])
        asker.publish(channel, [f"{'xy'[n % 2]} {n}" for n in range(50, 100)])
        found = listener.await_text("y 99")
        assert found[-2:] == ["x 98", "y 99"]
        assert len(found) < 20


def test_max_duration(few, channel):
    """In good order, at about the time, counted for that."""
    path = f"/events/{channel}?max_duration=0.5&note={channel}&retry=9000"
    with Listener(few, path, is_parked=False, is_source=True) as listener:
        rest, is_whole = listener.rest()
        assert int(RETRY.search(rest)[1]) >= 9000
        assert is_whole
    assert few.control.next(f"{channel}-closed") == "max_duration"


def test_who_may_not_go_on(few, asker, channel):
    """Asked again, the application says no: this client ends, others do not."""
    path = f"/events/{channel}?authorize=0.2&note={channel}&who="
    with (
        Listener(few, f"{path}bob{channel}") as bob,
        Listener(few, f"{path}eve{channel}", is_source=True) as eve,
    ):
        asker.ask(f"/deny/eve{channel}")
        rest, is_whole = eve.rest()
        assert RETRY.search(rest)
        assert is_whole
        assert few.control.next(f"{channel}-closed") == "denied"
        bob.expect(wire(asker.publish(channel, ["on"]), ["on"]))


def test_an_application_that_fails_later(few, asker, channel):
    """The client can tell; it is logged, once."""
    path = f"/events/{channel}?authorize=0.2&note={channel}&who="
    with Listener(few, f"{path}broken{channel}") as listener:
        asker.ask(f"/break/broken{channel}")
        _, is_whole = listener.rest()
        assert not is_whole
        assert few.control.next(f"{channel}-closed") == "error"
    few.await_log(f"ZeroDivisionError: broken{channel}")


test_an_application_that_fails_later.complaints = 1


def test_an_application_that_exits_later(few, asker, channel):
    """sys.exit() in what the worker runs ends that client, and nothing else."""
    path = f"/events/{channel}?authorize=0.2&note={channel}&who="
    with Listener(few, f"{path}exits{channel}") as listener:
        asker.ask(f"/deny/exits{channel}")
        listener.rest()
        assert few.control.next(f"{channel}-closed") == "error"
    with Listener(few, f"/events/{channel},{channel}b") as listener:
        asker.publish(channel, ["on"])
        listener.await_text("on")


test_an_application_that_exits_later.complaints = 1


def test_an_application_that_blocks(few, asker, channel):
    """The other clients of the loop get their events meanwhile."""
    who = f"blocks{channel}"
    path = f"/events/{channel}?authorize=0.2&note={channel}&who={who}"
    with (
        Listener(few, path) as blocked,
        Listener(few, f"/events/{channel}") as other,
    ):
        asker.ask(f"/deny/{who}")
        few.control.next(f"{who}-blocks")
        for n in range(5):
            other.expect(wire(asker.publish(channel, [str(n)]), [str(n)]))
        few.control.open(f"{who}-go")
        blocked.rest()
        assert few.control.next(f"{channel}-closed") == "denied"


def test_a_broker_that_is_down_for_a_while(few, asker, channel):
    """Its clients wait, and miss nothing."""
    with Listener(few, f"/events/{channel}") as listener:
        listener.expect(wire(asker.publish(channel, ["1"]), ["1"]))
        asker.ask("/down/yes")
        ids = asker.publish(channel, ["2", "3"])
        asker.ask("/down/no")
        listener.expect(wire(ids, ["2", "3"]))


def test_a_place_is_held_until_the_end(few, channel):
    """Of max_streams, and of each key's; given back when the client has left."""
    path = f"/three/events/{channel}"
    with ExitStack() as stack:
        here = [stack.enter_context(Listener(few, path)) for _ in range(3)]
        with few.get(path) as refused:
            refused.read_head()
            assert refused.status == 503
        leave(here[0].client.socket, "FIN")
        await_state(few, lambda now: now["open"] == 2)
        stack.enter_context(Listener(few, path))
    await_state(few, lambda now: not now["open"])
    path = f"/each/events/{channel}?who="
    with (
        Listener(few, f"{path}ann"),
        Listener(few, f"{path}bob"),
        few.get(f"{path}bob") as refused,
    ):
        refused.read_head()
        assert refused.status == 503


def test_it_is_counted_and_logged_once(few, asker, channel):
    """For one reason, with what it got."""
    before = state(few)["ended"].get("disconnected", {"streams": 0, "events": 0})
    with Listener(few, f"/events/{channel}") as listener:
        listener.expect(wire(asker.publish(channel, ["1", "2"]), ["1", "2"]))
    now = await_state(few, lambda now: not now["open"])["ended"]["disconnected"]
    assert now["streams"] == before["streams"] + 1
    assert now["events"] == before["events"] + 2
    pattern = rf"/events/{channel}' ended: disconnected, [0-9.]+ s, 2 events"
    few.await_log(f"/events/{channel}' ended")
    assert len(re.findall(pattern, few.log())) == 1


# Who stops reading.


@pytest.mark.parametrize("kind", ["gunicorn-gthread", "gunicorn-gevent"])
def test_those_who_stop_hold_nobody_up(kind, channel):
    """Twenty stop, and are dropped; two hundred beside them get everything."""
    with serving(kind) as server, ExitStack() as stack:
        warm_up(server)
        await_state(server, lambda now: not now["open"])
        before = settled(server)
        asker = stack.enter_context(Asker(server))
        stuck = stack.enter_context(
            Crowd(server, 20, f"/events/{channel}?send_timeout=1")
        )
        crowd = stack.enter_context(Crowd(server, 200, f"/events/{channel}"))
        expected = OPENING
        deadline = time.monotonic() + 40
        while state(server)["ended"].get("send_timeout", {}).get("streams", 0) < 20:
            texts = [f"{n} {'x' * 20_000}" for n in range(20)]
            expected += wire(asker.publish(channel, texts), texts)
            crowd.await_size(len(expected))
            assert time.monotonic() < deadline
        assert set(crowd.bodies()) == {expected}
        during = state(server)
        assert during["parked"] == 200
        assert during["rss"] - before["rss"] < 40_000_000
        del stuck


def test_who_is_dropped_can_tell(channel):
    """Without an end mark only a reset tells a slow reader what it lacks."""
    path = f"/events/{channel}?send_timeout=1"
    with (
        serving("gunicorn-gthread") as server,
        Asker(server) as asker,
        server.get(path, version="1.0") as slow,
    ):
        assert slow.block() == OPENING
        deadline = time.monotonic() + 40
        while not state(server)["ended"].get("send_timeout"):
            asker.publish(channel, [f"{n} {'x' * 20_000}" for n in range(20)])
            assert time.monotonic() < deadline
        with pytest.raises(ConnectionResetError):
            slow.rest()


def test_who_is_told_that_he_lags(channel):
    """Behind what is kept he gets a reset, and goes on."""
    with (
        serving("gunicorn-gthread", env={"CAPACITY": "20"}) as server,
        Asker(server) as asker,
        Listener(server, f"/events/{channel}?send_timeout=60") as told,
        Listener(server, f"/events/{channel}") as healthy,
    ):
        for n in range(100):
            texts = [f"{10 * n + k} {'x' * 20_000}" for k in range(10)]
            healthy.expect(wire(asker.publish(channel, texts), texts))
            healthy.forget()
        asker.publish(channel, ["last"])
        told.await_text("last")
        events = told.events()
        at = [n for n, (_, name, _) in enumerate(events) if name == "reset"]
        assert len(at) == 1
        assert json.loads(events[at[0]][2])["reason"] == "lagged"
        numbers = [int(text.split()[0]) for _, name, text in events[:-1] if not name]
        assert numbers[: at[0]] == list(range(at[0]))
        assert numbers[at[0] :] == list(range(numbers[at[0]], 1000))
        assert len(numbers) < 1000
        assert server.tracebacks() == 0


# Processes.


@pytest.mark.parametrize("kind", ["gunicorn-gthread", "gunicorn-gevent"])
def test_a_fork_disturbs_nobody(kind, channel):
    """The child lets go: events go on, and an end is seen though it lives."""
    with serving(kind) as server, Asker(server) as asker, ExitStack() as stack:
        here = [
            stack.enter_context(Listener(server, f"/events/{channel}?who=w{n}"))
            for n in range(5)
        ]
        parent = state(server)["pid"]
        child = int(asker.ask("/fork"))
        try:
            ours = psutil.Process(child)
            for n in range(20):
                data = wire(asker.publish(channel, [str(n)]), [str(n)])
                for listener in here:
                    listener.expect(data)
            await_true(lambda: max(map(int, os.listdir(f"/proc/{child}/fd"))) < 4096)
            assert asker.ask("/kick/w0") == b"1"
            assert here[0].rest()[1]
            os.kill(parent, signal.SIGKILL)
            for listener in here[1:]:
                listener.rest()
        finally:
            await_true(lambda: not is_running(ours))


def test_programs_inherit_nothing(few, asker, channel):
    """A program that the application starts has no client's connection."""
    before = int(asker.ask("/exec"))
    with ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(Listener(few, f"/events/{channel}"))
        assert int(asker.ask("/exec")) <= before


# Many, and fast.


@pytest.mark.parametrize("kind", CHURNED)
def test_churn(kind):
    """Five hundred come and go: no wrong byte, nothing is left, and it is quiet."""
    with serving(kind) as server:
        before = warmed(server)
        churn(server, 500, seed=1)
        await_state(server, lambda now: not now["open"])
        await_return(server, before)
        assert min(idle_cpu(server) for _ in range(3)) < 0.05
        assert server.tracebacks() == 0


def test_five_hundred_clients_of_one_sync_worker():
    """All get everything, though it was started with 256 descriptors."""
    with serving("gunicorn-sync", env={"SOFT_LIMIT": "256"}) as server:
        listen(server, 500, 20)
        assert server.tracebacks() == 0


@pytest.mark.parametrize("kind", THREADED)
def test_joins_and_leaves_while_others_publish(kind, channel):
    """Nothing is lost, doubled or out of order, wherever a client comes in."""
    env = {"CAPACITY": "1000000"}
    with serving(kind, env=env) as server, Asker(server) as asker:
        before = 0
        seen = []
        deadline = time.monotonic() + 8
        while time.monotonic() < deadline and len(seen) < 400:
            asker.ask(f"/storm/{channel}?count=300&threads=4")
            with ExitStack() as stack:
                here = [
                    stack.enter_context(
                        Listener(server, f"/events/{channel}", is_parked=False)
                    )
                    for _ in range(8)
                ]
                asker.publish(channel, ["end"])
                for listener in here:
                    listener.await_text("end")
                    seen.append([id for id, _, _ in listener.events()])
        assert len(seen) > before
        stored = json.loads(asker.ask(f"/stored/{channel}"))
        places = {id: place for place, id in enumerate(stored)}
        for ids in seen:
            first = places[ids[0]]
            assert ids == stored[first : first + len(ids)]
        assert server.tracebacks() == 0
