"""What the README says to copy for several workers does what it says."""

import configparser
import contextlib
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import tempfile
from pathlib import Path

import pytest

from live import LiveServer, await_true
from postgresql_server import PostgreSQL
from programs import program
from redis_server import RedisServer
from syncstream.protocol import sse

ROOT = Path(__file__).parent.parent
EVENT_SOURCE = {"Accept": "text/event-stream", "Cache-Control": "no-cache"}


def blocks():
    """Return the lines of each block of commands, by the scheme of its URL."""
    text = (ROOT / "README.md").read_text()
    part = text.partition("<!-- brokers -->")[2].partition("<!-- end of brokers -->")[0]
    found = re.findall("```sh\n(.*?)```", part, re.DOTALL)
    lines = [block.strip().split("\n") for block in found]
    return {re.search(r"HUB_URL=(\w+):", block[-1])[1]: block for block in lines}


@contextlib.contextmanager
def engine(scheme):
    """Run what the system packages would have started; yield its port."""
    if scheme == "local":
        yield None
    else:
        with {"redis": RedisServer, "postgresql": PostgreSQL}[scheme]() as server:
            yield server.port


@pytest.fixture(params=["local", "redis", "postgresql"])
def chat(request):
    """Do what a block says, with an engine on another port; yield its server."""
    first, *middle, last = blocks()[request.param]
    with (
        tempfile.TemporaryDirectory() as folder,  # pytest's are too long for sockets
        engine(request.param) as port,
    ):
        check_packages(first)
        for line in middle:
            if line.startswith("su postgres -c "):
                run_as_postgres(shlex.split(line)[-1], port)
            else:
                check_extras(line)
        url, gunicorn, *words, app = shlex.split(last)
        assert gunicorn == ".venv/bin/gunicorn"
        url = url.removeprefix("HUB_URL=")
        if port:
            assert "127.0.0.1" in url
            url = url.replace("127.0.0.1", f"127.0.0.1:{port}")
        env = {"HUB_URL": url, "TMPDIR": folder}
        with LiveServer("gunicorn-sync", app, *words, env=env, ready="GET /") as server:
            yield server
            assert server.tracebacks() == 0, server.log()


def check_packages(line):
    """They are Debian's: those that the tests install, by the same names."""
    install, _, rest = line.partition(" && ")
    assert rest == "python3 -m venv .venv"
    words = shlex.split(install)
    assert words[:3] == ["apt-get", "install", "-y"]
    known = (ROOT / "tests" / "run").read_text() + (ROOT / ".ci" / "venv").read_text()
    for name in words[3:]:
        assert re.search(rf"\b{name}\b", known), name


def check_extras(line):
    """They exist, and what they need is what runs here."""
    *command, what = shlex.split(line)
    assert command == [".venv/bin/pip", "install"]
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = re.fullmatch(r"\.\[([a-z,]+)\]", what)[1].split(",")
    for extra in extras:
        for requirement in config["options.extras_require"][extra].split("\n"):
            if name := re.match(r"[\w-]*", requirement)[0]:
                importlib.metadata.distribution(name)


def run_as_postgres(command, port):
    assert command.startswith("psql ")
    program("psql", "postgresql")
    where = {"PGHOST": "127.0.0.1", "PGPORT": str(port), "PGUSER": "postgres"}
    subprocess.run(["sh", "-c", command], check=True, env={**os.environ, **where})


def say(server, text):
    body = text.encode()
    with server.connect() as client:
        head = "POST /say HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        client.socket.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
        client.socket.sendall(body)
        answer = client.rest()
        assert client.status == 200, answer
        return json.loads(answer)["id"]


def follow(server, last=None):
    headers = dict(EVENT_SOURCE)
    if last is not None:
        headers["Last-Event-ID"] = last
    return server.get("/events", headers=headers)


def take(client, count):
    """Return the data of the next events; a reset is its name."""
    found = []
    while len(found) < count:
        found += [e.event or e.data for e in sse.Decoder().feed(client.block())]
    return found


def test_the_chat_of_several_workers(chat):
    """All clients of all workers get each line; after a restart they miss none."""
    lines = [f"line {number}" for number in range(20)]
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(follow(chat)) for _ in range(12)]
        for line in lines:
            last = say(chat, line)
        for client in clients:
            assert take(client, len(lines)) == lines
    await_true(lambda: "Booting worker" in chat.log())
    assert chat.log().count("Booting worker") == 4
    chat.stop()
    chat.start(chat.port)
    say(chat, "after")
    with follow(chat, last) as client:
        assert take(client, 1) == ["after"]
