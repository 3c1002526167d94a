"""Objects of other libraries that a generator yields: nothing of them is lost.

The libraries are the real ones; the package imports none of them.
"""

from __future__ import annotations

import array
import collections
import ctypes
import dataclasses
import datetime
import decimal
import enum
import json
import subprocess
import sys
import uuid
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import attrs
import msgspec
import numpy
import peewee
import pydantic
import pytest
import sqlalchemy
from django.utils.functional import SimpleLazyObject
from sqlalchemy import orm
from werkzeug.local import LocalProxy

from syncstream.protocol import ndjson, raw
from syncstream.protocol.sse import Decoder, Event, encoder
from tests import ROOT

WHEN = datetime.datetime(2026, 1, 2, 3, 4, 5)
ID = uuid.UUID(int=1)


@dataclasses.dataclass
class Plain:
    data: str
    price: float


@dataclasses.dataclass
class PlainEvent:
    data: Any
    event: str
    id: int = 7


@attrs.define
class Attrs:
    data: str
    price: float


@attrs.define
class AttrsEvent:
    data: Any
    event: str
    id: int = 7


class Struct(msgspec.Struct):
    data: str
    price: float


class StructOf(msgspec.Struct):
    value: Any


class StructEvent(msgspec.Struct):
    data: Any
    event: str
    id: int = 7


class Model(pydantic.BaseModel):
    data: str
    price: float


class ModelEvent(pydantic.BaseModel):
    data: Any
    event: str
    id: int = 7


class Extras(pydantic.BaseModel, extra="allow"):
    data: str


@pydantic.dataclasses.dataclass
class Validated:
    data: str
    price: float


class Tuple(NamedTuple):
    data: str
    price: float


class TupleEvent(NamedTuple):
    data: Any
    event: str
    id: int = 7


