"""Typed items: what each becomes in each format, with orjson and without.

The other rows of the table of docs/usage.md are in tests/protocol.
"""

import dataclasses
import datetime
import decimal
import enum
import json
import uuid
from contextvars import Context

import attrs
import msgspec
import numpy
import pydantic
import pytest
from django.utils.functional import lazystr
from pydantic.alias_generators import to_camel

import syncstream.django
from syncstream import NDJSONResponse, SSEResponse, StreamResponse
from syncstream.protocol import event as event_module
from syncstream.protocol import json as json_module
from tests.apps import django_app

assert callable(django_app.app)  # it configures Django

UTC = datetime.timezone.utc
NOON = datetime.datetime(2026, 1, 2, 12, 0, 0, 5000, tzinfo=UTC)
DAY = datetime.date(2026, 1, 2)
CLOCK = datetime.time(3, 4, 5, 6000)
ID = uuid.UUID(int=7)
PRICE = decimal.Decimal("1.50")


class Colour(enum.Enum):
    RED = "red"


class Number(enum.IntEnum):
    ONE = 1


class Inner(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(alias_generator=to_camel, populate_by_name=True)
    unit_price: decimal.Decimal


class Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(alias_generator=to_camel, populate_by_name=True)
    sold_at: datetime.datetime
    item_id: uuid.UUID
    colour: Colour
    inner: Inner


class Root(pydantic.RootModel[list[Inner]]):
    pass


@pydantic.dataclasses.dataclass(config={"alias_generator": to_camel})
class Validated:
    unit_price: decimal.Decimal


class Struct(msgspec.Struct, rename="camel", tag_field="kind", tag="sale"):
    sold_at: datetime.datetime
    item_id: uuid.UUID
    unit_price: decimal.Decimal
    colour: Colour
    inner: Inner | None = None


class Row(msgspec.Struct, array_like=True):
    day: datetime.date
    n: int


@attrs.define
class Attrs:
    unit_price: decimal.Decimal
    sold_at: datetime.datetime


@dataclasses.dataclass
class Point:
    unit_price: decimal.Decimal
    sold_at: datetime.datetime
    colour: Colour = Colour.RED


ISO, DJANGOS = '"2026-01-02T12:00:00.005000+00:00"', '"2026-01-02T12:00:00.005Z"'
PYDANTICS = '"2026-01-02T12:00:00.005000Z"'
ONE = f'"{ID}"'
INNER = Inner(unit_price=PRICE)
OF_INNER = '{"unitPrice":"1.50"}'
OF_MODEL = f'{{"soldAt":{PYDANTICS},"itemId":{ONE},"colour":"red","inner":{OF_INNER}}}'
OF_STRUCT = (
    f'{{"kind":"sale","soldAt":{PYDANTICS},"itemId":{ONE},"unitPrice":"1.50",'
    f'"colour":"red","inner":{OF_INNER}}}'
)


def row(name, item, text, in_django=None):
    """Make a row: an item, its JSON, and that in a response of Django's if it differs.

    A dict, as JSON for which the item's value is put in.
    """
    return pytest.param(item, text, in_django or text, id=name)


# fmt: off
ROWS = [
    row("pydantic model, by alias", Model(sold_at=NOON, item_id=ID, colour="red",
                                          inner=INNER), OF_MODEL),
    row("pydantic root model", Root([INNER]), f"[{OF_INNER}]"),
    row("pydantic dataclass, by alias", Validated(unitPrice=PRICE), OF_INNER),
    row("msgspec struct, renamed", Struct(NOON, ID, PRICE, Colour.RED, INNER),
        OF_STRUCT),
    row("msgspec struct like an array", Row(DAY, 1), '["2026-01-02",1]'),
    row("attrs", Attrs(PRICE, NOON),
        f'{{"unit_price":"1.50","sold_at":{ISO}}}',
        f'{{"unit_price":"1.50","sold_at":{DJANGOS}}}'),
    row("dataclass", Point(PRICE, NOON),
        f'{{"unit_price":"1.50","sold_at":{ISO},"colour":"red"}}',
        f'{{"unit_price":"1.50","sold_at":{DJANGOS},"colour":"red"}}'),
    row("Decimal", PRICE, '"1.50"'),
    row("datetime", NOON, ISO, DJANGOS),
    row("naive datetime", NOON.replace(tzinfo=None), '"2026-01-02T12:00:00.005000"',
        '"2026-01-02T12:00:00.005"'),
    row("date", DAY, '"2026-01-02"'),
    row("time", CLOCK, '"03:04:05.006000"', '"03:04:05.006"'),
    row("UUID", ID, ONE),
    row("Enum", Colour.RED, '"red"'),
    row("IntEnum", Number.ONE, "1"),
    row("numpy int", numpy.int64(3), "3"),
    row("numpy uint8", numpy.uint8(3), "3"),
    row("numpy float", numpy.float64(1.5), "1.5"),
    row("numpy float32", numpy.float32(0.5), "0.5"),
    row("numpy NaN", numpy.float64("nan"), "null"),
    row("numpy bool", numpy.bool_(True), "true"),
    row("numpy array", numpy.array([[1, 2]]), "[[1,2]]"),
    row("lazy string", lazystr("hello"), '"hello"'),
]
# fmt: on
UNKNOWN = [object(), 1j, {1, 2}, range(2), numpy.datetime64("2026-01-02")]
IN_DJANGO = (syncstream.django.SSEResponse, syncstream.django.NDJSONResponse)
FORMATS = (SSEResponse, NDJSONResponse, *IN_DJANGO)
FRAME = {"SSEResponse": ("data: ", "\n\n"), "NDJSONResponse": ("", "\n")}


@pytest.fixture(params=["orjson", "standard library"], autouse=True)
def _encoder(request, monkeypatch):
    """The default encoders as they are, and as they are without orjson."""
    assert json_module.orjson is not None
    if request.param == "orjson":
        return
    monkeypatch.setattr(json_module, "orjson", None)
    monkeypatch.setattr(json_module, "default_dumps", json_module.dumps_standard)
    monkeypatch.setattr(event_module, "default_dumps", json_module.dumps_standard)
    plain = json_module.making_dumps(syncstream.django._plain)
    monkeypatch.setattr(syncstream.django, "_dumps", plain)


def body_of(make, source, **options):
    def read():
        response = make(source, **options)
        body = getattr(response, "streaming_content", None) or response.response
        found = b"".join(body).decode()
        response.close()
        return found

    # An earlier test may have left its request of Django's in this context.
    return Context().run(read).removeprefix(": ok\n\n")


@pytest.mark.parametrize("make", FORMATS)
@pytest.mark.parametrize(("item", "text", "in_django"), ROWS)
def test_a_typed_item(make, item, text, in_django):
    """It is JSON, alone and within others, in events and in lines."""
    before, after = FRAME[make.__name__]
    expected = in_django if make in IN_DJANGO else text
    assert body_of(make, [item]) == f"{before}{expected}{after}"
    assert body_of(make, [{"a": [item]}]) == f'{before}{{"a":[{expected}]}}{after}'
    json.loads(expected, parse_constant=pytest.fail)


@pytest.mark.parametrize("make", FORMATS)
@pytest.mark.parametrize("item", UNKNOWN, ids=lambda item: type(item).__name__)
def test_what_nobody_knows(make, item):
    """The error is raised at the yield; it names the type, and what to do."""
    seen = []

    def source():
        for each in (item, {"a": [item]}):
            try:
                yield each
            except TypeError as error:
                seen.append(str(error))
                yield "after"

    assert body_of(make, source()).count("after") == 2
    name = f"{type(item).__module__}.{type(item).__qualname__}"
    assert len(seen) == 2
    for text in seen:
        assert f"cannot encode {name} as JSON" in text
        assert "pass dumps=" in text


@pytest.mark.parametrize("make", [StreamResponse, syncstream.django.StreamResponse])
@pytest.mark.parametrize(("item", "text", "in_django"), ROWS)
def test_a_raw_stream_has_no_types(make, item, text, in_django):
    """The error is raised at the yield; it shows the item, and names the cure."""
    seen = []

    def source():
        try:
            yield item
        except TypeError as error:
            seen.append(str(error))
            yield "after"

    assert body_of(make, source()) == "after"
    assert seen == [
        f"a chunk must be str, bytes or None, got {item!r} ({type(item).__qualname__}):"
        " yield its text, or return an NDJSONResponse, which sends JSON"
    ]


def test_an_encoder_of_the_applications_gets_the_items():
    """``dumps=`` is asked for all of them, and alone."""
    model = Model(sold_at=NOON, item_id=ID, colour="red", inner=INNER)
    for make in FORMATS:
        seen = []

        def dumps(value, seen=seen):
            seen.append(value)
            return '"encoded"'

        def source():
            yield from (PRICE, NOON, Colour.RED, model)

        assert body_of(make, source(), dumps=dumps).count("encoded") == 4
        assert seen == [PRICE, NOON, Colour.RED, model]
