"""Values as JSON: the same with orjson and without it."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import json
import math
import subprocess
import sys
import types
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from werkzeug.datastructures import MultiDict

from syncstream.protocol.json import default_dumps, dumps_orjson, dumps_standard

pytest.importorskip("orjson", reason="compares with orjson: pip install orjson")

MANY = settings(max_examples=300)
UTC = datetime.timezone.utc


class Colour(enum.Enum):
    RED = "red"
    NOTHING = None
    PAIR = (1, 2)
    OBJECT = object()


class Word(str, enum.Enum):
    A = "a"


class Number(enum.IntEnum):
    ONE = 1


class Flags(enum.Flag):
    X = 1
    Y = 2


class Text(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "printed otherwise"


class Whole(int):
    __slots__ = ()


class Real(float):
    __slots__ = ()


class Items(list):  # type: ignore[type-arg]
    pass


class Upper(dict):  # type: ignore[type-arg]
    """A dict whose items are not what it stores."""

    def items(self) -> Any:
        return [(key.upper(), value) for key, value in super().items()]


class Moment(datetime.datetime):
    def isoformat(self, *args: Any, **kwargs: Any) -> str:
        return "now"


class Record(Mapping[Any, Any]):
    def __init__(self, items: dict[Any, Any]) -> None:
        self._items = items

    def __getitem__(self, key: Any) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


Pair = collections.namedtuple("Pair", "a b")


@dataclasses.dataclass
class Point:
    x: Any
    _hidden: Any = None


@dataclasses.dataclass(slots=True, frozen=True)
class Slotted:
    x: Any
    unused: dataclasses.InitVar[int] = 3
    everywhere = 5


@dataclasses.dataclass
class Stored(dict):  # type: ignore[type-arg]
    """A dict first."""

    x: int = 1


def nested(depth: int, wrap: Any) -> Any:
    value: Any = None
    for _ in range(depth):
        value = wrap(value)
    return value


CIRCLE: list[Any] = []
CIRCLE.append(CIRCLE)


def tz(**offset: int) -> datetime.timezone:
    return datetime.timezone(datetime.timedelta(**offset))


def row(name: str, value: Any, text: str) -> Any:
    return pytest.param(value, text, id=name)


# fmt: off
WRITTEN = [
    row("null", None, "null"),
    row("true", True, "true"),
    row("false", False, "false"),
    row("zero", 0, "0"),
    row("int", -7, "-7"),
    row("int 2**53 + 1", 2**53 + 1, "9007199254740993"),
    row("int 2**63", 2**63, "9223372036854775808"),
    row("int 2**64 - 1", 2**64 - 1, "18446744073709551615"),
    row("int 2**64", 2**64, "18446744073709551616"),
    row("int -2**63 - 1", -(2**63) - 1, "-9223372036854775809"),
    row("int 10**100", 10**100, "1" + "0" * 100),
    row("int big within", {"a": [2**70]}, '{"a":[1180591620717411303424]}'),
    row("float", 1.5, "1.5"),
    row("float whole", 1.0, "1.0"),
    row("float -0.0", -0.0, "-0.0"),
    row("float 0.1 + 0.2", 0.1 + 0.2, "0.30000000000000004"),
    row("float 1e16", 1e16, "1e+16"),
    row("float largest", 1.7976931348623157e308, "1.7976931348623157e+308"),
    row("float smallest", 5e-324, "5e-324"),
    row("NaN", math.nan, "null"),
    row("Infinity", math.inf, "null"),
    row("-Infinity", -math.inf, "null"),
    row("NaN within", {"a": [math.nan, 1.5, {"b": math.inf}]},
        '{"a":[null,1.5,{"b":null}]}'),
    row("NaN and a big int", [math.nan, 2**70], "[null,1180591620717411303424]"),
    row("NaN and what is not JSON's", [math.nan, Colour.RED, Record({"a": Point(1)})],
        '[null,"red",{"a":{"x":1,"_hidden":null}}]'),
    row("NaN and text", [math.nan, "NaN", "é\u2028"], '[null,"NaN","é\u2028"]'),
    row("text", "a", '"a"'),
    row("text empty", "", '""'),
    row("text quoted", '"\\/', '"\\"\\\\/"'),
    row("text controls", "\b\f\n\r\t\x00\x1f\x7f",
        '"\\b\\f\\n\\r\\t\\u0000\\u001f\x7f"'),
    row("text not ASCII", "é€😀\u2028\u2029\x85", '"é€😀\u2028\u2029\x85"'),
    row("text HTML", "</script>&", '"</script>&"'),
    row("list", [1, [2, []]], "[1,[2,[]]]"),
    row("tuple", (1, (2, ())), "[1,[2,[]]]"),
    row("dict", {"b": 1, "a": {}}, '{"b":1,"a":{}}'),
    row("key int", {1: 2}, '{"1":2}'),
    row("key None", {None: 2}, '{"null":2}'),
    row("key bool", {True: 1, False: 0}, '{"true":1,"false":0}'),
    row("key float", {1.5: 2}, '{"1.5":2}'),
    row("key IntEnum", {Number.ONE: 2}, '{"1":2}'),
    row("key str enum", {Word.A: 2}, '{"a":2}'),
    row("key str subclass", {Text("a"): 2}, '{"a":2}'),
    row("key not str, deep", [{"a": {1: Colour.RED}}], '[{"a":{"1":"red"}}]'),
    row("key int and dataclass", {1: Point(2)}, '{"1":{"x":2,"_hidden":null}}'),
    row("str subclass", Text("a"), '"a"'),
    row("int subclass", Whole(5), "5"),
    row("float subclass", Real(1.5), "1.5"),
    row("list subclass", Items([1]), "[1]"),
    row("namedtuple", Pair(1, "b"), '[1,"b"]'),
    row("dict subclass", collections.OrderedDict(b=1, a=2), '{"b":1,"a":2}'),
    row("dict subclass with its own items", Upper(a=1), '{"A":1}'),
    row("dict subclass within", [{"a": Upper(b=Upper(c=1))}], '[{"a":{"B":{"C":1}}}]'),
    row("Werkzeug's MultiDict", MultiDict([("a", "1"), ("a", "2")]), '{"a":"1"}'),
    row("defaultdict", collections.defaultdict(int, a=1), '{"a":1}'),
    row("Counter", collections.Counter("aab"), '{"a":2,"b":1}'),
    row("MappingProxyType", types.MappingProxyType({"a": 1}), '{"a":1}'),
    row("UserDict", collections.UserDict(a=1), '{"a":1}'),
    row("ChainMap", collections.ChainMap({"a": 1}), '{"a":1}'),
    row("Mapping", Record({"a": 1}), '{"a":1}'),
    row("Mapping with int keys", Record({1: 2}), '{"1":2}'),
    row("dataclass", Point(1), '{"x":1,"_hidden":null}'),
    row("dataclass nested", Point(Point([Point(1)]), 2),
        '{"x":{"x":[{"x":1,"_hidden":null}],"_hidden":null},"_hidden":2}'),
    row("dataclass with slots", Slotted(1), '{"x":1}'),
    row("dataclass of NaN", Point(math.nan), '{"x":null,"_hidden":null}'),
    row("dataclass of a big int", Point(2**64),
        '{"x":18446744073709551616,"_hidden":null}'),
    row("dataclass that is a dict", Stored(), "{}"),
    row("datetime", datetime.datetime(2026, 1, 2, 3, 4, 5), '"2026-01-02T03:04:05"'),
    row("datetime with microseconds", datetime.datetime(2026, 1, 2, 3, 4, 5, 60),
        '"2026-01-02T03:04:05.000060"'),
    row("datetime in UTC", datetime.datetime(2026, 1, 2, tzinfo=UTC),
        '"2026-01-02T00:00:00+00:00"'),
    row("datetime with an offset", datetime.datetime(2026, 1, 2, tzinfo=tz(hours=-8)),
        '"2026-01-02T00:00:00-08:00"'),
    row("datetime with an offset of seconds",
        datetime.datetime(1890, 1, 2, tzinfo=tz(minutes=19, seconds=32)),
        '"1890-01-02T00:00:00+00:19:32"'),
    row("datetime of the year 1", datetime.datetime(1, 1, 1), '"0001-01-01T00:00:00"'),
    row("datetime subclass", Moment(2026, 1, 2), '"now"'),
    row("date", datetime.date(2026, 1, 2), '"2026-01-02"'),
    row("time", datetime.time(3, 4), '"03:04:00"'),
    row("time with microseconds", datetime.time(3, 4, 5, 6), '"03:04:05.000006"'),
    row("time in UTC", datetime.time(3, 4, tzinfo=UTC), '"03:04:00+00:00"'),
    row("UUID", uuid.UUID(int=255), '"00000000-0000-0000-0000-0000000000ff"'),
    row("Decimal", decimal.Decimal("1.50"), '"1.50"'),
    row("Decimal NaN", decimal.Decimal("NaN"), '"NaN"'),
    row("Decimal exponent", decimal.Decimal("1E+3"), '"1E+3"'),
    row("Enum", Colour.RED, '"red"'),
    row("Enum of None", Colour.NOTHING, "null"),
    row("Enum of a tuple", Colour.PAIR, "[1,2]"),
    row("Enum and str", Word.A, '"a"'),
    row("IntEnum", Number.ONE, "1"),
    row("Flag", Flags.X | Flags.Y, "3"),
    row("nested 300 lists", nested(300, lambda v: [v]), "[" * 300 + "null" + "]" * 300),
    row("nested 100 dataclasses", nested(100, Slotted),
        '{"x":' * 100 + "null" + "}" * 100),
]


def refused(name: str, value: Any, error: type, message: str) -> Any:
    return pytest.param(value, error, message, id=name)


REFUSED = [
    refused("object", object(), TypeError, "cannot encode builtins.object as JSON"),
    refused("object within", [{"a": object()}], TypeError, "builtins.object as JSON"),
    refused("object in an Enum", Colour.OBJECT, TypeError, "builtins.object as JSON"),
    refused("set", {1}, TypeError, "cannot encode builtins.set as JSON"),
    refused("frozenset", frozenset(), TypeError, "builtins.frozenset as JSON"),
    refused("bytes", b"a", TypeError, "cannot encode builtins.bytes as JSON"),
    refused("memoryview", memoryview(b"a"), TypeError, "builtins.memoryview as JSON"),
    refused("complex", 1j, TypeError, "builtins.complex as JSON"),
    refused("range", range(3), TypeError, "builtins.range as JSON"),
    refused("deque", collections.deque(), TypeError, "collections.deque as JSON"),
    refused("dataclass type", Point, TypeError, "builtins.type as JSON"),
    refused("timedelta", datetime.timedelta(1), TypeError,
            "datetime.timedelta as JSON"),
    refused("own class", Record({"a": types.SimpleNamespace()}), TypeError,
            "types.SimpleNamespace as JSON: yield text or a dict instead, or pass"
            " dumps="),
    refused("object next to NaN", [math.nan, object()], TypeError, "builtins.object"),
    refused("object next to a big int", [2**70, object()], TypeError,
            "builtins.object"),
    refused("key tuple", {(1,): 2}, TypeError, "keys must be"),
    refused("key bytes", {b"a": 2}, TypeError, "keys must be"),
    refused("key UUID", {uuid.UUID(int=1): 2}, TypeError, "keys must be"),
    refused("key date", {datetime.date(2026, 1, 2): 2}, TypeError, "keys must be"),
    refused("key Enum", {Colour.RED: 2}, TypeError, "keys must be"),
    refused("circle", CIRCLE, ValueError, "Circular reference"),
    refused("circle and NaN", [math.nan, CIRCLE], ValueError, "Circular reference"),
    refused("lone surrogate", "a\ud800", ValueError, "surrogates not allowed"),
    refused("lone surrogate within", {"a": ["\udfff"]}, ValueError, "surrogates not"),
    refused("lone surrogate as a key", {"\ud800": 1}, ValueError, "surrogates not"),
    refused("surrogate pair", "\ud83d\ude00", ValueError, "surrogates not allowed"),
    refused("int beyond what Python prints", 10**5000, ValueError, "integer string"),
]
# fmt: on


def standard(value: Any) -> str:
    """Encode without orjson, up to the wire: a lone surrogate fails there."""
    return dumps_standard(value).encode().decode()  # type: ignore[attr-defined]


def fast(value: Any) -> str:
    return dumps_orjson(value).decode()


BOTH = pytest.mark.parametrize("dumps", [standard, fast])


@BOTH
@pytest.mark.parametrize(("value", "text"), WRITTEN)
def test_writes(value: Any, text: str, dumps: Any) -> None:
    """Each value is written in exactly this text, with orjson and without."""
    assert dumps(value) == text
    json.loads(text, parse_constant=pytest.fail)


@BOTH
@pytest.mark.parametrize(("value", "error", "message"), REFUSED)
def test_refuses(value: Any, error: type[Exception], message: str, dumps: Any) -> None:
    """What JSON cannot carry is refused alike, with orjson and without."""
    with pytest.raises(error, match=message):
        dumps(value)


@BOTH
def test_too_deep(dumps: Any) -> None:
    """A value nested too deep is a `ValueError`, not a crash; with a NaN in it, too."""
    for value in ([], [math.nan]):
        with pytest.raises(
            ValueError, match="cannot encode as JSON: nested too deeply"
        ):
            dumps([value, nested(100_000, lambda value: [value])])


@BOTH
@pytest.mark.parametrize("value", [1e-5, 1e-6, 1e-7, 1.5e-9, 1e22, 1e-300])
def test_exponents(value: float, dumps: Any) -> None:
    """A float's exponent may be spelled otherwise; the number is the same."""
    assert json.loads(dumps(value)) == value
    assert json.loads(dumps([value, math.nan])) == [value, None]


