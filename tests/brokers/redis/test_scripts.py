"""What the scripts keep and return, whatever is in the keys."""

import contextlib
import time

import pytest

from syncstream.brokers.log import JOIN
from syncstream.brokers.redis import broker as module
from syncstream.channels.control import CONTROL
from syncstream.channels.gap import Gap
from tests.brokers.redis.clients import hub_of, key_of, opened, own
from tests.support.pairs import read_for_the_newest
from tests.support.waits import TIMEOUT, await_true


def test_a_stream_entry_that_is_no_event_silences_nobody(shared):
    """Nor is it given out: whoever reads it drops it, and resets."""
    url = own(shared.url)
    with hub_of(url) as hub, shared.client() as client:
        hub.publish("a", "1")
        key = key_of(url, "a")
        client.xadd(key, {b"x": b"\xff"})
        client.xadd(key, {b"p": b"\xff", b"d": b"data: x\n\n"})
        assert hub.broker.newest("a", 1)
        hub.publish("a", "2")
        with contextlib.closing(hub.subscribe("a", after="start")) as subscription:
            found = [(event.event, event.data) for event in subscription.read(5)]
        assert found[0] == (None, "1")
        assert found[-1] == (None, "2")
        assert (None, "x") not in found


@pytest.mark.parametrize(
    "id",
    ["9999999999999999-0", f"{2**64 - 1}-{2**64 - 1}", f"2000000000000-{2**64 - 1}"],
    ids=["digits", "last", "last number"],
)
def test_an_id_that_leaves_no_room_silences_nobody(shared, id):
    """Its channel begins anew with the next event, by one reset for its readers."""
    url = own(shared.url)
    with hub_of(url) as hub, shared.client() as client:
        heard = hub.subscribe("a", after="start")
        hub.publish("a", "1")
        assert [event.data for event in heard.read(TIMEOUT)] == ["1"]
        key = key_of(url, "a")
        client.xadd(key, {b"p": b"7-7", b"d": b"data: x\n\n"}, id=id)
        for text in ("2", "3"):
            after = hub.publish("a", text)
            events = heard.read(TIMEOUT)
            while events[-1].data != text:
                events += heard.read(TIMEOUT)
            # A look at the heads may have found the entry by itself.
            assert [e.event for e in events][-2:] == ["reset", None][text == "3" :]
        assert hub.subscribe("a", after=after).read(0) == []
        assert hub.stats()["up"]


def test_a_kick_that_leaves_no_room_kicks_once(shared):
    """Whom it may have named; those who come later stay."""
    url = own(shared.url)
    with hub_of(url) as hub, shared.client() as client:
        first = hub.subscribe("a", who="ann")
        assert first.read(0) == []
        key = key_of(url, CONTROL)
        client.xadd(key, {b"p": b"0-0", b"d": b"x"}, id="9999999999999999-0")
        hub.sink.resync([CONTROL])
        await_true(lambda: first.is_closed)
        later = hub.subscribe("a", who="ann")
        assert later.read(0) == []
        hub.sink.resync([CONTROL])
        await_true(lambda: not hub.subscribers.control.is_reading)
        assert not later.is_closed


def test_capacity_and_age_are_memory(server):
    """So many entries are in the stream, and none for longer than is asked for."""
    with opened(server.url, capacity=50, max_age=100) as broker:
        for _ in range(20):
            broker.publish([("a", b"x" * 100)] * 50)
        assert server.command("XLEN", "ss:{a}") == 50
        assert 290_000 < server.command("PTTL", "ss:{a}") <= 300_000
    with opened(server.url, max_age=None) as broker:
        broker.publish([("a", b"x")])
        assert server.command("PTTL", "ss:{a}") == -1


def test_reads_leave_no_keys(server, quick):
    """Nor need they memory: who came first, while there was none, misses nothing."""
    server.command("CONFIG", "SET", "maxmemory", "1")
    with (
        hub_of(server.url) as hub,
        contextlib.closing(hub.subscribe("a")) as heard,
    ):
        assert all(isinstance(event, Gap) for event in heard.read(0))
        server.command("CONFIG", "SET", "maxmemory", "0")
        hub.publish("a", "1")
        assert account_of(heard) == ["1"]
        for number in range(100):
            assert hub.head(f"unused:{number}")
        assert sorted(server.command("KEYS", "*")) == [b"ss:empty", b"ss:{a}"]


