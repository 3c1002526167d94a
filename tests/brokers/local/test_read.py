"""Pages, edges, and rows that cannot be read."""

import contextlib
import sqlite3
import time

import pytest

from syncstream import Hub
from tests.brokers.local.logs import change, read_to
from tests.support.pairs import read_for_the_newest
from tests.support.waits import await_true


@pytest.mark.parametrize(
    "damage",
    ["UPDATE channel SET last = 'x'", "UPDATE channel SET nonce = 'x'"],
)
def test_a_channel_that_is_damaged_is_named(folder, damage, caplog):
    """Its subscribers wait, the others hear on, and the log says which it is."""
    with contextlib.closing(Hub(f"local:{folder}/log")) as hub:
        for name in "ab":
            hub.publish(name, "1")
        with contextlib.closing(sqlite3.connect(f"{folder}/log/log.db")) as log:
            log.execute(f"{damage} WHERE name = 'a'")
            log.commit()
        assert hub.subscribe("a", after="start").read(0) == []
        assert read_to(hub.subscribe("b", after="start"), "1") == ["1"]
        assert hub.stats()["up"]
        await_true(lambda: "'a' cannot be read" in caplog.text)


def test_a_hole_is_announced_once(make, folder):
    """What follows an event whose successor was deleted; not the oldest, for ever."""
    broker = make()
    ids = broker.publish([("a", b"%d" % n) for n in range(5)])
    change(folder, "DELETE FROM event WHERE number = 3")
    page = broker.read("a", ids[0])
    assert page.complete
    assert [entry.id for entry in page.entries] == [ids[1], *ids[3:]]
    page = broker.read("a", ids[1])
    assert not page.complete
    assert [entry.id for entry in page.entries] == ids[3:]
    assert broker.read("a", ids[3]).complete


def test_the_newest_are_found_without_the_rest(make, folder):
    """Their id before and the head's, within what is kept; no row is made by it."""
    with contextlib.closing(Hub(f"local:{folder}/own")) as hub:
        assert read_for_the_newest(hub) == 1
    broker = make(capacity=4)
    for count in (1, 10):
        (empty,) = {*broker.newest("a", count)}
    assert empty == broker.read("a", None).head
    ids = broker.publish([("a", b"%d" % n) for n in range(6)])
    assert broker.newest("a", 1) == (ids[4], ids[5])
    assert broker.newest("a", 3) == (ids[2], ids[5])
    assert broker.newest("a", 100) == (ids[1], ids[5])
    time.sleep(0.002)  # their times are whole milliseconds
    assert make(max_age=1e-9).newest("a", 3) == (ids[5], ids[5])
    for number in range(10):
        broker.read(f"unused {number}", None)
        broker.newest(f"unused {number}", 5)
    with contextlib.closing(sqlite3.connect(f"{broker.path}/log.db")) as connection:
        assert connection.execute("SELECT count(*) FROM channel").fetchone() == (1,)