def test_default_is_orjson_where_it_is_installed() -> None:
    """`default_dumps` uses orjson where that is installed."""
    assert default_dumps is dumps_orjson


def test_works_without_orjson() -> None:
    """Without orjson the default is the standard library's, and says the same."""
    program = (
        "import sys; sys.modules['orjson'] = None\n"
        "from syncstream.protocol import json, sse\n"
        "assert json.default_dumps is json.dumps_standard\n"
        "assert sse.encoder()({'a': [1, 2]}) == b'data: {\"a\":[1,2]}\\n\\n'\n"
        "assert sse.Event({'a': float('nan')}).json() == {'a': None}\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(),
    st.uuids(),
    st.decimals(),
    st.dates(),
    st.times(),
    st.times(timezones=st.just(UTC)),
    st.datetimes(),
    st.datetimes(
        timezones=st.timedeltas(
            datetime.timedelta(hours=-23), datetime.timedelta(hours=23)
        ).map(datetime.timezone)
    ),
    st.sampled_from([Colour.RED, Colour.NOTHING, Word.A, Number.ONE, Flags.Y]),
    st.text().map(Text),
    st.integers().map(Whole),
    st.floats().map(Real),
)
KEYS = st.one_of(
    st.text(), st.integers(), st.booleans(), st.none(), st.text().map(Text)
)
ODD = st.sampled_from([object(), {1}, b"a", 1j, "\ud800"])


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    texts = st.dictionaries(st.text(), inner, max_size=4)
    return st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.lists(inner, max_size=4).map(Items),
        texts,
        texts.map(collections.OrderedDict),
        texts.map(Upper),
        texts.map(Record),
        texts.map(types.MappingProxyType),
        st.dictionaries(KEYS, inner, max_size=4),
        st.dictionaries(KEYS, inner, max_size=4).map(Record),
        st.builds(Point, inner, inner),
        st.builds(Slotted, inner),
        st.builds(Pair, inner, inner),
    )


