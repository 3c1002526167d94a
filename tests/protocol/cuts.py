"""The ways to cut the bytes that a decoder reads."""

from __future__ import annotations

import random

__all__ = ["cut_at", "cuts"]


def cut_at(wire: bytes, places: list[int]) -> list[bytes]:
    """Cut wire at places (taken modulo its length; equal ones give empty chunks)."""
    ends = sorted(place % (len(wire) + 1) for place in places)
    starts = [0, *ends]
    return [
        wire[start:end] for start, end in zip(starts, [*ends, len(wire)], strict=True)
    ]


def cuts(wire: bytes, how: str) -> list[list[bytes]]:
    """Return the ways to cut wire: one for "whole" and "bytes", many for "random"."""
    if how == "whole":
        return [[wire]]
    if how == "bytes":
        return [[wire[i : i + 1] for i in range(len(wire))]]
    rng = random.Random(wire)
    return [
        cut_at(wire, [rng.randrange(len(wire) + 1) for _ in range(rng.randrange(1, 9))])
        for _ in range(20)
    ]
