"""The promises of a stream, through a real nginx.

Nobody has to configure nginx for them: `bare` is a location with proxy_pass and
nothing else. What docs/proxies.md says about other settings is tested below them.
"""

import contextlib
import os
import re
import select
import subprocess
import time
import zlib

import pytest

from tests import ROOT
from tests.live.promises import end_of
from tests.support.live import LiveServer, unique_key
from tests.support.nginx import Nginx, location
from tests.support.programs import program
from tests.support.waits import TIMEOUT

EXAMPLE = ROOT / "examples" / "nginx.conf"
KINDS = ("gunicorn-gthread", "gunicorn-gevent", "uwsgi")
GZIP = """
    gzip on;
    gzip_types text/event-stream application/x-ndjson text/plain;
    gzip_proxied any;
"""
HTTP_1_1 = 'proxy_http_version 1.1; proxy_set_header Connection "";'
EVENT_SOURCE = {"Accept": "text/event-stream", "Cache-Control": "no-cache"}


def example(port):
    """Return the example as it is, but for its ports."""
    text = EXAMPLE.read_text()
    for old, new in {
        "listen 80;": "listen 127.0.0.1:$PORT;",
        "http://127.0.0.1:8000;": f"http://127.0.0.1:{port};",
    }.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    return text


def keepalive(port):
    """Return a configuration that reuses its connections to the application."""
    upstream = f"upstream app {{ server 127.0.0.1:{port}; keepalive 4; }}"
    return upstream + location("http://app", HTTP_1_1)


CONFIGURATIONS = {
    "bare": location,
    "gzip": lambda port: location(port, GZIP),
    "keepalive": keepalive,
    "example": example,
}


@pytest.fixture(scope="module", params=KINDS)
def server(request):
    """Each server in turn."""
    with LiveServer(request.param, "tests.apps.proxy_app:app") as server:
        yield server


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def nginx(request, server):
    """Each configuration in turn, in front of each server."""
    with Nginx(CONFIGURATIONS[request.param](server.port)) as nginx:
        yield nginx


@pytest.fixture(scope="module")
def gevent():
    """One server, for what depends on nginx alone; it keeps idle connections."""
    words = ["--keep-alive", "75"]
    with LiveServer("gunicorn-gevent", "tests.apps.proxy_app:app", *words) as server:
        yield server


@pytest.fixture
def key():
    return unique_key()


@contextlib.contextmanager
def opened(server, key):
    """Let a generator that still waits at its gate run into its end at last."""
    try:
        yield
    finally:
        server.control.open(key, 50)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_events_arrive_one_at_a_time(nginx, server, key, version):
    """Head and opening arrive before the first event, then each event alone."""
    with (
        opened(server, key),
        nginx.get(f"/sse/gated?key={key}", version=version) as client,
    ):
        assert client.block() == b": ok\n\n"
        assert client.status == 200
        assert client.headers["content-type"].startswith("text/event-stream")
        assert client.headers["cache-control"] == "no-cache, no-transform"
        for n in range(3):
            server.control.open(key)
            assert client.block() == f"data: {n}\n\n".encode()
    assert server.control.next(f"{key}-ended")[1]


@pytest.mark.parametrize("kind", ["ndjson", "raw"])
def test_chunks_arrive_one_at_a_time(nginx, server, key, kind):
    """So do lines, and raw chunks."""
    end = b"\n" if kind == "ndjson" else b""
    with opened(server, key), nginx.get(f"/{kind}/gated?key={key}") as client:
        for n in range(3):
            server.control.open(key)
            assert client.chunk() == f"{n}".encode() + end
    assert server.control.next(f"{key}-ended")[1]


@pytest.mark.parametrize("kind", ["sse", "ndjson", "raw"])
def test_compressed_events_arrive_one_at_a_time(server, key, kind):
    """nginx' gzip takes no notice of no-transform, but it ends a block an event."""
    with (
        Nginx(location(server.port, GZIP)) as nginx,
        opened(server, key),
        nginx.get(
            f"/{kind}/gated?key={key}", headers={"Accept-Encoding": "gzip"}
        ) as client,
    ):
        text, gunzip = b"", zlib.decompressobj(wbits=31)
        for n in range(3):
            server.control.open(key)
            while str(n).encode() not in text:
                chunk = client.chunk()
                assert chunk
                text += gunzip.decompress(chunk)
        assert client.headers["content-encoding"] == "gzip"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/sse/three", b": ok\n\ndata: 0\n\ndata: 1\n\ndata: 2\n\n"),
        ("/ndjson/three", b"0\n1\n2\n"),
        ("/raw/three", b"012"),
    ],
    ids=["sse", "ndjson", "raw"],
)
def test_a_finished_stream_is_whole(nginx, server, key, path, body):
    """The end is marked, though nginx may have asked in HTTP/1.0."""
    with nginx.get(f"{path}?key={key}") as client:
        assert client.rest() == body
        assert client.is_whole
    assert server.control.next(f"{key}-ended") == ["finished", True]


