"""Readers of channels: in a stream, in a thread or greenlet, all at once."""

from tests.support.pairs import Line as PairsLine
from tests.support.pairs import serve, stream_of


class Line(PairsLine):
    """A client's connection, with the id it has come back with."""

    def __init__(self, last_event_id=None, is_multiprocess=False):
        super().__init__()
        self.last_event_id = last_event_id
        self.is_multiprocess = is_multiprocess


class Resumed:
    """A subscription, read in a stream that came with a Last-Event-ID."""

    def __init__(self, subscription, last_event_id):
        self.subscription = subscription
        self.found = []

        def source():
            while events := subscription.read(0):
                self.found += events
                yield None

        serve(stream_of(source(), Line(last_event_id)))


def resume(hub, id, *channels, **options):
    """Return what a client gets that comes back with an id."""
    return Resumed(hub.subscribe(*(channels or ("a",)), **options), id).found


def data(events):
    return [event.data for event in events]


def read_all(subscription):
    found = []
    while events := subscription.read(0):
        found += events
    return found


def in_place(place, function):
    """Run a test's function where it is to run: its waits are of that kind."""
    return place.start(function)()
