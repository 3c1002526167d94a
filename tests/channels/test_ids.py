"""Ids of several channels in one."""

import pytest

from syncstream import Gap
from syncstream.channels.ids import MAX_ID, composite, parts_of
from tests.channels.readers import data, resume


def test_head_of_several(hub):
    """One id for all of them, and what follows follows it; in any order."""
    ids = [hub.publish_many(name, "12")[-1] for name in "ab"]
    head = hub.head("a", "b", "empty", "a")
    assert all(id in head for id in ids)
    hub.publish("b", "3")
    hub.publish("empty", "4")
    hub.publish("a", "5")
    for names in (("a", "b", "empty"), ("empty", "b", "a")):
        assert sorted(data(hub.subscribe(*names, after=head).read(0))) == [*"345"]
        assert sorted(data(resume(hub, head, *names))) == [*"345"]
    for names in ((), ("a", "b:*")):
        with pytest.raises(ValueError, match="channel"):
            hub.head(*names)


def test_a_channel_that_is_new_to_an_id_is_a_reset(hub):
    """Of the others nothing is lost, nothing is twice."""
    hub.publish("a", "1")
    (event,) = hub.subscribe("a", "b", after="start").read(0)
    hub.publish("b", "2")
    hub.publish("c", "3")
    found = resume(hub, event.id, "a", "b", "c")
    assert data(e for e in found if not isinstance(e, Gap)) == ["2", "3"]
    assert [e.json()["channel"] for e in found if isinstance(e, Gap)] == ["c"]


def test_names_whose_short_hashes_are_one(hub):
    """An id tells apart two that 32 bits do not."""
    channels = "user:73177", "user:148412"
    subscription = hub.subscribe(*channels)
    subscription.read(0)
    for name in channels:
        hub.publish_many(name, ["0", "1"])
    first, *_ = subscription.read(0)
    assert sorted(data(resume(hub, first.id, *channels))) == ["0", "1", "1"]


def test_a_list_of_channels_that_changes(hub):
    """Those that are in both go on; what is new begins with a reset."""
    subscription = hub.subscribe("a", "b")
    subscription.read(0)
    for name in "ab":
        hub.publish_many(name, [f"{name}0", f"{name}1"])
    last = subscription.read(0)[-1].id
    for name in "abc":
        hub.publish(name, f"{name}2")
    assert data(resume(hub, last, "a")) == ["a2"]
    assert data(resume(hub, last, "b")) == ["b2"]
    assert data(resume(hub, last, "b", "a")) == ["b2", "a2"]
    found = resume(hub, last, "b", "c")
    assert [e.event or e.data for e in found] == ["b2", "reset", "c2"]
    assert isinstance(resume(hub, last, "c")[0], Gap)
    one = hub.publish("a", "a3")
    assert [e.event for e in resume(hub, one, "a", "b")].count("reset") == 2


def test_a_long_id_is_not_read_to_its_end():
    """What a client may make up costs nothing, however long it is."""
    id = composite(["a"], ["1-0"])
    channels = "a", "b"
    assert parts_of(f"{id},{'x' * MAX_ID}", channels) == {"a": "1-0"}
    assert parts_of(f"{'x' * MAX_ID},{id}", channels) == {}
