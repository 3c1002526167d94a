"""Requests: their connections, their one deadline, and what is refused to them."""

import os
import signal
import socket
import threading
import time

import psutil
import pytest

from syncstream.brokers.redis import server as server_module
from syncstream.errors import Unavailable, Uncertain
from tests.brokers.redis.clients import at, opened, refused
from tests.brokers.sinks import Told
from tests.support.redis_server import RedisServer
from tests.support.tcp_proxy import Proxy
from tests.support.waits import TIMEOUT, await_true


def test_refused_connections(clock):
    """Nobody listens: nothing was stored, and reads say so, too."""
    with RedisServer() as server:
        url = server.url
    with opened(url) as broker:
        refused(broker, clock, match="cannot connect")
        with pytest.raises(Unavailable, match="cannot connect"):
            broker.read("a", None)
        broker.attach(Told())
        began = clock()
        broker.watch("a")
        broker.watch("b")
        assert clock() - began < 3


@pytest.mark.parametrize("reason", ["OOM", "READONLY", "MISCONF", "LOADING", "key"])
def test_refused_publishes(reason, clock):
    """What the server does not store is Unavailable; later it is stored."""
    options = ["--save", "3600 1"] if reason in ("MISCONF", "LOADING") else []
    with RedisServer(*options) as server, opened(server.url) as broker:
        broker.publish([("c", b"0")])
        if reason == "OOM":
            server.command("CONFIG", "SET", "maxmemory", "1")
            refused(broker, clock, match="maxmemory")
            server.command("CONFIG", "SET", "maxmemory", "0")
        elif reason == "READONLY":
            server.command("REPLICAOF", "127.0.0.1", "1")
            refused(broker, clock, match="read only")
            assert broker.read("c", "0").entries
            server.command("REPLICAOF", "NO", "ONE")
        elif reason == "MISCONF":
            (server.folder / "dump.rdb").mkdir()
            server.command("BGSAVE")
            await_true(
                lambda: server.command("INFO")["rdb_last_bgsave_status"] == "err"
            )
            refused(broker, clock, match="MISCONF")
            server.command("CONFIG", "SET", "save", "")
        elif reason == "LOADING":
            fill = "for n = 1, 40000 do redis.call('SET', n, n) end"
            server.command("EVAL", fill, "0")
            server.command("SAVE")
            server.restart_slowly()
            refused(broker, clock, match="(?i)loading")
            server.stop(signal.SIGKILL)
            server.start()
        else:
            server.command("SET", "ss:{a}", "1")
            with pytest.raises(Unavailable, match="WRONGTYPE"):
                broker.publish([("a", b"1")])
            with pytest.raises(Uncertain, match="WRONGTYPE"):  # b was stored
                broker.publish([("a", b"1"), ("b", b"2")])
            server.command("DEL", "ss:{a}", "ss:{b}")
        assert not broker.read("a", "0").entries
        (id,) = broker.publish([("a", b"4")])
        assert [entry.id for entry in broker.read("a", "0").entries] == [id]


def test_a_server_that_became_a_replica(server):
    """Its connections are not used again: its name may lead to the new master."""
    with RedisServer() as other, Proxy(server.port) as proxy:
        with opened(at(proxy.port)) as broker:
            broker.publish([("a", b"1")])
            server.command("REPLICAOF", "127.0.0.1", "1")
            proxy.target = other.port
            with pytest.raises(Unavailable, match="read only"):
                broker.publish([("a", b"2")])
            broker.publish([("a", b"3")])
        assert other.command("XLEN", "ss:{a}") == 1


def test_scripts_that_are_forgotten(server):
    """They are sent anew, one event's and a batch's; reads, too."""
    with opened(server.url) as broker:
        for forget in (True, True, False):
            if forget:
                server.command("SCRIPT", "FLUSH")
            broker.publish([("a", b"1")])
            if forget:
                server.command("SCRIPT", "FLUSH")
            broker.publish([("a", b"2"), ("a", b"3")])
            if forget:
                server.command("SCRIPT", "FLUSH")
            broker.read("a", None)
        payloads = [entry.payload for entry in broker.read("a", "0").entries]
        assert payloads == [b"1", b"2", b"3"] * 3