VALUES = st.recursive(SCALARS, containers, max_leaves=15)


def read(text: str) -> Any:
    """Read JSON strictly, floats kept apart from integers, key order and all."""
    return json.loads(
        text,
        parse_constant=pytest.fail,
        parse_float=lambda digits: ("float", float(digits).hex()),
        object_pairs_hook=lambda pairs: ("object", pairs),
    )


def unique(pairs: Any) -> Any:
    """Drop the repeated keys ({1: …, "1": …}) as any reader does."""
    if isinstance(pairs, tuple) and pairs[0] == "object":
        return ("object", {key: unique(value) for key, value in pairs[1]})
    return [unique(item) for item in pairs] if isinstance(pairs, list) else pairs


@MANY
@given(VALUES)
def test_both_write_the_same(value: Any) -> None:
    """Any value is the same JSON with orjson and without, and is standard JSON."""
    one, other = standard(value), fast(value)
    assert unique(read(one)) == unique(read(other))
    assert "\n" not in one + other
    assert "\r" not in one + other


@MANY
@given(st.recursive(st.one_of(SCALARS, ODD), containers, max_leaves=8))
def test_both_refuse_the_same(value: Any) -> None:
    """What one refuses the other refuses too, with the same kind of error."""

    def outcome(dumps: Any) -> Any:
        try:
            dumps(value)
        except (TypeError, ValueError) as error:
            return type(error), str(error).split(" ")[0]
        return None

    assert outcome(standard) == outcome(fast)