class Base(orm.DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "row"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    data: orm.Mapped[str]
    price: orm.Mapped[float]


class RowEvent(Base):
    __tablename__ = "row_event"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    data: orm.Mapped[str]
    event: orm.Mapped[str]


class Peewee(peewee.Model):
    data = peewee.TextField()
    price = peewee.FloatField()


FIELDS = {"data": "a", "price": 1.5}


def sent(item: Any, dumps: Any = None) -> Event:
    """Return the one event that a client gets of an item."""
    (event,) = Decoder().feed(encoder(dumps)(item) or b"")
    return event


@pytest.mark.parametrize("kind", [Plain, Attrs, Struct, Model, Validated, Extras])
def test_a_field_named_data_is_one_of_several(kind: Any) -> None:
    """An object with fields that no event has is JSON, with all of them."""
    item = kind(**FIELDS)
    event = sent(item)
    assert (event.json(), event.event, event.id) == (FIELDS, None, None)
    assert json.loads(ndjson.encoder()(item) or b"") == FIELDS
    assert sent({"within": [item]}).json() == {"within": [FIELDS]}


@pytest.mark.parametrize("proxy", [SimpleLazyObject, LocalProxy])
@pytest.mark.parametrize("kind", [Plain, Attrs, Struct, Model, Tuple])
def test_a_proxy_is_what_it_stands_for(kind: Any, proxy: Any) -> None:
    """Django's ``request.user`` and Flask's ``current_user`` are none by their type."""
    item, made = kind(**FIELDS), proxy(lambda: kind(**FIELDS))
    assert sent(made) == sent(item)
    assert sent({"within": made}).json() == sent({"within": item}).json()
    array_ = proxy(lambda: numpy.arange(3))
    assert sent(array_).json() == sent({"n": array_}).json()["n"] == [0, 1, 2]


@pytest.mark.parametrize("kind", [PlainEvent, AttrsEvent, StructEvent, ModelEvent])
def test_an_object_of_an_events_fields_is_an_event(kind: Any) -> None:
    """Where all fields are an event's the object is that event."""
    event = sent(kind(data={"n": 1}, event="e"))
    assert (event.json(), event.event, event.id) == ({"n": 1}, "e", "7")
    assert sent(kind(data="a\nb", event="e")).data == "a\nb"


@pytest.mark.parametrize("kind", [PlainEvent, AttrsEvent, StructEvent, ModelEvent])
def test_a_record_whose_data_is_null_is_not_lost(kind: Any) -> None:
    """It would send an id alone, which fires nothing: an error at the yield."""
    with pytest.raises(
        ValueError, match="is None, and a browser dispatches nothing without data"
    ):
        encoder()(kind(data=None, event="e"))


def test_a_lazy_text_of_django() -> None:
    """A translation is the text that it is when it is sent."""
    from django.utils.functional import lazystr

    assert sent({"title": lazystr("hello")}).json() == {"title": "hello"}


def test_named_tuples() -> None:
    """A named tuple is JSON as tuples are, unless all its fields are an event's."""
    assert sent(Tuple("a", 1.5)).json() == ["a", 1.5]
    event = sent(TupleEvent("a", "e"))
    assert (event.data, event.event, event.id) == ("a", "e", "7")


class Part(enum.Enum):
    text = "text"
    data = "data"
    error = "error"
    id = 7


class Bits(enum.Flag):
    data = 1
    event = 2


class Level(enum.IntEnum):
    data = 1
    retry = 2


class OfClass(NamedTuple):
    data: str
    if not TYPE_CHECKING:
        event = "class's"

        def comment(self) -> None: ...


class Degrees(float):
    data = "class's"


class Price(decimal.Decimal):
    data = "class's"


class Rows(list[int]):
    data = "class's"


class Day(datetime.date):
    data = "class's"


@pytest.mark.parametrize(
    ("item", "value"),
    [
        *((member, member.value) for member in (*Part, *Bits, *Level)),
        (Bits.data | Bits.event, 3),
        (LocalProxy(lambda: Part.error), "error"),
        (Degrees(1.5), 1.5),
        (Price("1.5"), "1.5"),
        (Rows([1, 2]), [1, 2]),
        (Day(2026, 1, 2), "2026-01-02"),
    ],
)
def test_what_a_class_defines_is_no_field(item: Any, value: Any) -> None:
    """A value is its JSON, also if a member or an attribute is called data."""
    event = sent(item)
    assert (event.json(), event.event, event.id) == (value, None, None)
    assert json.loads(ndjson.encoder()(item) or b"") == value
    assert sent(item, lambda item: f"<{item!r}>").data == f"<{item!r}>"


def test_a_named_tuple_has_the_fields_that_it_names() -> None:
    """No others, and a null is not lost."""
    assert encoder()(OfClass("a")) == b"data: a\n\n"
    with pytest.raises(ValueError, match="data of a TupleEvent is None"):
        encoder()(TupleEvent(None, "e"))


def test_methods_are_no_fields() -> None:
    """Such as the retry() of a job; data() makes an object no event."""

    class Job:
        data = "a"
        id = "7"

        def retry(self) -> None: ...

        event = comment = retry

    class Table:
        def data(self) -> None: ...

    event = sent(Job())
    assert (event.data, event.event, event.id) == ("a", None, "7")
    with pytest.raises(TypeError, match=r"cannot encode .*Table as JSON"):
        encoder()(Table())
    assert sent(Table(), lambda item: "table").data == "table"


def test_an_object_without_data_is_json() -> None:
    """Objects that JSON has no word for are understood within others, too."""

    class Inner(pydantic.BaseModel):
        when: datetime.datetime
        id: uuid.UUID

    @attrs.define
    class Outer:
        inner: Inner
        more: Any

    class Items(pydantic.RootModel[list[int]]):
        pass

    class Name(pydantic.RootModel[str]):
        pass

    item = Outer(Inner(when=WHEN, id=ID), msgspec.defstruct("S", ["n"])(WHEN))
    assert sent(item).json() == {
        "inner": {"when": "2026-01-02T03:04:05", "id": str(ID)},
        "more": {"n": "2026-01-02T03:04:05"},
    }
    assert sent(Items([1, 2])).json() == [1, 2]
    assert sent(Name("a")).json() == "a"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (numpy.arange(3), [0, 1, 2]),
        (numpy.float32(1.5), 1.5),
        (MappingProxyType({"a": 1}), {"a": 1}),
        (Model(**{"data": "a", "price": 1.5}), {"data": "a", "price": 1.5}),
    ],
    ids=["array", "number", "mapping", "model"],
)
def test_a_struct_of_msgspec_may_hold_anything(value: Any, text: Any) -> None:
    """What msgspec itself cannot encode, in all that it looks into, too."""
    assert sent(StructOf(value)).json() == {"value": text}
    assert sent([StructOf([value])]).json() == [{"value": [text]}]
    with pytest.raises(TypeError, match=r"cannot encode builtins\.object as JSON"):
        encoder()(StructOf(object()))


