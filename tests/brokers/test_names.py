"""Names of channels, and patterns of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncstream.brokers.names import (
    check_name,
    is_name,
    is_pattern,
    matches,
    patterns_of,
)


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


@pytest.mark.parametrize(
    ("name", "is_valid"),
    [
        *(("a", True), ("", False), ("x" * 200, True), ("x" * 201, False)),
        *(("ü" * 200, True), ("a:b", True), (":", True), ("a b", False)),
        *(("a\n", False), ("a\0", False), ("a\x1f", False), ("a\x7f", False)),
        *(("a\x80", True), ("a*", False), ("#", False), ("\ud800", False)),
        ("\udfff", False),
    ],
)
def test_names(name, is_valid):
    """1 to 200 characters, none of which is white space, a control or a wildcard."""
    assert is_name(name) is is_valid
    if is_valid:
        check_name(name)
    else:
        with pytest.raises(ValueError, match="channel must be 1 to 200 characters"):
            check_name(name)


@pytest.mark.parametrize("name", [None, b"a", 1])
def test_a_name_is_text(name):
    with pytest.raises(TypeError, match="channel must be str"):
        check_name(name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *(("*", True), ("#", True), ("a:*", True), ("a:#", True), ("a:b:*", True)),
        *(("a*", False), ("*:a", False), ("#:a", False), ("a:*b", False), ("", False)),
    ],
)
def test_patterns(name, expected):
    """Their last level is a wildcard."""
    assert is_pattern(name) is expected


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
