"""When a beat is late."""

from types import SimpleNamespace

from syncstream.brokers.redis import beats as module
from syncstream.brokers.redis.beats import DEAF, Beats


def test_a_beat_is_late_only_after_it_was_sent(monkeypatch):
    """However long it takes to find a connection for it that lives."""
    now = 100.0

    class Server:
        marks = b"marks"

        def own(self):
            return b"own"

        def moment(self):
            return 0

        def take(self, deadline):
            nonlocal now
            now = deadline - 0.1
            return SimpleNamespace(
                pack_commands=lambda commands: commands,
                send_packed_command=lambda packed, check_health: None,
            )

    watches = SimpleNamespace(due=lambda part: [], is_answered=True)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    beats = Beats(Server(), watches, b"1")
    beats.begin()
    now += DEAF
    beats.go_on()
    assert now > 100 + DEAF + 4
    assert not beats.are_late
    now += DEAF
    assert beats.are_late