def account_of(heard):
    """Return the next event's data, and what came before it but gaps."""
    got = []
    deadline = time.monotonic() + TIMEOUT
    while not got:
        assert time.monotonic() < deadline
        got = [e.data for e in heard.read(0.1) if not isinstance(e, Gap)]
    return got


def test_who_may_only_read_reads(server):
    """A user without a right to write gets heads, and what is stored."""
    with server.client() as client:
        rights = ["on", ">pw", "~ss:*", "&ss:*", "+@read", "+eval", "+evalsha"]
        rights += ["+time", "+@pubsub", "+ping", "+@connection"]
        client.execute_command("ACL", "SETUSER", "reader", *rights)
    with opened(f"redis://reader:pw@127.0.0.1:{server.port}") as reader:
        assert reader.read("a", None).complete
        assert server.command("DBSIZE") == 0
        with opened(server.url) as broker:
            (id,) = broker.publish([("a", b"1")])
        assert reader.read("a", None).head == id
        head = reader.read("b", None).head
        assert reader.read("b", head).complete


@pytest.mark.parametrize("removed", [1, 2, 3, 4])
def test_a_removed_event_breaks_the_chain(removed, shared):
    """What follows it is read, not all anew; and the newest shows, too."""
    url = own(shared.url)
    with opened(url) as broker:
        ids = broker.publish([("a", b"%d" % number) for number in range(5)])
        key = key_of(url, "a")
        assert shared.command("XDEL", key, ids[removed]) == 1
        page = broker.read("a", ids[removed - 1])
        assert not page.complete
        assert page.head == ids[4]
        assert [entry.id for entry in page.entries] == ids[removed + 1 :]
        if removed == 4:
            (id,) = broker.publish([("a", b"5")])
            page = broker.read("a", ids[3])
            assert [(e.id, e.prev) for e in page.entries] == [(id, ids[4])]
            assert not page.complete


def test_the_newest_are_found_without_the_rest(shared):
    """An id and the head alone, of as many as there are."""
    with hub_of(own(shared.url)) as hub:
        assert read_for_the_newest(hub) == 1
    with opened(own(shared.url)) as broker:
        head = broker.read("a", None).head
        assert broker.newest("a", 3) == (head, head)
        ids = broker.publish([("a", b"x")] * 250)
        for count, before in ((1, ids[-2]), (120, ids[129]), (250, head), (999, head)):
            assert broker.newest("a", count) == (before, ids[-1])


def test_pages_are_bounded_in_bytes(shared):
    """Nobody takes more of one than `JOIN`: a reader's request holds up no server."""
    with opened(own(shared.url)) as broker:
        broker.publish([("a", b"x")] * 40 + [("a", b"x" * 100_000)] * 60)
        found = [*broker.read("a", "0").entries]
        assert 40 < len(found) <= 56
        while found[-1].id != (page := broker.read("a", found[-1].id)).head:
            assert page.complete
            assert sum(len(e.payload) for e in page.entries) < JOIN + 100_000
            found += page.entries
        assert len(found) == 100
        assert [e.prev for e in found[1:]] == [e.id for e in found[:-1]]


def test_who_listens_keeps_an_idle_channel(server, quick, monkeypatch):
    """Its key expires only where nobody does: who is there has missed nothing."""
    monkeypatch.setattr(module, "_MIN_TTL", 1.0)
    with (
        hub_of(server.url, max_age=4.0) as hub,
        contextlib.closing(hub.subscribe("a")) as heard,
    ):
        assert heard.read(0) == []
        hub.publish("a", "1")
        assert [event.data for event in heard.read(TIMEOUT)] == ["1"]
        head = hub.head("idle")
        hub.publish("idle", "2")
        # It was made later than the other one, which is used as little since.
        await_true(lambda: not server.command("EXISTS", "ss:{idle}"))
        assert server.command("EXISTS", "ss:{a}")
        assert heard.read(0.2) == []
        hub.publish("a", "3")
        (event,) = heard.read(TIMEOUT)
        assert event.data == "3"
        assert not hub.broker.read("idle", head).complete


def test_ids_are_not_made_twice(server):
    """Of all events of a second, after the newest are lost, none has a lost id."""
    with opened(server.url) as broker:
        lost = set()
        for _ in range(10):
            lost |= set(broker.publish([("a", b"x")] * 100))
            server.command("FLUSHALL")
        ids = broker.publish([("a", b"x")] * 100)
        assert not lost & set(ids)
        assert len({int(id.partition("-")[2]) for id in [*lost, *ids]}) == 1100
