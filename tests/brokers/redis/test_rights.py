"""Rights, as docs/brokers.md lists them, and what a server refuses."""

import contextlib
import re

import pytest

from syncstream.channels import control as control_module
from syncstream.errors import Closed, Denied, Unavailable, Uncertain
from syncstream.runtime.journal import journal
from tests import ROOT
from tests.brokers.redis.clients import Reader, hub_of, opened, refused
from tests.brokers.sinks import Told
from tests.support.waits import TIMEOUT, await_true

DOCS = (ROOT / "docs" / "brokers.md").read_text()


RIGHTS = dict(re.findall(r"<!-- redis rights: (\w+) -->\n```\n(.*)\n```", DOCS))


def allow(server, role, *more, user=None, without=()):
    """Give a user the rights that the docs list; return the URL by which he comes."""
    words = RIGHTS[role].replace(">PASSWORD", ">pw").replace(" (", "\n(").split("\n")
    words = [w for word in words for w in ([word] if "(" in word else word.split())]
    words = [word for word in words[3:] if word not in without]
    server.command("ACL", "SETUSER", user or role, *words, *more)
    return f"redis://{user or role}:pw@127.0.0.1:{server.port}"


def test_rights(server, clock):
    """The docs' lists suffice to publish, subscribe, resume and kick, no more."""
    patterns = "&ss:{b:*}", "&ss:{c[:}]*"
    both = allow(server, "both", *patterns)
    heard = allow(server, "subscribe", *patterns)
    with (
        hub_of(both, max_age=60) as hub,
        hub_of(allow(server, "publish"), max_age=None) as publisher,
        hub_of(heard) as listener,
        Reader(hub, "a", "b:*", who=1) as reader,
        Reader(listener, "a", "c:#", who=2) as other,
    ):
        head = listener.head("a")
        hub.publish("a", "1")
        publisher.publish("a", "2")
        hub.publish("b:1", "3")
        publisher.publish("c:1:2", "4")
        await_true(lambda: len(reader.got) == len(other.got) == 3)
        assert sorted(reader.got) == ["1", "2", "3"]
        assert sorted(other.got) == ["1", "2", "4"]
        with contextlib.closing(listener.subscribe("a", after=head)) as late:
            assert [event.data for event in late.read(TIMEOUT)] == ["1", "2"]
        with pytest.raises(Denied, match="rights that a user needs"):
            listener.publish("a", "5")
        publisher.kick(who=2)
        await_true(lambda: not other.is_alive())
        assert reader.is_alive()
        assert hub.stats()["up"]
        assert listener.stats()["up"]
    with opened(allow(server, "both", "-publish", user="mute")) as broker:
        refused(broker, clock, Uncertain, "can't run|no permissions")


@pytest.mark.parametrize("is_later", [False, True], ids=["from the start", "later"])
def test_kicks_that_a_user_may_not_hear(server, quick, monkeypatch, is_later):
    """Streams stay; who kicks is told; kicks in between are heard when they may be."""
    monkeypatch.setattr(control_module, "ASK_AGAIN", 0.2)
    names = [f"ss:{{{name}}}" for name in ("a", "syncstream?presence")]
    few = ["resetchannels", *(f"&{name}" for name in (*names, "ss:ctl:*"))]
    keys = "reset", "on", ">pw", "+@all", "~ss:*"
    right = "&ss:{syncstream?control}"
    server.command("ACL", "SETUSER", "unheard", *keys, *few, *([right] * is_later))
    url = f"redis://unheard:pw@127.0.0.1:{server.port}"
    with (
        hub_of(url) as hub,
        hub_of(url) as other,
        hub_of(server.url) as free,
        Reader(hub, "a", who="ann") as ann,
        Reader(other, "a", who="ann") as far,
    ):
        if is_later:
            server.command("ACL", "SETUSER", "unheard", *few)
            controls = hub.subscribers.control, other.subscribers.control
            await_true(lambda: all(control.refusal for control in controls))
        with pytest.raises((Denied, Uncertain), match="ended in this process: 1"):
            hub.kick(who="ann")
        await_true(lambda: not ann.is_alive())
        hub.publish("a", "1")
        await_true(lambda: far.got == ["1"])
        assert free.kick(who="ann") == 0
        assert far.is_alive()
        server.command("ACL", "SETUSER", "unheard", right)
        await_true(lambda: not far.is_alive())


@pytest.mark.parametrize("is_used", [True, False])
def test_kicks_that_were_evicted(server, quick, caplog, is_used):
    """While nobody listened: all who can be named are kicked, once, and it is said."""
    with hub_of(server.url) as hub, Reader(hub, "a") as nobody:
        if is_used:
            hub.kick(who="somebody")
        with Reader(hub, "a", who="ann") as ann:
            await_true(lambda: not hub.subscribers.control.is_reading)
            server.command("DEL", "ss:{syncstream control}", "ss:empty")
            server.command("CLIENT", "KILL", "TYPE", "pubsub")
            await_true(lambda: not ann.is_alive())
        with Reader(hub, "a", who="ann") as again:
            server.command("CLIENT", "KILL", "TYPE", "pubsub")
            await_true(lambda: len(server.listeners()) == 1 and hub.stats()["up"])
            hub.publish("a", "1")
            await_true(lambda: again.got == nobody.got == ["1"])
            assert again.is_alive()
        journal().flush()
        assert caplog.text.count("kicks are missing") == 1


