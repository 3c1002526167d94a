"""The soak of the brokers finds what it looks for; and a few seconds of it."""

import random

import pytest

from tests.soak import brokers as broker_soak
from tests.soak.brokers import Fault, Published, Seen, judge


def published():
    """Five events of a channel, one after the other, and one that was not stored."""
    events = [
        Published("c", str(n), n, n + 0.5, f"{n:x}-0000000{n}", "stored")
        for n in range(1, 6)
    ]
    return [*events, Published("c", "no", 6, 6.5, None, "Unavailable")]


def verdict(*data, faults=(), at=10, **options):
    """Judge a client that saw "reset", "connected", a status, or events' data."""
    kinds = {"reset": "reset", "connected": "connected", "403": "403"}
    record = [
        Seen(at + place, f"{text}-0" * text.isdecimal(), text, kinds.get(text, "event"))
        for place, text in enumerate(data)
    ]
    return judge(published(), {"client": ("c", record)}, faults, **options)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        ("1 2 4", "hole"),
        ("1 2 2", "double"),
        ("1 3 2", "disorder"),
        ("1 2 no", "not stored, but delivered"),
        ("1 2 other", "unknown"),
    ],
)
def test_a_broken_promise_is_seen(data, kind):
    """Each kind is counted, and told with the client, the channel and the event."""
    found = verdict(*data.split())
    assert found.counts[kind] >= 1
    assert any(line.startswith(f"{kind}: client client") for line in found.broken)


def test_what_a_new_client_missed_is_seen():
    """What was sent after its stream had begun."""
    assert verdict("connected", "4", at=2.8).counts["hole"] == 1
    assert verdict("connected", "1", "3", at=2.8).broken == []


@pytest.mark.parametrize(
    ("at", "reads_write", "count"), [(0, True, 0), (0, False, 1), (1.6, True, 1)]
)
def test_an_older_release_marks_empty_channels(at, reads_write, count):
    """Who came when nothing had been published yet may be reset by that."""
    found = verdict("connected", "reset", at=at, reads_write=reads_write)
    assert found.counts["false resets"] == count


@pytest.mark.parametrize("refuses", [(), ("c",)])
def test_a_refusal_needs_a_cause(refuses):
    """A name is denied while the engine refuses it."""
    faults = [Fault("it", refuses=refuses, start=9, end=12)]
    found = verdict("1", "403", faults=faults)
    assert found.counts["denied for no reason"] == (not refuses)
    assert found.counts["status 403"] == 1


def test_the_deaf_are_seen():
    """Who gets nothing while another channel is refused."""
    faults = [Fault("it", refuses=["other"], start=1, end=5)]
    assert "deaf: client client" in verdict("connected", faults=faults, at=0).broken[-1]
    assert verdict("connected", "1", "2", faults=faults, at=0).broken == []


@pytest.mark.parametrize("data", ["1 2 3 4 5", "3 4", "1 reset 3 4 5", "1 2 reset 1 2"])
def test_a_promise_that_was_kept(data):
    """Nothing is said of what came in order, or after a reset."""
    assert verdict(*data.split()).broken == []


@pytest.mark.parametrize(
    ("fault", "count"),
    [
        (Fault("takes nothing", start=9, end=11), 1),
        (Fault("takes all", loses=["c"], start=9, end=11), 0),
        (Fault("takes another's", loses=["d"], start=9, end=11), 1),
        (Fault("took it long ago", loses=["c"], start=-99, end=-90), 1),
        (Fault("takes older", loses=["c"], start=9, newest={"c": "0-9"}), 1),
        (Fault("takes newer", loses=["c"], start=9, newest={"c": "2-0"}), 0),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_reset_that_was_not_needed(fault, count):
    """One is needed if a fault took something after the client's place."""
    assert verdict("1", "reset", faults=[fault]).counts["false resets"] == count


def test_a_fault_that_fails_to_happen(monkeypatch, capsys):
    """It fails the run; and the run is a real one over `local:`, of two workers."""

    def all_faults(self):
        def begin(fault):
            yield from self._freeze(fault)
            raise broker_soak.NotDone

        yield Fault("it", begin)

    monkeypatch.setattr(broker_soak.Soak, "all_faults", all_faults)
    workers = broker_soak.WORKERS[1:3]
    options = {"clients": 6, "rate": 30, "workers": workers, "hold": 0.3}
    assert not broker_soak.soak("local", 1, random.Random(1), **options)
    told = capsys.readouterr().out
    assert "it NOT DONE: NotDone()" in told
    assert "BROKEN" not in told
    assert "HUNG" not in told


@pytest.mark.parametrize(
    ("reset", "count"), [(None, 1), (7, 0), (99, 1)], ids=["missed", "told", "late"]
)
def test_what_nothing_later_shows_is_seen(reset, count):
    """A stream that did not get the last of what was stored, for long."""
    record = [Seen(0, "", "", "connected")]
    record += [Seen(n + 0.6, f"{n}-0", str(n)) for n in range(1, 5)]
    record += [Seen(reset, "5-0", "", "reset")] if reset else []
    record += [Seen(100, "", "", "left")]
    found = judge(published(), {"client": ("c", record)}, [])
    assert found.counts["missed"] == count
