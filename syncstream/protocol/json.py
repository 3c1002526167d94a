"""Values as compact JSON text, the same with and without the ``fast`` extra.

If orjson (the ``fast`` extra) is installed, it encodes first; values that it refuses
(integers beyond 64 bits, keys that are not strings) go to the standard library. Their
texts differ only in the exponent of a float (``1e-7``, ``1e-07``). Both write NaN and
the infinities as ``null``, as `JSON.stringify
<https://tc39.es/ecma262/#sec-json.stringify>`_ does.
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

__all__ = [
    "Dumps",
    "as_mapping",
    "default_dumps",
    "dumps_or_default",
    "is_array",
    "making_dumps",
]

Dumps = Callable[[Any], "str | bytes"]
"""A JSON encoder: it takes one value and returns its text."""


def as_mapping(value: Any) -> Any:
    """Return the fields of a record object, by name.

    Record objects are dataclasses, objects of attrs, pydantic (2 and 1) and msgspec,
    Django models, classes mapped by SQLAlchemy and its rows, and peewee models. Each
    library is recognised by the attributes of its classes; none is imported.

    Returns:
        A dict, or ``None`` for any other object. For a pydantic ``RootModel``, its
        root, of any type. Names are those of the JSON: the aliases of pydantic's
        models and dataclasses, msgspec's renamed fields.
    """
    kind = value.__class__  # not type(): a proxy shows the class of its object here
    # SQLAlchemy before pydantic: a SQLModel is both, and pydantic's dump of an expired
    # row is empty.
    if hasattr(kind, "__mapper__"):  # reading an attribute loads it
        names = [attribute.key for attribute in kind.__mapper__.column_attrs]
        return {name: getattr(value, name) for name in names}
    if hasattr(kind, "model_fields") and hasattr(kind, "model_dump"):  # pydantic 2
        return value.model_dump(mode="json", by_alias=True)
    if hasattr(kind, "__fields_set__") and hasattr(kind, "__fields__"):  # pydantic 1
        return json.loads(value.json(by_alias=True))
    if hasattr(kind, "__struct_fields__"):  # msgspec, with its renamed fields
        if type(value) is not kind:  # msgspec refuses proxies
            encoded = kind.__struct_encode_fields__
            fields = [getattr(value, name) for name in kind.__struct_fields__]
            return dict(zip(encoded, fields, strict=True))
        return sys.modules["msgspec"].to_builtins(value, enc_hook=_plain)
    if hasattr(kind, "__attrs_attrs__"):
        return {f.name: getattr(value, f.name) for f in kind.__attrs_attrs__}
    serializer: Any = getattr(kind, "__pydantic_serializer__", None)
    if serializer is not None and type(value) is kind:  # its dataclasses: no proxies
        return serializer.to_python(value, mode="json", by_alias=True)
    if dataclasses.is_dataclass(kind) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(kind)}
    options: Any = getattr(kind, "_meta", None)
    if hasattr(options, "concrete_fields"):  # Django: the same fields as values()
        deferred = value.get_deferred_fields()
        names = [field.attname for field in options.concrete_fields]
        return {name: getattr(value, name) for name in names if name not in deferred}
    if hasattr(options, "sorted_field_names"):  # peewee
        return dict(value.__data__)
    if hasattr(kind, "_mapping") and isinstance(value._mapping, Mapping):
        return dict(value._mapping.items())  # a row of SQLAlchemy's
    return None


def is_array(value: Any) -> bool:
    """Tell whether an object is an array (numpy's, a buffer, a tensor), whose ``.data``
    is memory and no event data.
    """
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
    # Kinds b, i, u and f are JSON's types, U and O are text and objects. tolist() would
    # turn dates into bare numbers, and complex numbers and bytes into values that JSON
    # lacks. (Tensors' dtypes have no kind, and are numbers.)
    if getattr(value.dtype, "kind", "f") in "biufUO":
        listed = value.tolist()
        if type(listed) is not type(value):  # numpy.longdouble stays one
            return listed
    return value


def _plain(value: Any) -> Any:
    """Turn a value of a type that JSON lacks into one of JSON's types."""
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
        return str(value)  # a lazy translation
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
        " yield text or a dict instead, or pass dumps="
    )


def _standard(plain: Callable[[Any], Any]) -> Callable[[Any], str]:
    encode = json.JSONEncoder(
        separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=plain
    ).encode
    encode_nan = json.JSONEncoder(ensure_ascii=False, default=plain).encode

    def dumps_standard(value: Any) -> str:
        try:
            try:
                return encode(value)
            except ValueError:
                # NaN or an infinity. (A circular structure fails again, with its
                # error.)
                text = encode_nan(value)
                return encode(json.loads(text, parse_constant=lambda _: None))
        except RecursionError:
            raise ValueError("cannot encode as JSON: nested too deeply") from None

    return dumps_standard


# We encode these types ourselves, because orjson would write something else: it leaves
# out a dataclass's fields that begin with "_", rounds a UTC offset to minutes, and
# bypasses a dict subclass's items() (Werkzeug's MultiDict, Django's QueryDict).
_OPTIONS = (
    0
    if orjson is None
    else orjson.OPT_PASSTHROUGH_DATACLASS
    | orjson.OPT_PASSTHROUGH_DATETIME
    | orjson.OPT_PASSTHROUGH_SUBCLASS
)


def _fast(plain: Callable[[Any], Any]) -> Callable[[Any], bytes]:
    dumps, standard, options = orjson.dumps, _standard(plain), _OPTIONS

    def dumps_orjson(value: Any) -> bytes:
        try:
            return dumps(value, plain, options)
        except TypeError:
            return standard(value).encode()

    return dumps_orjson


def making_dumps(first: Callable[[Any], Any]) -> Dumps:
    """Return a JSON encoder that asks a function first for what JSON has no type for.

    Args:
        first: Returns a value of JSON's types, or the object that it got.
    """

    def plain(value: Any) -> Any:
        found = first(value)
        return _plain(value) if found is value else found

    return _standard(plain) if orjson is None else _fast(plain)


dumps_standard = _standard(_plain)
dumps_orjson: Dumps | None = None if orjson is None else _fast(_plain)
default_dumps: Dumps = dumps_orjson or dumps_standard


def dumps_or_default(dumps: Dumps | None) -> Dumps:
    """Return the given JSON encoder, or the default.

    Raises:
        TypeError: ``dumps`` is not callable.
    """
    if dumps is not None and not callable(dumps):
        raise TypeError(f"dumps must be callable, got {dumps!r}")
    return dumps or default_dumps
