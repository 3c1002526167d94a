"""A client that subscribes to a server's channel, and what it gets."""

import re

from tests.soak.handover import (
    OPENING,
    await_state,
    body_of,
)
from tests.support.live import EVENT_SOURCE


class Listener:
    """A subscriber, as a browser is; it compares what comes byte by byte.

    Args:
        path: Of the stream, with its options.
        is_parked: Wait until it has left its server.
        is_source: It asks as a browser's EventSource does.
    """

    def __init__(
        self,
        server,
        path,
        version="1.1",
        *,
        is_parked=True,
        is_source=True,
        **headers,
    ):
        self.server = server
        self.client = server.connect()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if is_source:
            named.update(EVENT_SOURCE)
        self.client.request("GET", path, version=version, headers=named)
        self.data = bytearray()
        self.expected = b""
        retry = re.search("retry=([0-9]+)", path)
        opening = b": ok\n" if is_source else OPENING
        if retry and is_source:
            opening = f": ok\nretry: {retry[1]}\n\n".encode()
        try:
            self.expect(opening)
            if is_parked:
                await_state(server, lambda now: now["parked"] and not now["attached"])
        except BaseException:
            self.close()
            raise

    @property
    def body(self):
        return body_of(self.data)[0]

    def read_until(self, is_done):
        while not is_done(self.body):
            more = self.client.socket.recv(65536)
            assert more, f"ended: {bytes(self.data[-500:])!r}"
            self.data += more
        return self.body

    def expect(self, data):
        """These bytes come next."""
        self.expected += data
        body = self.read_until(lambda body: len(body) >= len(self.expected))
        assert body[: len(self.expected)] == self.expected

    def forget(self):
        """Drop all of the body that has come, which is to end with a whole chunk."""
        self.read_until(lambda _: self.data.endswith(b"\r\n"))
        head, blank, _ = self.data.partition(b"\r\n\r\n")
        self.data, self.expected = head + blank, b""

    def rest(self):
        """Return what comes up to the end, and whether that was marked."""
        while more := self.client.socket.recv(65536):
            self.data += more
        body, is_whole = body_of(self.data)
        assert body.startswith(self.expected)
        return body[len(self.expected) :], is_whole

    def events(self):
        """Return id, name and data of each event so far."""
        found = []
        for block in self.body.decode().split("\n\n")[:-1]:
            fields = dict(line.split(": ", 1) for line in block.split("\n"))
            if "data" in fields:
                found.append((fields.get("id"), fields.get("event"), fields["data"]))
        return found

    def texts(self):
        return [data for _, _, data in self.events()]

    def await_text(self, text):
        self.read_until(lambda _: text in self.texts())
        return self.texts()

    def close(self):
        self.client.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()
