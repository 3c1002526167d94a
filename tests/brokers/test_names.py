"""Names of channels, and patterns of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncstream.brokers.names import matches, patterns_of


@pytest.mark.parametrize(
    ("pattern", "channel", "expected"),
    [
        ("chat:*", "chat:7", True),
        ("chat:*", "chat", False),
        ("chat:*", "chat:7:8", False),
        ("chat:*", "chats:7", False),
        ("a:b:*", "a:b:c", True),
        ("*", "a", True),
        ("*", "a:b", False),
        ("#", "a:b:c", True),
        ("logs:#", "logs", True),
        ("logs:#", "logs:a:b", True),
        ("logs:#", "logsa", False),
    ],
)
def test_matches(pattern, channel, expected):
    """One level by *, any number by #."""
    assert matches(pattern, channel) is expected


LEVEL = st.sampled_from(["", "a", "b", "a b", "*", "#"])


@given(st.lists(LEVEL, min_size=1, max_size=4), st.lists(LEVEL, max_size=4))
def test_patterns_of_a_channel_are_those_that_match(levels, prefix):
    """All that match, and no others."""
    channel = ":".join(levels)
    found = set(patterns_of(channel))
    assert all(matches(pattern, channel) for pattern in found)
    for last in ("*", "#"):
        for size in range(len(levels) + 1):
            for parts in (levels[:size], prefix):
                pattern = ":".join([*parts, last])
                # A name is not empty, and neither is what stands before the last level.
                if not pattern.startswith(":"):
                    assert (pattern in found) == matches(pattern, channel), pattern
