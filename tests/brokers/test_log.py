"""A window's arithmetic, against a plain list."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncstream.brokers.log import JOIN, START, Entry, Log, first_part

ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 40)),
        st.tuples(st.just("count"), st.integers(0, 90)),
        st.tuples(st.just("age"), st.integers(0, 150)),
        st.tuples(st.just("size"), st.integers(0, 20_000)),
        st.tuples(st.just("restart"), st.integers(0, 5)),
        st.tuples(st.just("clear"), st.just(0)),
    ),
    max_size=40,
)


class Model:
    """What a `Log` is to be: positions and entries, and nothing clever."""

    def __init__(self):
        self.entries = []  # position, entry
        self.end = 0
        self.head = self.base = START

    def append(self, entry):
        if not self.entries:
            self.base = entry.prev
        self.entries.append((self.end, entry))
        self.end += 1
        self.head = entry.id

    def drop(self, keeps):
        while self.entries and not keeps(self.entries):
            self.base = self.entries.pop(0)[1].id

    def restart(self, head):
        self.entries = []
        self.end += 1
        self.head = self.base = head


def size_of(entries):
    return sum(entry.size for _, entry in entries)


@given(ACTIONS)
def test_it_is_a_list_with_positions(actions):
    """Whatever is done to it, all it answers is what a list would."""
    log, model = Log(), Model()
    number = clock = 0
    seen = []
    for action, value in actions:
        if action == "append":
            for _ in range(value):
                number += 1
                clock += 1
                payload = b"data: %b\n\n" % (b"x" * (number % 50))
                entry = Entry(f"{number:x}-0", model.head, payload, float(clock))
                log.append(entry)
                model.append(entry)
                seen.append(entry.id)
        elif action == "restart":
            log.restart(f"{value}-f")
            model.restart(f"{value}-f")
        elif action == "clear":
            log.trim(0, -math.inf, math.inf)
            model.drop(lambda entries: False)
        elif action == "count":
            log.trim(value, -math.inf, math.inf)
            model.drop(lambda entries, limit=value: len(entries) <= limit)
        elif action == "age":
            since = clock - value
            log.trim(1 << 60, since, math.inf)
            model.drop(lambda entries, since=since: entries[0][1].time >= since)
        else:
            log.trim(1 << 60, -math.inf, value)
            model.drop(lambda e, limit=value: len(e) == 1 or size_of(e) <= limit)
        check(log, model, seen)


def check(log, model, seen):
    kept = model.entries
    assert len(log) == len(kept)
    assert (log.end, log.head, log.base) == (model.end, model.head, model.base)
    assert log.first == (kept[0][0] if kept else model.end)
    assert log.size == size_of(kept)
    entries = [entry for _, entry in kept]
    places = {entry.id: position + 1 for position, entry in kept}
    places[model.base] = log.first
    for id in (*seen[-100:], START, "none", model.head):
        assert log.after(id) == places.get(id), id
    for at in {0, len(kept) // 2, max(0, len(kept) - 1)}:
        position = log.first + at
        assert log.read(position, 1 << 30) == entries[at:]
        assert log.read(position, 3) == entries[at : at + 3]
        if at < len(entries):
            assert log.entry(position) is entries[at]
            end, chunk = log.joined(position)
            assert end == log.end
            assert chunk == b"".join(entry.wire for entry in entries[at:])
            assert log.joined(position)[1] is chunk


def fill(log, count, size):
    for number in range(count):
        payload = b"data: %b\n\n" % (b"x" * size)
        log.append(Entry(f"{log.end + 1:x}-{number:x}", log.head, payload))


def test_a_chunk_is_shared_and_bounded():
    """Who is at one position gets one object, of a bounded size."""
    log = Log()
    fill(log, 100, 10_000)
    end, chunk = log.joined(0)
    assert JOIN <= len(chunk) < JOIN + 11_000
    assert log.joined(0) == (end, chunk)
    assert log.joined(0)[1] is chunk
    fill(log, 1, 10)
    assert log.joined(0)[1] is chunk  # what has come since does not change it
    parts = [chunk]
    while end < log.end:
        end, chunk = log.joined(end)
        parts.append(chunk)
    entries = [log.entry(position) for position in range(log.end)]
    assert b"".join(parts) == b"".join(entry.wire for entry in entries)


@pytest.mark.parametrize(
    ("size", "limit", "expected"),
    [(10, 7, 7), (JOIN // 4, 7, 4), (JOIN - 9, 7, 2), (JOIN, 7, 1), (9 * JOIN, 7, 1)],
)
def test_what_is_read_at_once_is_bounded(size, limit, expected):
    """By number and by bytes, and it is one entry at least."""
    log = Log()
    fill(log, 10, size)
    log.trim(9, 0.0, 1e9)
    found = log.read(1, limit)
    assert [entry.id for entry in found] == [
        f"{n + 1:x}-{n:x}" for n in range(1, 1 + expected)
    ]
    assert log.read(log.end, limit) == first_part([]) == []


def test_the_first_part_ends_with_its_last_byte():
    """Who has just as many bytes as a read may hold takes no more."""
    entries = [Entry(f"{n}-0", "", b"x" * (JOIN // 2)) for n in range(4)]
    assert first_part(entries) == entries[:2]


def test_a_chunk_ends_with_its_last_byte():
    """One that has just as many bytes as it may have is full, and stays the same."""
    log = Log()

    def add(id):
        fields = b"x" * (JOIN // 2 - len(f"id: {id}\n"))
        log.append(Entry(id, log.head, fields))

    for id in ("1-0", "2-0", "3-0"):
        add(id)
    end, chunk = log.joined(0)
    assert (end, len(chunk)) == (2, JOIN)
    add("4-0")
    assert log.joined(0)[1] is chunk


def test_one_entry_is_never_cut():
    """A single one goes out whole, however large."""
    log = Log()
    fill(log, 2, 3 * JOIN)
    end, chunk = log.joined(0)
    assert end == 1
    assert chunk is not None
    assert len(chunk) > 3 * JOIN


def test_a_single_entry_is_not_copied():
    """Paced events: the chunk is the entry's own bytes."""
    log = Log()
    fill(log, 3, 10)
    assert log.joined(2)[1] is log.entry(2).wire


