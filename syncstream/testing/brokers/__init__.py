"""`check_broker`: tests whether a broker keeps its contract.

It tests a broker of your own with threads, or with greenlets in a process that gevent
has patched. It tests one process only: write your own tests for several processes that
share an engine, and for failures of the engine.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from ...brokers.contract import Broker
from .bench import Bench
from .stored import Stored
from .told import Telling

__all__ = ["check_broker"]


def check_broker(
    make: Callable[[], Broker],
    *,
    capacity: int = 1000,
    max_age: float | None = None,
    rounds: int = 1000,
    seed: int = 0,
    remove: Callable[[Broker, str, str], object] | None = None,
) -> None:
    """Check that a broker keeps the contract of `syncstream.brokers.Broker`.

    It blocks for some seconds.

    Args:
        make: Returns a new broker without events. Each is closed.
        capacity: The number of events that these brokers keep of each channel, exactly;
            100 or more.
        max_age: The seconds for which these brokers keep events; then this is the only
            test, so call it once more, with brokers of a short ``max_age``. ``None``
            runs all other tests.
        rounds: The number of repetitions of each race; 10,000 to be sure.
        seed: The seed of the random choices.
        remove: Called with a broker, a channel and an id: removes that event from the
            broker's store, as an operator would (``DELETE``, ``XDEL``). ``None`` skips
            that test.

    Raises:
        AssertionError: The broker violates the contract; the message names the rule.
        ValueError: ``capacity`` is less than 100.
    """
    if capacity < 100:
        raise ValueError(f"capacity must be 100 or more, got {capacity!r}")
    bench = Bench(make, capacity, rounds, random.Random(seed))
    stored, telling = Stored(bench), Telling(bench)
    if max_age is not None:
        stored.forgets_by_age(max_age)
        return
    stored.stores_bytes_as_they_are()
    stored.has_one_order()
    stored.resumes_everywhere()
    stored.trims_by_capacity()
    stored.finds_the_newest()
    stored.reads_without_storing()
    if remove is not None:
        stored.shows_what_was_removed(remove)
    stored.takes_any_id()
    stored.does_not_know_ids_of_others()
    telling.tells_what_comes_after_watch()
    telling.has_no_window_between_history_and_live()
    telling.can_be_watched_and_unwatched()
    telling.has_many_channels()
    telling.serves_slow_readers()
    telling.needs_no_reliable_word()
    telling.closes()
    telling.accounts_for_all()
