"""Where a client cannot leave its server, and must not stay there either."""

import re
from contextlib import ExitStack

import pytest

from tests.live.listener import Listener
from tests.soak.handover import OPENING, Asker, await_state, serving, state
from tests.support.live import LiveServer, unique_key

RETRY = re.compile(rb"retry: [0-9]+\n\n")


def test_many_subscribers_at_once_find_a_thread():
    """50 on 8 threads of which 2 are reserved: each waits for a moment, if it must."""
    words = ("--threads", "8")
    with (
        LiveServer("gunicorn-gthread", "tests.apps.hub_app:reserved", *words) as server,
        ExitStack() as stack,
    ):
        for _ in range(5):
            # All have connected before the first asks, so that they ask together.
            clients = [stack.enter_context(server.connect()) for _ in range(50)]
            for client in clients:
                client.socket.sendall(b"GET /sse/a HTTP/1.1\r\nHost: x\r\n\r\n")
            for client in clients:
                client.read_head()
            assert [client.status for client in clients] == [200] * 50


@pytest.mark.parametrize("kind", ["gunicorn-sync", "gunicorn-gthread", "waitress"])
def test_few_threads_are_not_given_to_who_chooses_to_stay(kind):
    """By a method that nobody asks for a stream by, and views of any method take."""
    channel = unique_key()
    with serving(kind) as server, ExitStack() as stack:
        others = [
            stack.enter_context(Listener(server, f"/events/{channel}"))
            for _ in range(5)
        ]
        for _ in range(9):  # more than there are threads
            with server.connect() as client:
                client.request("OPTIONS", f"/events/{channel}")
                rest = client.rest()
                assert not client.is_whole  # it is no EventSource, and not told more
            assert rest == OPENING
        server.await_log("one of the server's few threads: the method is OPTIONS")
        with Asker(server) as asker:
            asker.ask(f"/publish/{channel}", ["hello"])
        for other in others:
            assert other.await_text("hello") == ["hello"]


@pytest.mark.parametrize("kind", ["gunicorn-sync", "gunicorn-gthread"])
def test_the_last_descriptors_are_the_servers(kind):
    """Who would need one of them is told to come back; the log says what to do."""
    channel = unique_key()
    with serving(kind, env={"HARD_LIMIT": "150"}) as server, ExitStack() as stack:
        clients = []
        while not state(server)["ended"].get("refused"):
            assert len(clients) < 150
            # Whoever is refused would keep its connection, for other requests.
            asked = {"is_parked": False, "is_source": True, "Connection": "close"}
            one = Listener(server, f"/events/{channel}", **asked)
            clients.append(stack.enter_context(one))
            count = len(clients)
            await_state(
                server,
                lambda now, n=count: now["parked"] >= n or now["ended"].get("refused"),
            )
        *others, last = clients
        rest, is_whole = last.rest()
        assert is_whole
        assert RETRY.fullmatch(rest)
        assert len(others) > 20
        with Asker(server) as asker:
            asker.ask(f"/publish/{channel}", ["hello"])
        for other in others:
            assert other.await_text("hello") == ["hello"]
        server.await_log("no descriptor is left of 150")
