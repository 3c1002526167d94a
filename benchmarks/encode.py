"""How many events a second does each library encode, nothing on the wire?

    python -m benchmarks.encode [--quick]

In the repository's folder, with ``pip install orjson sse-starlette fastapi``. About
40 seconds; --quick about 6.

What a generator yields goes through what each library's response calls for it:
`syncstream.protocol.sse.encoder`, sse-starlette's ``ensure_bytes`` (with its default
line end), and for fastapi.sse the few lines of ``fastapi.routing`` around
``format_sse_event``. The floor is a bare f-string without any check, one
``json.JSONEncoder`` made beforehand. CPU time of one process; the libraries take
turns, round by round; medians, and ratios the median of each round's own. syncstream
is loaded twice, with orjson out of its sight and with it, so both run its default.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from importlib import import_module
from statistics import median
from timeit import Timer
from typing import Any

from .machine import describe, verdict

TEXT = "hello world"
SMALL = {"n": 12345, "t": 1234567890123, "user": "alice", "ok": True}
LINES = "\n".join(
    f"line {n} of a longer text, about fifty bytes long" for n in range(10)
)
NAMED = "str, id, name"
ITEMS = {"str": TEXT, "small JSON": SMALL, "10 lines": LINES, NAMED: TEXT}

OURS, FAST = "syncstream", "syncstream + orjson"
ONCE, RIVAL, FLOOR = "syncstream, event kept", "sse-starlette", "f-string"
TARGETS = (  # who, what, how many times the rival
    (OURS, "str", 6.0),
    (OURS, "small JSON", 1.5),
    (FAST, "small JSON", 8.0),
)

Names = dict[str, Any]
Row = tuple[dict[str, str], Names]  # what is timed for each item, and its names


def ours(*, has_orjson: bool) -> Names:
    """Load the package as it is with, or without, the ``fast`` extra."""
    blocked: dict[str, Any] = {} if has_orjson else {"orjson": None}
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_ours(name)}
    if blocked:
        kept.update({n: sys.modules.pop(n) for n in blocked if n in sys.modules})
    sys.modules.update(blocked)
    try:
        sse = import_module("syncstream.protocol.sse")
        default = import_module("syncstream.protocol.json").default_dumps
    finally:
        for name in [name for name in sys.modules if _is_ours(name) or name in blocked]:
            del sys.modules[name]
        sys.modules.update(kept)
    assert ("orjson" in default.__name__) == has_orjson, default
    return {"encode": sse.encoder(), "Event": sse.Event}


def _is_ours(name: str) -> bool:
    return name.partition(".")[0] == "syncstream"


def rows() -> dict[str, Row]:
    return {
        FLOOR: floor(),
        OURS: syncstream(ours(has_orjson=False)),
        FAST: syncstream(ours(has_orjson=True)),
        ONCE: kept(ours(has_orjson=False)),
        RIVAL: sse_starlette(),
        "fastapi.sse": fastapi_sse(),
    }


def floor() -> Row:
    return {
        "str": r'f"data: {TEXT}\n\n".encode()',
        "small JSON": r'f"data: {dumps(SMALL)}\n\n".encode()',
        "10 lines": r'("data: " + LINES.replace("\n", "\ndata: ") + "\n\n").encode()',
        NAMED: r'f"id: {ID}\nevent: {EVENT}\ndata: {TEXT}\n\n".encode()',
    }, {"dumps": json.JSONEncoder(separators=(",", ":")).encode}


def syncstream(names: Names) -> Row:
    return {
        "str": "encode(TEXT)",
        "small JSON": "encode(SMALL)",
        "10 lines": "encode(LINES)",
        NAMED: "encode(Event(TEXT, id=ID, event=EVENT))",
    }, names


def kept(names: Names) -> Row:
    """One event made beforehand, and encoded each time."""
    event = names["Event"]
    made = {
        "STR": event(TEXT),
        "JSON": event(SMALL),
        "MANY": event(LINES),
        "FULL": event(TEXT, id="42", event="update"),
    }
    return {
        name: f"encode({variable})" for name, variable in zip(ITEMS, made, strict=True)
    }, {**names, **made}


def sse_starlette() -> Row:
    event = import_module("sse_starlette.event")
    return {
        "str": "ensure_bytes(TEXT, SEP)",
        "small JSON": "ensure_bytes(JSONServerSentEvent(SMALL), SEP)",
        "10 lines": "ensure_bytes(LINES, SEP)",
        NAMED: "ensure_bytes(ServerSentEvent(TEXT, id=ID, event=EVENT), SEP)",
    }, {**vars(event), "SEP": event.ServerSentEvent.DEFAULT_SEPARATOR}


def fastapi_sse() -> Row:
    event: Any = import_module("fastapi.sse").ServerSentEvent
    format_event: Any = import_module("fastapi.sse").format_sse_event
    jsonable: Any = import_module("fastapi.encoders").jsonable_encoder

    def encode(item: Any) -> Any:
        # fastapi.routing, less its search for NaN (0.165), which older ones lack.
        if isinstance(item, event):
            data = item.raw_data
            if data is None:
                data = json.dumps(jsonable(item.data))
            return format_event(
                data_str=data,
                event=item.event,
                id=item.id,
                retry=item.retry,
                comment=item.comment,
            )
        return format_event(data_str=json.dumps(jsonable(item)))

    return {
        # A str that is yielded as it is becomes JSON there.
        "str": "encode(Event(raw_data=TEXT))",
        "small JSON": "encode(SMALL)",
        "10 lines": "encode(Event(raw_data=LINES))",
        NAMED: "encode(Event(raw_data=TEXT, id=ID, event=EVENT))",
    }, {"encode": encode, "Event": event}


def timer(item: str, statement: str, names: Names) -> Timer:
    names = {**names, "TEXT": TEXT, "SMALL": SMALL, "LINES": LINES}
    names.update(ID="42", EVENT="update")
    # All have to say the same to a receiver.
    decoder = import_module("syncstream.protocol.sse").Decoder()
    (event,) = decoder.feed(eval(statement, dict(names)))
    data = json.loads(event.data) if item == "small JSON" else event.data
    assert data == ITEMS[item], (statement, event)
    name = ("update", "42") if item == NAMED else (None, None)
    assert (event.event, event.id) == name, (statement, event)
    return Timer(statement, timer=time.process_time, globals=names)


def measure(
    timers: dict[tuple[str, str], Timer], rounds: int, seconds: float
) -> dict[tuple[str, str], list[float]]:
    """Return each one's times, seconds per event, one for each round."""
    counts = {}
    for key, clock in timers.items():
        clock.timeit(1000)  # warm: the interpreter specialises
        counts[key] = max(1000, round(seconds / (clock.timeit(2000) / 2000)))
    times: dict[tuple[str, str], list[float]] = {key: [] for key in timers}
    for _ in range(rounds):
        for key, clock in timers.items():
            times[key].append(clock.timeit(counts[key]) / counts[key])
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="seconds, for CI")
    is_quick = parser.parse_args().quick
    rounds, seconds = (5, 0.03) if is_quick else (11, 0.12)
    timers = {
        (library, item): timer(item, statements[item], names)
        for library, (statements, names) in rows().items()
        for item in ITEMS
    }
    print(describe("orjson", "sse-starlette", "fastapi"))
    times = measure(timers, rounds, seconds)

    def faster(library: str, item: str) -> float:
        pairs = zip(times[RIVAL, item], times[library, item], strict=True)
        return median(rival / own for rival, own in pairs)

    table(times, faster, rounds)
    for library, item, target in TARGETS:
        ratio = faster(library, item)
        print(
            f"{verdict(ratio >= target):11} {library}, {item}: {ratio:.1f} times"
            f" {RIVAL}, target {target:g}"
        )


def table(
    times: dict[tuple[str, str], list[float]],
    faster: Callable[[str, str], float],
    rounds: int,
) -> None:
    print(f"\nmedian of {rounds} rounds: events/s of CPU time (µs), times {RIVAL}\n")
    print("| yielded | " + " | ".join(ITEMS) + " |")
    print("|---|" + "---:|" * len(ITEMS))
    for library in dict.fromkeys(library for library, _ in times):
        cells = []
        for item in ITEMS:
            took = median(times[library, item])
            cells.append(
                f"{1 / took:,.0f} ({took * 1e6:.2f}) x{faster(library, item):.1f}"
            )
        print(f"| {library} | " + " | ".join(cells) + " |")
    print()


if __name__ == "__main__":
    main()