def test_a_forgotten_connection_takes_no_event(server, proxy, clock, monkeypatch):
    """What a firewall has dropped without a word is found before it is trusted."""
    monkeypatch.setattr(server_module, "FRESH", 0.05)
    with opened(at(proxy.port)) as broker, opened(server.url) as direct:
        together = threading.Barrier(4)

        def publish():
            together.wait(TIMEOUT)
            broker.publish([("a", b"x")])

        threads = [threading.Thread(target=publish) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        proxy.forget()
        time.sleep(0.1)  # longer than it is trusted
        for payload in (b"1", b"2"):
            began = clock()
            broker.publish([("a", payload)])
            assert clock() - began < 1.5
        found = [entry.payload for entry in direct.read("a", "0").entries]
        assert found == [b"x"] * 4 + [b"1", b"2"]


def test_a_connection_that_answers_is_used_again(server, monkeypatch):
    """One that is proven by an answer; what nobody uses is let go; keepalive is on."""
    monkeypatch.setattr(server_module, "FRESH", 0.0)
    with opened(server.url) as broker:
        connections = server.command("INFO", "stats")["total_connections_received"]
        together = threading.Barrier(8)

        def publish():
            together.wait(TIMEOUT)
            broker.publish([("a", b"x")] * 200)

        threads = [threading.Thread(target=publish) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        kept = [
            connection.fd
            for connection in psutil.Process().net_connections("tcp")
            if connection.raddr and connection.raddr.port == server.port
        ]
        assert kept
        for fd in kept:
            with socket.socket(fileno=os.dup(fd)) as sock:
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        with server.client() as client:
            before = client.info("clients")["connected_clients"]
            assert before > 3
            made = client.info("stats")["total_connections_received"]
            broker.publish([("a", b"x")])
            assert client.info("stats")["total_connections_received"] == made
            assert connections < made
            monkeypatch.setattr(server_module, "IDLE", 0.05)
            time.sleep(0.1)  # longer than it is kept
            broker.publish([("a", b"x")])
            await_true(lambda: client.info("clients")["connected_clients"] == 2)


def test_a_kept_connection_to_a_server_that_loads(server, clock, monkeypatch):
    """A replica's first load ends no connection: its answer to a test is one, too."""
    monkeypatch.setattr(server_module, "FRESH", 0.0)
    with RedisServer("--repl-diskless-sync-delay", "0") as other:
        fill = "for n = 1, 40000 do redis.call('SET', n, n) end"
        other.command("EVAL", fill, "0")
        with opened(server.url) as broker:
            broker.publish([("a", b"1")])
            server.command("CONFIG", "SET", "key-load-delay", "500")
            server.command(
                "CONFIG", "SET", "loading-process-events-interval-bytes", "1024"
            )
            server.command("REPLICAOF", "127.0.0.1", other.port)
            await_true(server.is_loading)
            refused(broker, clock, match="(?i)loading")


def test_a_publish_that_is_not_answered(server, proxy, clock):
    """It is uncertain, in time, and stored once: nothing is sent again."""
    with (
        opened(at(proxy.port, "publish_timeout=1")) as broker,
        opened(server.url) as direct,
    ):
        broker.publish([("a", b"1")])
        proxy.is_deaf = True
        for items in ([("a", b"2")], [("a", b"3"), ("a", b"4")]):
            began, began_here = time.monotonic(), clock()
            with pytest.raises(Uncertain, match="no answer"):
                broker.publish(items)
            assert time.monotonic() - began > 0.9
            assert clock() - began_here < 2
            # The next one has a connection that answers its greeting.
            proxy.is_deaf = False
            broker.publish([("b", b"x")])
            proxy.is_deaf = True
        payloads = [entry.payload for entry in direct.read("a", "0").entries]
        assert payloads == [b"1", b"2", b"3", b"4"]


@pytest.mark.parametrize("then", ["connect", "send"])
def test_all_that_a_publish_waits_for_has_one_deadline(then, proxy, clock):
    """For its turn, and to connect, or to send what no buffer holds."""
    query = "publish_timeout=2", "max_connections=1"
    with opened(at(proxy.port, *query)) as broker:
        broker.read("a", None)  # by a connection that is kept
        (server,) = broker.process.servers
        if then == "connect":
            server.forget_idle()
        proxy.is_silent = True
        server.turns.acquire()
        turn = threading.Timer(1.4, server.turns.release)
        turn.start()
        began = clock()
        with pytest.raises(Unavailable):
            broker.publish([("a", b"x" * (1 << 24))])
        assert clock() - began < 2.1
        turn.join()


@pytest.mark.parametrize("how", ["silent", "stopped", "unix"])
def test_a_publish_to_nowhere(server, proxy, how, clock):
    """In time it is known not to be stored, or not to be known."""
    url = at(proxy.port) if how != "unix" else f"unix://{server.socket}?"
    with opened(f"{url}&publish_timeout=1") as broker:
        broker.publish([("a", b"1")])
        if how == "silent":
            proxy.is_silent = True
        else:
            server.send(signal.SIGSTOP)
        for kind in (Uncertain, Unavailable, Unavailable):
            began = clock()
            with pytest.raises((Unavailable, Uncertain)) as caught:
                broker.publish([("a", b"2")])
            assert type(caught.value) is kind
            assert clock() - began < 2
        with pytest.raises(Unavailable):
            broker.read("a", None)
        proxy.is_silent = False
        server.send(signal.SIGCONT)
        broker.publish([("a", b"3")])
        found = [entry.payload for entry in broker.read("a", "0").entries]
        assert found in ([b"1", b"3"], [b"1", b"2", b"3"])


def test_connections_that_have_ended_are_not_used(server):
    """A restart costs no publish: what waits in the pool is looked at first."""
    with opened(server.url) as broker:
        threads = [
            threading.Thread(target=broker.publish, args=([("a", b"x")] * 100,))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        server.restart(signal.SIGKILL)
        for _ in range(10):
            broker.publish([("a", b"x")])
        assert len(broker.read("a", "0").entries) == 10
