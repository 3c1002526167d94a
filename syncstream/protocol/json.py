"""Values as compact JSON text, the same with and without the ``fast`` extra.

orjson (the ``fast`` extra) is tried first where it is installed; what it refuses
and the standard library knows (integers beyond 64 bits, keys that are not
strings) is given to the standard library. The texts differ in how they spell the
exponent of a float (``1e-7``, ``1e-07``), in nothing else. Both write what
`JSON.stringify <https://tc39.es/ecma262/#sec-json.stringify>`_ writes for NaN and
the infinities: ``null``.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import json
import uuid
from collections.abc import Callable, Mapping
from typing import Any

try:
    import orjson
except ImportError:
    orjson = None  # type: ignore[assignment]

__all__ = ["Dumps", "default_dumps", "dumps_or_default"]

Dumps = Callable[[Any], "str | bytes"]
"""A JSON encoder: one value in, its text out."""


def _plain(value: Any) -> Any:
    """Turn what JSON has no word for into what it has."""
    if isinstance(value, Mapping):
        return dict(value.items())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (uuid.UUID, decimal.Decimal)):
        return str(value)
    kind = type(value)
    raise TypeError(
        f"cannot encode {kind.__module__}.{kind.__qualname__} as JSON:"
        " yield its text, or give dumps="
    )


_encode = json.JSONEncoder(
    separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=_plain
).encode
_encode_nan = json.JSONEncoder(ensure_ascii=False, default=_plain).encode


def _dumps_standard(value: Any) -> str:
    try:
        return _encode(value)
    except ValueError:
        # NaN or an infinity. (A circular structure fails again, for itself.)
        return _encode(json.loads(_encode_nan(value), parse_constant=lambda _: None))


# Where orjson's own way would write something else: it leaves out a dataclass's
# fields that begin with "_", rounds a UTC offset to minutes, and reads a dict
# subclass past its items() (Werkzeug's MultiDict, Django's QueryDict).
_OPTIONS = (
    0
    if orjson is None
    else orjson.OPT_PASSTHROUGH_DATACLASS
    | orjson.OPT_PASSTHROUGH_DATETIME
    | orjson.OPT_PASSTHROUGH_SUBCLASS
)


def _dumps_orjson(value: Any) -> bytes:
    try:
        return orjson.dumps(value, _plain, _OPTIONS)
    except TypeError:
        return _dumps_standard(value).encode()


default_dumps: Dumps = _dumps_standard if orjson is None else _dumps_orjson


def dumps_or_default(dumps: Dumps | None) -> Dumps:
    """Return the encoder to use.

    Raises:
        TypeError: ``dumps`` cannot be called.
    """
    if dumps is not None and not callable(dumps):
        raise TypeError(f"dumps must be callable, got {dumps!r}")
    return dumps or default_dumps