def test_a_command_that_is_missing_is_said(server, quick):
    """Without any that the docs list, somebody is told at once: nobody waits."""
    words = [word for word in RIGHTS["both"].split() if word.startswith("+")]
    # An answer that refuses a PING is one; what is not unsubscribed is not told.
    # One is for a hundred thousand empty channels.
    unseen = "+ping", "+unsubscribe", "+punsubscribe", "+unlink"
    words = [word for word in words if word not in unseen]
    for number, word in enumerate(words):
        rest = f"&ss:{{{number}:*}}"
        url = allow(server, "both", rest, user=f"u{number}", without=(word,))
        max_age = None if word == "+persist" else 60
        told = Told()
        with opened(url, max_age=max_age) as broker:
            broker.attach(told)
            problems = []
            calls = (
                lambda n=number, b=broker: b.watch(f"a{n}"),
                lambda n=number, b=broker: b.watch(f"{n}:*"),
                lambda n=number, b=broker: b.read(f"{n}", "0"),
                lambda n=number, b=broker: b.newest(f"{n}", 3),
                lambda n=number, b=broker: b.publish(
                    [(f"a{n}", b"x"), (f"a{n}", b"x")]
                ),
                lambda n=number, b=broker: b.read(f"a{n}", "0"),
                lambda n=number, b=broker: b.newest(f"a{n}", 3),
            )
            for call in calls:
                try:
                    call()
                except (Unavailable, Uncertain) as error:
                    problems.append(str(error))
            await_true(
                lambda problems=problems, told=told: (
                    problems or told.states or told.denied
                ),
                lambda word=word: word,
            )
        reasons = [*problems, *told.reasons, *(why for _, why in told.denied)]
        assert any("docs/brokers.md" in reason for reason in reasons), (word, reasons)


def test_a_name_that_is_refused_ends_its_subscribers_alone(server, quick):
    """Whether the server says so at first or later, and in one command with others."""
    rights = "&ss:{d:*}"
    url = allow(server, "both", rights)
    few = ("resetchannels", "&ss:ctl:*", "&ss:{a}", "&ss:{c}")
    with opened(url) as broker, opened(server.url) as direct, hub_of(url) as hub:
        told = Told()
        broker.attach(told)
        for name in ("a", "b", "c", "d:*"):
            broker.watch(name)
        with (
            Reader(hub, "a") as reader,
            contextlib.closing(hub.subscribe("b")) as heard,
        ):
            assert heard.read(0) == []
            server.command("ACL", "SETUSER", "both", *few)
            await_true(lambda: len(told.denied) == 2)
            assert sorted(name for name, _ in told.denied) == ["b", "d:*"]
            assert all("docs/brokers.md" in reason for _, reason in told.denied)
            with pytest.raises(Closed, match="denied"):
                heard.read(TIMEOUT)
            await_true(lambda: told.states[-1] and hub.stats()["up"])
            for name in ("b", "d:*"):
                with pytest.raises(Denied, match="denies it"):
                    broker.watch(name)
            direct.publish([(name, b"data: 1\n\n") for name in ("b", "a", "c")])
            await_true(lambda: len(told.entries) == 2)
            assert [channel for channel, _ in told.entries] == ["a", "c"]
            await_true(lambda: reader.got == ["1"])
            server.command("ACL", "SETUSER", "both", "&ss:*", rights)
            broker.watch("b")
            broker.watch("d:*")
            direct.publish([(name, b"data: 2\n\n") for name in ("b", "d:1")])
            await_true(lambda: len(told.entries) == 4)


def test_a_key_that_is_refused_hides_no_loss(server, quick):
    """Its subscribers are told, and others' heads are compared as before."""
    url = allow(server, "both")
    with opened(url) as broker, opened(server.url) as direct:
        told = Told()
        broker.attach(told)
        for name in ("a", "b", "c"):
            broker.watch(name)
        direct.publish([(name, b"1") for name in ("a", "b", "c")])
        await_true(lambda: len(told.entries) == 3)
        keys = ("resetkeys", "~ss:empty", "~ss:{a}", "~ss:{c}")
        server.command("ACL", "SETUSER", "both", *keys)
        for call in (
            lambda: broker.read("b", "0"),
            lambda: broker.newest("b", 1),
            lambda: broker.publish([("b", b"2")]),
        ):
            with pytest.raises(Denied, match=r"docs/brokers\.md"):
                call()
        await_true(lambda: [name for name, _ in told.denied] == ["b"])
        for name in ("a", "c"):
            head = direct.read(name, None).head
            fields = ["p", head, "d", "x"]
            server.command("XADD", f"ss:{{{name}}}", f"{int(head[:13]) + 1}-1", *fields)
        await_true(lambda: sorted(set(told.lost)) == ["a", "c"])
        assert told.states == []


@pytest.mark.parametrize("command", ["-eval", "-xrange", "-subscribe"])
def test_what_is_refused_to_all_is_down(server, quick, command):
    """It is said once, by who asks first, and that it is over."""
    url = allow(server, "both")
    with opened(url) as broker:
        told = Told()
        broker.attach(told)
        broker.watch("a")
        broker.publish([("a", b"1")])
        await_true(lambda: told.entries)
        server.command("ACL", "SETUSER", "both", command)
        if command == "-subscribe":
            server.command("CLIENT", "KILL", "TYPE", "pubsub")
        for _ in range(2):
            if command == "-xrange":
                with pytest.raises(Unavailable, match=r"docs/brokers\.md"):
                    broker.read("a", "0")
        await_true(lambda: told.states)
        (reason,) = told.reasons
        assert told.states == [False]
        assert "docs/brokers.md" in reason or command == "-subscribe"
        server.command("ACL", "SETUSER", "both", command.replace("-", "+"))
        if command == "-xrange":
            broker.read("a", "0")
        await_true(lambda: told.states[1:] == [True])
