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
import sys
import uuid
from collections.abc import Callable, Mapping
from typing import Any

try:
    import orjson
except ImportError:
    orjson = None  # type: ignore[assignment]

__all__ = ["Dumps", "as_mapping", "default_dumps", "dumps_or_default", "is_array"]

Dumps = Callable[[Any], "str | bytes"]
"""A JSON encoder: one value in, its text out."""


def as_mapping(value: Any) -> Any:
    """Return the fields of an object that is a record of them, by name.

    A dataclass, an object of attrs, pydantic (2 and 1) or msgspec, a Django model, a
    class mapped by SQLAlchemy or one of its rows, a peewee model. Each library is
    recognised by what it leaves in its classes, and none is imported.

    Returns:
        A dict, or ``None`` for any other object. A pydantic ``RootModel`` is its root,
        whatever that is.
    """
    kind = value.__class__  # not type(): of a proxy, what it stands for
    # First: a SQLModel is a pydantic model whose dump of an expired row is empty.
    if hasattr(kind, "__mapper__"):  # SQLAlchemy's; what is not loaded is loaded
        names = [attribute.key for attribute in kind.__mapper__.column_attrs]
        return {name: getattr(value, name) for name in names}
    if hasattr(kind, "model_fields") and hasattr(kind, "model_dump"):  # pydantic 2
        return value.model_dump(mode="json")
    if hasattr(kind, "__fields_set__") and hasattr(kind, "__fields__"):  # pydantic 1
        return json.loads(value.json())
    if hasattr(kind, "__struct_fields__"):  # msgspec, with the names it encodes
        if type(value) is not kind:  # it takes no proxy
            encoded = kind.__struct_encode_fields__
            fields = [getattr(value, name) for name in kind.__struct_fields__]
            return dict(zip(encoded, fields, strict=True))
        return sys.modules["msgspec"].to_builtins(value, enc_hook=_plain)
    if hasattr(kind, "__attrs_attrs__"):
        return {f.name: getattr(value, f.name) for f in kind.__attrs_attrs__}
    if dataclasses.is_dataclass(kind) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(kind)}
    options: Any = getattr(kind, "_meta", None)
    if hasattr(options, "concrete_fields"):  # Django: what values() would give
        deferred = value.get_deferred_fields()
        names = [field.attname for field in options.concrete_fields]
        return {name: getattr(value, name) for name in names if name not in deferred}
    if hasattr(options, "sorted_field_names"):  # peewee
        return dict(value.__data__)
    if hasattr(kind, "_mapping") and isinstance(value._mapping, Mapping):
        return dict(value._mapping.items())  # a row of SQLAlchemy's
    return None


def is_array(value: Any) -> bool:
    """Tell whether an object's ``.data`` is memory: numpy's, a buffer's, a tensor's."""
    kind = value.__class__
    if hasattr(kind, "dtype") or hasattr(kind, "__array__"):
        return True
    try:
        memoryview(value).release()
    except (TypeError, ValueError, BufferError):
        return False
    return True


def _listed(value: Any) -> Any:
    """Return the numbers of an array, or the number of a scalar, of numpy's kind."""
    # b, i, u, f: what JSON has; U and O are text and objects. Of dates tolist() makes
    # plain numbers, of complex ones and bytes nothing that JSON has. (Tensors' dtypes
    # have no kind, and are numbers.)
    if getattr(value.dtype, "kind", "f") in "biufUO":
        listed = value.tolist()
        if type(listed) is not type(value):  # as numpy.longdouble stays one
            return listed
    return value


def _plain(value: Any) -> Any:
    """Turn what JSON has no word for into what it has."""
    if isinstance(value, Mapping):
        return dict(value.items())
    if isinstance(value, (tuple, list)):  # a proxy, or a subclass
        return list(value)
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (uuid.UUID, decimal.Decimal)):
        return str(value)
    lazy = sys.modules.get("django.utils.functional")
    if lazy is not None and isinstance(value, lazy.Promise):
        return str(value)  # a translation, made when it is sent
    kind = value.__class__
    if not isinstance(value, type):
        fields = as_mapping(value)
        if fields is not None:
            return fields
        if hasattr(kind, "dtype") and hasattr(kind, "tolist"):
            listed = _listed(value)
            if listed is not value:
                return listed
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
        try:
            return _encode(value)
        except ValueError:
            # NaN or an infinity. (A circular structure fails again, for itself.)
            text = _encode_nan(value)
            return _encode(json.loads(text, parse_constant=lambda _: None))
    except RecursionError:
        raise ValueError("cannot encode as JSON what is nested so deeply") from None


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
