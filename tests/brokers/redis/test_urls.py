"""URLs, TLS, passwords, and Sentinels that name the server."""

import signal
import traceback
from inspect import signature

import pytest
import redis

from syncstream.brokers import open_broker
from syncstream.brokers.redis import server as server_module
from syncstream.errors import Unavailable
from tests.brokers.redis.clients import Publisher, Reader, account, hub_of, opened, own
from tests.brokers.sinks import Told
from tests.support.programs import certificate
from tests.support.redis_server import RedisServer, Sentinel
from tests.support.waits import await_true


def test_urls_name_servers(shared):
    """What redis-py takes, ours beside it; nothing is connected to."""
    path = f"unix://{shared.socket}?db=0"
    for url in (shared.url, f"valkey{shared.url[5:]}", f"{shared.url}/3", path):
        with opened(own(url)) as broker:
            told = Told()
            broker.attach(told)
            broker.watch("a")
            (id,) = broker.publish([("a", b"x")])
            assert broker.read("a", "0").head == id
            await_true(lambda told=told: told.payloads == [b"x"])


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("redis://h?publish_timeout=soon", "publish_timeout must be seconds"),
        ("redis://h?publish_timeout=0", "publish_timeout must be seconds"),
        ("redis://h?colour=red", "colour"),
        ("redis://h?ssl_ca_certs=x", "ssl_ca_certs"),  # it would not be encrypted
        ("redis://h?socket_timeout=inf", "socket_timeout"),
        ("redis://h?decode_responses=1", "decode_responses"),
        ("redis://h?max_connections=0", "max_connections must be"),
        ("redis://h?db=one", "db must be"),
        ("redis://h/one", "url must be redis:"),
        ("redis://a..b", "url must be redis:"),
        (f"redis+sentinel://a,{'b' * 64}/one", "url must be redis:"),
        ("rediss://h?ssl_cert_reqs=maybe", "ssl_cert_reqs"),
        ("redis+sentinel://h", "name the service"),
        ("rediss+sentinel://h/one?sentinel_colour=red", "sentinel_colour"),
    ],
)
def test_urls_are_refused(url, sentence):
    """In the caller's frame, not on the wire."""
    with pytest.raises(ValueError, match=sentence):
        open_broker(url)


@pytest.mark.parametrize(
    "rest",
    [
        "s3cr3t/1@h",
        "123/s3cr3t@h",
        "12?s3cr3t@h",
        "1#s3cr3t@h",
        "s3cr3t[@h",
        "s3cr3t:x",
        "\u2100s3cr3t@h",
        "s3cr3t@h:x",
        "s3cr3t@h?db=s3cr3t",
        "s3cr3t@h?publish_timeout=s3cr3t",
        "s3cr3t@h?max_connections=s3cr3t",
        "s3cr3t@h?ssl_cert_reqs=s3cr3t",
        "s3cr3t@h?socket_keepalive=1&s3cr3t@",
    ],
)
@pytest.mark.parametrize(
    "scheme", ["redis", "rediss", "valkey", "redis+sentinel", "unix"]
)
def test_no_refused_url_shows_its_password(scheme, rest):
    """Whatever is wrong with it, wherever that moves it; in no chained error, too."""
    with pytest.raises(ValueError, match=r"url|options|must be") as caught:
        open_broker(f"{scheme}://me:{rest}")
    assert "s3cr3t" not in "".join(traceback.format_exception(caught.value, limit=0))


def test_no_password_is_told():
    """What is logged and raised names the server, and no more."""
    with opened("redis://me:secret@127.0.0.1:1?publish_timeout=1") as broker:
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1") as caught:
            broker.publish([("a", b"x")])
        assert "secret" not in str(caught.value)


def test_tls_and_passwords(tmp_path):
    """By rediss:, with a user's name; who has none is refused, and told so."""
    cert, key = certificate(tmp_path, "127.0.0.1")
    with RedisServer("--requirepass", "secret", tls=(cert, key)) as server:
        end = f"127.0.0.1:{server.port}?ssl_ca_certs={cert}&ssl_check_hostname=no"
        with opened(own(f"rediss://default:secret@{end}")) as broker:
            told = Told()
            broker.attach(told)
            broker.watch("a")
            payloads = [b"x" * size for size in (1, 20_000, 1 << 20, 0)]
            broker.publish([("a", payload) for payload in payloads])
            await_true(lambda: told.payloads == payloads)
        with (
            opened(f"rediss://{end}") as broker,
            pytest.raises(Unavailable, match=r"(?i)auth"),
        ):
            broker.publish([("a", b"x")])


def test_tls_is_checked_for_the_host_name(tmp_path, monkeypatch):
    """A certificate of another host is refused, unless the URL does not ask for it."""
    init = redis.SSLConnection.__init__  # before redis-py 6 it did not check by itself
    given = [p for p in signature(init).parameters.values() if p.default is not p.empty]
    old = (False if p.name == "ssl_check_hostname" else p.default for p in given)
    monkeypatch.setattr(init, "__defaults__", tuple(old))
    cert, key = certificate(tmp_path, "example.org")
    with RedisServer(tls=(cert, key)) as server:
        end = f"127.0.0.1:{server.port}"
        master = f"rediss+sentinel://{end}/mine"

        def publish(url, *words):
            query = "&".join([f"ssl_ca_certs={cert}", *words])
            with opened(f"{url}?{query}") as broker:
                broker.publish([("a", b"x")])

        lax = "ssl_check_hostname=no", "ssl_cert_reqs=none"
        # It knows no Sentinel's commands: so one is told by whom it trusts.
        with pytest.raises(Unavailable, match="no Sentinel knows a master"):
            publish(master)
        for word in lax:
            with pytest.raises(Unavailable, match="unknown command"):
                publish(master, word)
        found = "127.0.0.1", server.port
        monkeypatch.setattr(server_module.Sentinel, "discover_master", lambda *_: found)
        for url in (f"rediss://{end}", f"valkeys://{end}", master):
            with pytest.raises(Unavailable, match=r"(?i)certificate"):
                publish(url)
            for word in lax:
                publish(url, word)


def test_sentinel_names_the_server(quick):
    """A failover is a reconnect: all who are there stay, and are told what is lost."""
    with RedisServer() as master, RedisServer() as replica:
        replica.command("REPLICAOF", "127.0.0.1", str(master.port))
        with Sentinel("mine", master.port) as sentinel:
            url = f"redis+sentinel://127.0.0.1:{sentinel.port}/mine/0?publish_timeout=1"
            with (
                hub_of(url) as hub,
                Reader(hub, "a") as reader,
                Publisher(url) as publisher,
            ):
                publisher.more()
                await_true(lambda: len(master.listeners()) == 1)
                sentinel.await_replica()
                master.stop(signal.SIGKILL)
                await_true(lambda: replica.command("ROLE")[0] == b"master")
                await_true(lambda: hub.stats()["up"] and replica.listeners())
                publisher.more()
                account(publisher, reader, has_gap=True)
                assert len(reader.gaps) <= 1