@pytest.mark.parametrize("kind", ["sse", "ndjson", "raw"])
def test_an_error_truncates(nginx, server, key, kind):
    """What was sent arrives, and the end is not marked."""
    with (
        opened(server, key),
        nginx.get(f"/{kind}/failing?key={key}", headers=EVENT_SOURCE) as client,
    ):
        if kind == "sse":
            assert client.block() == b": ok\n"
            assert client.block() == b"data: 0\n\n"
        else:
            assert client.chunk().strip() == b"0"
        server.control.open(key)
        last = client.rest()
        assert re.fullmatch(rb"retry: \d+\n\n" if kind == "sse" else b"", last)
        assert not client.is_whole
    assert server.control.next(f"{key}-ended") == ["RuntimeError", True]


@pytest.mark.parametrize("kind", ["ndjson", "raw"])
def test_an_error_before_the_first_chunk_is_a_500(nginx, server, key, kind):
    """Where nothing has been sent, the application answers, and nginx passes it on."""
    with nginx.get(f"/{kind}/broken?key={key}") as client:
        client.read_head()
        assert client.status == 500
    assert server.control.next(f"{key}-ended") == ["RuntimeError", True]


def test_the_last_event_id_is_passed_on(nginx, server, key):
    """The generator learns where its client wants to go on."""
    headers = {**EVENT_SOURCE, "Last-Event-ID": "é 42"}
    with nginx.get(f"/sse/resumed?key={key}", headers=headers) as client:
        assert client.block() == b": ok\n"
        assert client.block() == 'data: {"after":"é 42"}\n\n'.encode()


def test_a_client_that_comes_back_after_the_end_gets_204(nginx, server, key):
    """The end id arrives, and who presents it is told to stay away."""
    with nginx.get(f"/sse/three?key={key}", headers=EVENT_SOURCE) as client:
        assert client.rest().endswith(b"data: 2\n\nid: syncstream-end\n\n")
    headers = {**EVENT_SOURCE, "Last-Event-ID": "syncstream-end"}
    with nginx.get(f"/sse/three?key={key}", headers=headers) as client:
        client.read_head()
        assert client.status == 204
    server.control.next(f"{key}-started")
    assert server.control.pending(f"{key}-started") == []


def test_head_starts_nothing(nginx, server, key):
    """HEAD is answered at once, and the source rests."""
    with nginx.connect() as client:
        client.request("HEAD", f"/sse/gated?key={key}")
        client.read_head()
        assert client.status == 200
    server.control.open(key)
    with nginx.get("/health") as client:
        assert client.rest() == b"ok"
    assert server.control.pending(f"{key}-started") == []


@pytest.mark.parametrize("source", ["ticking", "watching"])
def test_a_clients_leave_is_seen(nginx, server, key, source):
    """nginx hangs up at once: a generator that yields or looks is closed in 1 s."""

    def leave():
        with nginx.get(f"/sse/{source}?key={key}") as client:
            assert client.block() == b": ok\n\n"
            assert client.block() == b"data: 0\n\n"
        began = time.monotonic()
        how, same_thread = server.control.next(f"{key}-ended")
        assert how in ("GeneratorExit", "ClientDisconnected", "finished")
        assert same_thread
        return time.monotonic() - began

    assert quickest(leave) < 1


def quickest(measure):
    """Return the least of three times: a busy machine is late, but not each time."""
    return min(measure() for _ in range(3))


def test_a_clients_leave_ends_a_sleep(nginx, server, key):
    """A generator in the middle of a long sleep is closed within 1 s, too."""

    def leave():
        with nginx.get(f"/sse/sleeping?key={key}") as client:
            assert client.block() == b": ok\n\n"
            assert client.block() == b"data: 0\n\n"
            server.control.next(f"{key}-asleep")
        began = time.monotonic()
        assert server.control.next(f"{key}-ended") == ["ClientDisconnected", True]
        return time.monotonic() - began

    assert quickest(leave) < 1


# nginx' settings, one at a time.


