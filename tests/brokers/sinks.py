"""Sinks that keep what a broker tells, and a broker that can be silent."""

from syncstream.brokers.memory import MemoryBroker


class Told:
    """What was told so far, in its order.

    Attributes:
        entries: Channel and entry each.
        payloads: Those of the entries.
        resyncs: The channels to be read anew each time; ``None``: all.
        states: Whether it was up.
        reasons: Why, of each state.
        denied: Name and reason each.
    """

    def __init__(self):
        self.entries = []
        self.payloads = []
        self.resyncs = []
        self.states = []
        self.reasons = []
        self.denied = []

    def deliver(self, channel, entry):
        self.entries.append((channel, entry))
        self.payloads.append(entry.payload)

    def resync(self, channels):
        self.resyncs.append(channels if channels is None else list(channels))

    def state(self, is_up, reason):
        self.reasons.append(reason)
        self.states.append(is_up)

    def deny(self, name, reason):
        self.denied.append((name, reason))

    @property
    def lost(self):
        """The channels that were to be read anew, by their names."""
        return [name for names in self.resyncs for name in names]


def listening(broker, *channels):
    """Attach a sink to a broker, and watch."""
    told = Told()
    broker.attach(told)
    for channel in channels:
        broker.watch(channel)
    return told


class MuteBroker(MemoryBroker):
    """One that announces no new event while it is mute, as when its listener is down.

    Attributes:
        is_mute: Whether it is.
    """

    is_mute = False

    def attach(self, sink):
        super().attach(_Muted(self, sink))


class _Muted:
    def __init__(self, broker, sink):
        self._broker = broker
        self._sink = sink

    def deliver(self, channel, entry):
        if not self._broker.is_mute:
            self._sink.deliver(channel, entry)