def test_after_a_restart_who_was_at_the_end_is_outside():
    """Else they would take what follows the hole for what follows them."""
    log = Log()
    fill(log, 3, 10)
    position = log.after(log.head)
    log.restart("9-0")
    log.append(Entry("a-0", "9-0", b"data\n\n"))
    assert position < log.first
    assert log.after("9-0") == log.first
    assert log.after("3-2") is None


@pytest.mark.parametrize(
    ("payload", "tags", "fields"),
    [
        (b"data: x\n\n", b"", b"data: x\n\n"),
        (b'\0{"only": ["a"]}\ndata: x\n\n', b'{"only": ["a"]}', b"data: x\n\n"),
        (b"", b"", b""),
    ],
)
def test_entry(payload, tags, fields):
    """Tags stand before the fields, and are not sent."""
    entry = Entry("1-f", START, payload)
    assert (entry.tags, entry.fields) == (tags, fields)
    assert entry.wire == b"id: 1-f\n" + fields
    assert entry.wire is entry.wire
    assert repr(entry) == f"Entry('1-f', after '0', {len(payload)} bytes)"


def test_trimming_all_the_time_is_cheap():
    """A window that is full is not moved for each entry; and holds nothing more."""
    log = Log()
    for number in range(10_000):
        log.append(Entry(f"{number + 1:x}-0", log.head, b"data: x\n\n"))
        log.trim(256, -math.inf, math.inf)
        assert len(log._entries) <= 512
    assert len(log) == 256