def test_dumps_gets_the_object_itself() -> None:
    """An encoder of the application's may know more of its objects than we do."""
    event = sent(Model(**FIELDS), lambda value: f"<{type(value).__name__}>")
    assert event.data == "<Model>"


def to_camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.title() for word in rest)


class Camel(pydantic.BaseModel, alias_generator=to_camel, populate_by_name=True):
    run_id: str
    child: Any = None


class Renamed(msgspec.Struct, rename="camel"):
    run_id: str
    child: Any = None


@pytest.mark.parametrize("kind", [Camel, Renamed])
def test_fields_have_their_names_of_json(kind: Any) -> None:
    """Aliases of pydantic, renamed fields of msgspec; as their own encoders do."""
    item = kind(run_id="r", child=kind(run_id="c"))
    fields = {"runId": "r", "child": {"runId": "c", "child": None}}
    assert sent(item).json() == fields
    assert sent([item]).json() == [fields]
    assert json.loads(ndjson.encoder()(item) or b"") == fields


class Aliased(pydantic.BaseModel):
    content: str = pydantic.Field(serialization_alias="data")
    kind: str = pydantic.Field("e", serialization_alias="event")


def test_an_alias_may_be_an_events_field() -> None:
    """The rule for a record of an event's fields sees the names of the JSON."""
    event = sent(Aliased(content="a"))
    assert (event.data, event.event) == ("a", "e")


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="pydantic 1 ends with 3.13")
def test_pydantic_1() -> None:
    """Models of pydantic 1, or of its kind within 2, are taken likewise."""
    from pydantic import v1

    class Old(v1.BaseModel):
        data: str
        when: datetime.datetime = WHEN

    class OldEvent(v1.BaseModel):
        data: str
        event: str = "e"

    assert sent(Old(data="a")).json() == {"data": "a", "when": "2026-01-02T03:04:05"}
    assert (sent(OldEvent(data="a")).data, sent(OldEvent(data="a")).event) == ("a", "e")


def test_sqlalchemy() -> None:
    """Mapped objects and rows are their columns; what has expired is loaded again."""
    engine = sqlalchemy.create_engine("sqlite://")
    Base.metadata.create_all(engine)
    with orm.Session(engine) as session:
        row, event = Row(id=1, **FIELDS), RowEvent(id=2, data="b", event="e")
        session.add_all([row, event])
        session.commit()  # and all of them expire
        assert sent(row).json() == {"id": 1, **FIELDS}
        found = sent(event)
        assert (found.data, found.event, found.id) == ("b", "e", "2")
        (read,) = session.execute(sqlalchemy.select(Row.data, Row.price))
        assert sent(read).json() == FIELDS
        assert sent([read]).json() == [FIELDS]
        session.commit()
        session.expunge(row)
        with pytest.raises(orm.exc.DetachedInstanceError):  # at the yield
            encoder()(row)
    engine.dispose()


def test_peewee() -> None:
    """A peewee model is its fields."""
    database = peewee.SqliteDatabase(":memory:")
    with database.bind_ctx([Peewee]), database.connection_context():
        database.create_tables([Peewee])
        Peewee.create(**FIELDS)
        assert sent(Peewee.get()).json() == {"id": 1, **FIELDS}


