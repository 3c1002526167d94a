"""Tags: `only` and `exclude` select who gets an event."""

import pytest

from tests.channels.readers import Line, data, resume
from tests.support.pairs import stream_of


def test_tags(hub):
    """`only` and `exclude` select; a resume selects likewise."""
    plain = hub.subscribe("a", after="start")
    admin = hub.subscribe("a", after="start", tags=["admin", "7"])
    hub.publish("a", "all")
    hub.publish("a", "admins", only=["admin", "root"])
    hub.publish("a", "not 7", exclude=["7"])
    hub.publish("a", "neither", only=["admin"], exclude=["7"])
    ids = [event.id for event in plain.read(0)]
    assert data(resume(hub, ids[0])) == ["not 7"]
    assert data(admin.read(0)) == ["all", "admins"]
    assert data(resume(hub, ids[0], tags=["admin"])) == ["admins", "not 7", "neither"]
    assert resume(hub, ids[-1]) == []


def test_an_empty_list_is_nobody(hub):
    """A list that was computed, and came out empty; so does a generator of none."""
    reader = hub.subscribe("a", after="start", tags=["x"])
    hub.publish("a", "nobody", only=[])
    hub.publish_many("a", ["nobody"], only=(tag for tag in ()))
    hub.publish_many("a", ["x", "x"], only=(tag for tag in ["x", "y"]))
    hub.publish("a", "all", only=None, exclude=[])
    hub.publish("a", "nobody", exclude=(tag for tag in ["x"]))
    assert data(reader.read(0)) == ["x", "x", "all"]
    for wrong in ("", "x", b"x", [1], 7):
        for name in ("only", "exclude"):
            with pytest.raises(TypeError, match=name):
                hub.publish_many("a", ["1"], **{name: wrong})


def test_tags_hold_where_a_thread_is_kept(hub):
    """A response that is not handed over passes each event on as it comes, or not."""
    stream = stream_of(hub.subscribe("a", after="start"), Line(), handover=False)
    chunks = iter(stream)
    assert next(chunks) == b": ok\n\n"
    hub.publish("a", "first")
    assert b"data: first\n" in next(chunks)
    hub.publish("a", "admins", only=["admin"])
    id = hub.publish("a", "all")
    assert next(chunks) == f"id: {id}\ndata: all\n\n".encode()
    stream.close()
