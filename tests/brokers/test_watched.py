"""What is watched, by name or pattern."""

from hypothesis import given
from hypothesis import strategies as st

from syncstream.brokers.names import is_pattern, matches
from syncstream.brokers.watched import Watched

NAMES = st.sampled_from(["a", "b", "a:b", "b:a", "a:b:c", "a:*", "a:#", "*", "#"])


@given(st.lists(st.tuples(st.booleans(), NAMES)))
def test_what_is_watched_is_so_by_name_or_pattern(changes):
    """Whatever was added and taken back before; twice is as good as once."""
    watched, expected = Watched(), set()
    for is_added, name in changes:
        (watched.add if is_added else watched.discard)(name)
        (expected.add if is_added else expected.discard)(name)
        assert watched.names | watched.patterns == expected
        assert bool(watched) == bool(expected)
    patterns = {name for name in expected if is_pattern(name)}
    assert watched.patterns == patterns
    for channel in ("a", "b", "a:b", "b:a", "a:b:c", "c"):
        is_matched = any(matches(pattern, channel) for pattern in patterns)
        assert (channel in watched) == (channel in expected or is_matched)


def test_many_patterns_are_not_tried_each():
    """A look takes as many steps as the channel has levels."""

    class Counted(set):
        looks = 0

        def __contains__(self, name):
            Counted.looks += 1
            return super().__contains__(name)

        def isdisjoint(self, names):
            return not any(name in self for name in names)

    watched = Watched()
    watched.patterns = Counted(f"user:{number}:*" for number in range(1000))
    assert "user:7:news" in watched
    assert "room:7:news" not in watched
    assert Counted.looks < 20