def test_a_unix_socket_hides_a_cut_from_http_1_0(tmp_path, key):
    """Over a Unix socket only proxy_http_version 1.1 shows that a stream broke."""
    path = f"unix:{tmp_path}/socket"
    with LiveServer("gunicorn-gevent", "tests.apps.proxy_app:app", "-b", path):
        # 1.0 is the default before nginx 1.29.7.
        for version, is_whole in (("1.0", True), ("1.1", False)):
            settings = f"proxy_http_version {version};"
            with (
                Nginx(location(f"http://{path}", settings)) as nginx,
                nginx.get(f"/sse/raise-RuntimeError?key={key}") as client,
            ):
                assert client.rest() == b": ok\n\ndata: 0\n\n"
                assert client.is_whole is is_whole


def test_a_silent_stream_is_cut_by_the_read_timeout(gevent, key):
    """proxy_read_timeout cuts what is silent: truncated, or 504 if all was."""
    with (
        Nginx(location(gevent.port, "proxy_read_timeout 3s;")) as nginx,
        opened(gevent, key),
    ):
        with nginx.get(f"/sse/silent?key={key}") as client:
            assert client.rest() == b": ok\n\n"
            assert not client.is_whole
        assert "upstream timed out" in nginx.log()
        with nginx.get(f"/ndjson/silent?key={key}") as client:
            client.read_head()
            assert client.status == 504


@pytest.mark.parametrize("path", ["sse/commenting", "kept/dozing"])
def test_comments_keep_a_stream_alive(gevent, key, path):
    """Comments more often than proxy_read_timeout keep it alive, ours or yours."""
    with (
        Nginx(location(gevent.port, "proxy_read_timeout 3s;")) as nginx,
        nginx.get(f"/{path}?key={key}") as client,
    ):
        assert client.rest().endswith(b": keepalive\n\ndata: 0\n\n")
        assert client.is_whole


def test_ignoring_a_clients_leave_hides_it(gevent, key):
    """With proxy_ignore_client_abort the leave shows at the next write only."""
    with Nginx(location(gevent.port, "proxy_ignore_client_abort on;")) as nginx:
        with nginx.get(f"/sse/gated?key={key}") as client:
            assert client.block() == b": ok\n\n"
        # Requests that come later are through: nginx has seen the leave by now.
        with nginx.get("/health") as client:
            assert client.rest() == b"ok"
        assert gevent.control.pending(f"{key}-ended") == []
        how, _ = end_of(gevent, key)
        assert how in ("GeneratorExit", "ClientDisconnected")


def test_ignoring_our_header_buffers(gevent, key):
    """With proxy_ignore_headers X-Accel-Buffering all comes in one piece."""
    settings = "proxy_ignore_headers X-Accel-Buffering;"
    with (
        Nginx(location(gevent.port, settings)) as nginx,
        nginx.get(f"/raw/gated_three?key={key}") as client,
    ):
        for n in range(3):
            gevent.control.open(key)
            # Made and written; nginx keeps it.
            assert gevent.control.next(f"{key}-made") == n
        assert is_silent(client)
        gevent.control.open(key)
        assert client.chunk() == b"012"


def is_silent(client):
    """Tell whether nothing at all has come from the server."""
    return not select.select([client.socket], [], [], 0.2)[0]


def test_a_second_nginx_needs_the_header_too(gevent, key):
    """nginx does not pass X-Accel-Buffering on, unless proxy_pass_header says so."""
    pass_on = "proxy_pass_header X-Accel-Buffering;"
    with (
        Nginx(location(gevent.port)) as inner,
        Nginx(location(inner.port)) as outer,
        opened(gevent, key),
        outer.get(f"/sse/gated?key={key}") as client,
    ):
        gevent.control.next(f"{key}-started")
        assert is_silent(client)
    with (
        Nginx(location(gevent.port, pass_on)) as inner,
        Nginx(location(inner.port)) as outer,
        outer.get(f"/sse/resumed?key={key}") as client,
    ):
        assert client.block() == b": ok\n\n"
        assert "x-accel-buffering" not in client.headers


def test_connections_to_the_application_are_kept(gevent, key):
    """A finished stream's connection serves the next request; a cut one's does not."""
    with Nginx(keepalive(gevent.port)) as nginx:

        def port():
            with nginx.get("/port") as client:
                return client.rest()

        first = port()
        with nginx.get(f"/sse/three?key={key}") as client:
            client.rest()
        assert port() == first
        with nginx.get(f"/sse/raise-RuntimeError?key={key}") as client:
            client.rest()
        assert port() != first


