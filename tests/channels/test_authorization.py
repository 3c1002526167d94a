"""`Authorization`: who may read, asked at the beginning and again."""

import time

import pytest

from syncstream import Closed, Hub, Unavailable
from syncstream.brokers.memory import MemoryBroker
from syncstream.channels import limits
from syncstream.runtime.journal import journal
from tests.channels.readers import data
from tests.support.waits import TIMEOUT


def test_authorize(hub):
    """Asked at first, and every so often; a no is the end."""
    asked = []

    def authorize(subscription):
        asked.append(subscription)
        return len(asked) < 3

    subscription = hub.subscribe("a", authorize=(authorize, 0.05))
    with pytest.raises(Closed) as caught:
        subscription.read(TIMEOUT)
    assert caught.value.reason == "denied"
    assert asked == [subscription] * 3
    refused = hub.subscribe("a", authorize=lambda subscription: False)
    with pytest.raises(Closed, match="denied"):
        refused.read(0)
    assert hub.stats()["subscribers"] == 0


def test_an_authorize_that_raises_lets_nobody_in(hub):
    """Whoever reads gets its error, each time, and nothing else."""

    def broken(subscription):
        raise ConnectionError("no database")

    hub.publish("a", "secret")
    watcher = hub.subscribe("a")
    watcher.read(0)
    subscription = hub.subscribe("a", after="start", authorize=broken, announce=True)
    for call in (subscription.begin, *[lambda: subscription.read(0)] * 2):
        with pytest.raises(ConnectionError):
            call()
    with pytest.raises(ConnectionError):
        next(subscription)
    assert hub.presence("a") == [None]
    assert watcher.read(0) == []


def test_an_authorize_that_raises_later_lets_nobody_go_on(hub):
    """It is asked until it answers; what came meanwhile is not lost."""
    answers = [ConnectionError("no database"), ConnectionError("no database")]

    def authorize(subscription):
        if is_broken and answers:
            raise answers.pop()
        return True

    is_broken = False
    subscription = hub.subscribe("a", authorize=(authorize, 0.001))
    subscription.read(0)
    hub.publish("a", "x")
    is_broken = True
    time.sleep(0.002)
    for _ in range(2):
        with pytest.raises(ConnectionError):
            subscription.read(0)
    assert data(subscription.read(0)) == ["x"]


@pytest.mark.parametrize("is_first", [True, False])
def test_an_authorize_that_hangs_ends_a_reader(
    hub, place, monkeypatch, caplog, is_first
):
    """In time, whoever waits there; the answer that comes late changes nothing."""
    if is_first:
        monkeypatch.setattr(limits, "ANSWER", 0.2)
    asked = []

    def authorize(subscription):
        asked.append(1)
        monkeypatch.setattr(limits, "ANSWER", 0.2)  # of the next one
        while not subscription.is_closed and (is_first or len(asked) > 1):
            place.pause()  # it hangs until that
        return True

    def read():
        while True:
            reader.read()

    hub.publish("a", "1")
    reader = hub.subscribe(
        "a", after="start", authorize=(authorize, 0.05), announce=True
    )
    with pytest.raises(Closed, match="denied"):
        place.start(read)()
    assert len(asked) == (1 if is_first else 2)
    place.await_true(lambda: hub.presence("a") == [])
    journal().flush()
    assert "has not answered" in caplog.text


async def no_later(subscription):
    return False


def no_by_and_by(subscription):
    yield False


@pytest.mark.parametrize(
    "authorize",
    [
        no_later,
        no_by_and_by,
        lambda s: filter(None, ()),
        lambda s: no_later,
        lambda s: s.is_closed.__bool__,
    ],
    ids=["awaitable", "generator", "iterator", "function", "method"],
)
def test_an_answer_that_is_true_whatever_it_says_is_no_yes(hub, authorize):
    """An `async def`, a `yield`, a call that was forgotten."""
    reader = hub.subscribe("a", authorize=authorize)
    for _ in range(2):
        with pytest.raises(TypeError, match="plain function"):
            reader.read(0)


def test_authorize_on_a_busy_channel(hub):
    """Who always has something to read is asked, too."""
    answers = iter([True, False])
    subscription = hub.subscribe("a", authorize=(lambda s: next(answers), 0.02))
    subscription.read(0)

    def read():
        while True:
            hub.publish("a", "x")
            subscription.read(0)

    with pytest.raises(Closed, match="denied"):
        read()


class Away(MemoryBroker):
    """A broker of several processes that does not answer."""

    scope = "machine"
    asked = 0

    def watch(self, channel):
        self.asked += 1
        raise Unavailable("down")


def test_a_broker_that_is_away_is_asked_in_peace():
    """Who may be kicked and is to be asked again begins later, and asks no faster."""
    hub = Hub(broker=Away())
    subscription = hub.subscribe("a", who="ann", authorize=(lambda s: True, 60))
    assert subscription.read(0.1) == []
    assert hub.broker.asked < 3
    subscription.close()
    hub.close()