DJANGO = """
import django
from django.conf import settings
from django.db import connection, models

settings.configure(
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    USE_TZ=True,
    DEFAULT_AUTO_FIELD="django.db.models.AutoField",
)
django.setup()


class Owner(models.Model):
    class Meta:
        app_label = "records"


class Item(models.Model):
    data = models.JSONField()
    price = models.DecimalField(max_digits=5, decimal_places=2)
    owner = models.ForeignKey(Owner, models.CASCADE)

    class Meta:
        app_label = "records"


class Message(models.Model):
    data = models.TextField()
    event = models.TextField()

    class Meta:
        app_label = "records"


with connection.schema_editor() as editor:
    for model in (Owner, Item, Message):
        editor.create_model(model)
Item.objects.create(data=[1], price="1.50", owner=Owner.objects.create())
Message.objects.create(data="a", event="e")

from syncstream.protocol.ndjson import encoder as lines
from syncstream.protocol.sse import encoder

print(encoder()(Item.objects.get()))
print(encoder()(Item.objects.defer("price").get()))
print(encoder()(Message.objects.get()))
print(lines()(Message.objects.get()))
"""


def test_django() -> None:
    """A model is what ``values()`` gives; deferred fields are not fetched for it."""
    child = subprocess.run(
        [sys.executable, "-c", DJANGO],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    full = b'data: {"id":1,"data":[1],"price":"1.50","owner_id":1}\n\n'
    assert child.stdout.splitlines() == [
        repr(full),
        repr(full.replace(b'"price":"1.50",', b"")),
        repr(b"id: 1\nevent: e\ndata: a\n\n"),
        repr(b'{"id":1,"data":"a","event":"e"}\n'),
    ]


# Numbers and memory.


@pytest.mark.parametrize(
    ("item", "value"),
    [
        (numpy.int64(3), 3),
        (numpy.uint8(3), 3),
        (numpy.float64(1.5), 1.5),
        (numpy.float32(0.5), 0.5),
        (numpy.float64("nan"), None),
        (numpy.bool_(True), True),
        (numpy.array([1, 2], "uint8"), [1, 2]),
        (numpy.array([[1.0, float("nan")]]), [[1.0, None]]),
        (numpy.array(["a", 1], object), ["a", 1]),
        (numpy.array(5), 5),
        (numpy.ma.array([1, 2], mask=[0, 1]), [1, None]),
        ({"data": 1, "n": numpy.int64(2)}, {"data": 1, "n": 2}),
        ({"data": numpy.array([1])}, [1]),
        (Event(numpy.int64(3)), 3),
    ],
    ids=repr,
)
def test_numbers_of_numpy(item: Any, value: Any) -> None:
    """They are JSON, never the bytes of their memory."""
    assert sent(item).json() == value
    if isinstance(item, numpy.generic | numpy.ndarray):
        assert json.loads(ndjson.encoder()(item) or b"") == value


class Memory(ctypes.Structure):
    _fields_ = (("data", ctypes.c_int), ("n", ctypes.c_int))


class Frame:
    """As a pandas.DataFrame with a column of that name."""

    data = (1, 2)

    def __array__(self) -> Any:
        return numpy.array([[1, 2], [3, 4]])


@pytest.mark.parametrize(
    "item",
    [
        numpy.datetime64("2026-01-02"),
        numpy.timedelta64(5, "s"),
        numpy.complex64(1),
        numpy.longdouble(1.5),
        numpy.array([b"a"]),
        numpy.array([(1, 2)], dtype=[("data", "i4"), ("n", "i4")])[0],
        array.array("i", [1]),
        array.array("B", b"data: a\n\n"),
        memoryview(array.array("i", [1])),
        memoryview(b"data").cast("I"),
        memoryview(b"data").cast("B", (2, 2)),
        memoryview(b"data").cast("c"),
        ctypes.create_string_buffer(b"data: a\n\n"),
        Memory(1, 2),
        Frame(),
    ],
    ids=lambda item: type(item).__name__,
)
def test_memory_is_refused(item: Any) -> None:
    """What would be sent as its memory, or has no JSON, is an error at the yield."""
    for encode in (encoder(), ndjson.encoder(), raw.encode, raw.encode_bytes):
        with pytest.raises(TypeError):
            encode(item)
    if isinstance(item, memoryview):
        with pytest.raises(TypeError, match="a memoryview must be a row of bytes"):
            Event(item)


def test_other_objects_with_data_stay_events() -> None:
    """What is no record of another library's is an event by its attributes."""

    class Own:
        data = "a"
        event = "e"
        other = 1

    event = sent(Own())
    assert (event.data, event.event) == ("a", "e")
    assert sent(collections.UserList([1])).json() == [1]