def test_one_error_takes_no_group_out_of_service(gevent, key):
    """An error before the first byte runs on one server of a group, and bars none."""
    # Both are the same application: nginx does not know that.
    group = f"server 127.0.0.1:{gevent.port};" * 2
    config = f"upstream app {{ {group} }}" + location("http://app")
    with Nginx(config) as nginx:
        with nginx.get(f"/ndjson/broken?key={key}") as client:
            client.read_head()
            assert client.status == 500
        with nginx.get("/health") as client:
            client.read_head()
            assert client.status == 200
        gevent.control.next(f"{key}-ended")
        assert gevent.control.pending(f"{key}-ended") == []


def test_a_stream_takes_two_of_the_worker_connections(gevent, key):
    """Where worker_connections are used up, nginx answers 500."""
    with (
        Nginx(location(gevent.port), connections=20) as nginx,
        opened(gevent, key),
        contextlib.ExitStack() as stack,
    ):
        statuses = []
        for _ in range(12):
            client = stack.enter_context(nginx.get(f"/sse/gated?key={key}"))
            client.read_head()
            statuses.append(client.status)
        # Some more are nginx' own.
        count = statuses.count(200)
        assert 6 <= count <= 10
        assert statuses == [200] * count + [500] * (12 - count)
        assert "worker_connections are not enough" in nginx.log()


# HTTP/2, as browsers speak it.


class Curl:
    """curl, following one URL over HTTP/2 and TLS."""

    def __init__(self, nginx, path, *options):
        curl = program("curl", "curl")
        words = ["-sS", "--no-buffer", "--insecure", "--http2"]
        report = ["--write-out", "%{stderr}HTTP/%{http_version} %{http_code}"]
        url = f"https://127.0.0.1:{nginx.port}{path}"
        self._process = subprocess.Popen(
            [curl, *words, *report, *options, url],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        self._text = b""

    def block(self):
        """Return the body up to the next blank line."""
        pipe = self._process.stdout
        while b"\n\n" not in self._text:
            assert select.select([pipe], [], [], TIMEOUT)[0]
            data = os.read(pipe.fileno(), 65536)
            assert data
            self._text += data
        block, _, self._text = self._text.partition(b"\n\n")
        return block + b"\n\n"

    def end(self):
        """Wait for its end: the rest of the body, what it reports, its status."""
        body, report = self._process.communicate(timeout=TIMEOUT)
        return self._text + body, report.decode(), self._process.returncode

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module", params=["plain", "gzip"])
def h2(request, gevent):
    """nginx with HTTP/2 over TLS."""
    settings = GZIP if request.param == "gzip" else ""
    # "http2 on;" is new in 1.25.1, which still understands this.
    tls = "ssl_certificate cert.pem; ssl_certificate_key key.pem;"
    config = location(gevent.port, settings, "ssl http2").replace(
        "location", f"{tls} location", 1
    )
    with Nginx(config, tls=True) as nginx:
        yield nginx


@pytest.mark.parametrize("options", [[], ["--compressed"]], ids=["identity", "gzip"])
def test_events_arrive_one_at_a_time_over_http_2(h2, gevent, key, options):
    """Over HTTP/2 each event arrives alone, and a leave is seen, just the same."""
    with (
        opened(gevent, key),
        Curl(h2, f"/sse/gated?key={key}", *options) as client,
    ):
        assert client.block() == b": ok\n\n"
        for n in range(3):
            gevent.control.open(key)
            assert client.block() == f"data: {n}\n\n".encode()

    def leave():
        with Curl(h2, f"/sse/watching?key={key}w", *options) as client:
            assert client.block() == b": ok\n\n"
            assert client.block() == b"data: 0\n\n"
        began = time.monotonic()
        gevent.control.next(f"{key}w-ended")
        return time.monotonic() - began

    assert quickest(leave) < 1


def test_an_end_is_told_from_a_cut_over_http_2(h2, key):
    """A whole stream is ended in good order, a broken one is reset."""
    with Curl(h2, f"/sse/three?key={key}") as client:
        body, report, status = client.end()
        assert body == b": ok\n\ndata: 0\n\ndata: 1\n\ndata: 2\n\n"
        assert (report, status) == ("HTTP/2 200", 0)
    with Curl(h2, f"/sse/raise-RuntimeError?key={key}") as client:
        body, report, status = client.end()
        assert body == b": ok\n\ndata: 0\n\n"
        assert status == 92  # "HTTP/2 stream was not closed cleanly"
