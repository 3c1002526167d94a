"""Ids of number and nonce."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncstream.brokers.ids import make_id, make_nonce, parse_id, spell_id
from syncstream.brokers.memory import MemoryBroker


@given(st.integers(0, 2**60 - 1), st.integers(0, 2**32 - 1))
def test_ids_are_read_as_they_are_spelt(number, nonce):
    """Number and nonce come back; what has another form is no id of ours."""
    id = spell_id(number, nonce)
    assert parse_id(id) == (number, nonce)
    assert parse_id(make_id(number))[0] == number
    for other in (f"{id}0", f"{id}\n", f" {id}", id.partition("-")[0], f"-{id}"):
        assert parse_id(other) is None


@pytest.mark.parametrize(
    "id",
    [
        *("", "-", "1-", "1-2", "1-DEADBEEF", f"{'1' * 16}-00000000", "-00000000"),
        *("1-0000000", "1-000000000", "1-0000000g", "g-00000000", "1_00000000"),
    ],
)
def test_ids_of_others_are_none_of_ours(id):
    """They come from clients, and may be anything."""
    assert parse_id(id) is None


def test_nonces_have_32_bits():
    """All of them are used."""
    found = [make_nonce() for _ in range(200)]
    assert len(set(found)) > 190
    assert max(found) < 1 << 32
    assert max(found) >= 1 << 31


def test_a_seed_makes_no_ids():
    """Whoever seeds `random` gets other ids in each life all the same."""
    found = []
    state = random.getstate()
    for _ in range(2):
        random.seed(42)
        broker = MemoryBroker()
        found += [broker.read("a", None).head, *broker.publish([("a", b"x")] * 3)]
    random.setstate(state)  # others choose ports by it
    assert len(set(found)) == 8
