"""What the documentation says to copy does what it says."""

import configparser
import contextlib
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import tempfile

import pytest

from syncstream import Hub
from syncstream.protocol import sse
from tests import ROOT
from tests.support.live import LiveServer
from tests.support.postgresql_server import PostgreSQL
from tests.support.programs import program
from tests.support.redis_server import RedisServer
from tests.support.waits import await_true

EVENT_SOURCE = {"Accept": "text/event-stream", "Cache-Control": "no-cache"}


def blocks():
    """Return the lines of each block of commands, by the scheme of its URL."""
    text = (ROOT / "docs" / "brokers.md").read_text()
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


@pytest.mark.matrix
def test_the_chat_of_several_workers(chat):
    """All clients of all workers get each line; after a restart they miss none."""
    lines = [f"line {number}" for number in range(20)]
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(follow(chat)) for _ in range(12)]
        for line in lines:
            last = say(chat, line)
        for client in clients:
            assert take(client, len(lines)) == lines
    await_true(lambda: chat.log().count("Booting worker") == 4)
    chat.stop()
    chat.start(chat.port)
    say(chat, "after")
    with follow(chat, last) as client:
        assert take(client, 1) == ["after"]


def test_the_examples_of_the_readme():
    """Its generator sends each tick, and what its hub publishes is streamed."""
    text = (ROOT / "README.md").read_text()
    names = {"__name__": "readme", "__file__": "readme.py"}
    for block in re.findall("```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    client, decoder = names["app"].test_client(), sse.Decoder()
    names["sleep"] = lambda seconds: None
    found = decoder.feed(client.get("/events").data)
    assert [event.data for event in found] == [f'{{"tick":{n}}}' for n in range(10)]
    with (
        contextlib.closing(names["hub"]),
        client.get("/news", headers=EVENT_SOURCE) as answer,
    ):
        chunks = iter(answer.response)
        assert decoder.feed(next(chunks)) == []  # its opening; now it listens
        assert client.post("/news").status_code == 204
        found = decoder.feed(next(chunks))
        assert [event.data for event in found] == ['{"title":"…"}']


# What docs/brokers.md and docs/security.md say to copy.


def code(name, language, page="brokers.md"):
    """Return the code of a block of a page."""
    text = (ROOT / "docs" / page).read_text()
    part = text.partition(f"<!-- {name} -->")[2].partition(f"<!-- end of {name} -->")[0]
    (found,) = re.findall(f"```{language}\n(.*?)```", part, re.DOTALL)
    return found


def test_a_broker_of_your_own():
    """The one of the page keeps the contract, and a hub works with it."""
    names = {}
    exec(code("own", "python"), names)
    names["test_it_keeps_the_contract"]()
    with contextlib.closing(names["hub"]) as hub:
        subscription = hub.subscribe("a", after="start")
        id = hub.publish("a", "x")
        assert [(event.id, event.data) for event in subscription.read(5)] == [(id, "x")]


def test_publish_app_by_curl(tmp_path):
    """Mounted as the page says, its command publishes; another token does not."""
    curl = program("curl", "curl")
    (tmp_path / "mounted.py").write_text(code("publish_app", "python"))
    env = {
        "HUB_URL": "memory:",
        "PUBLISH_TOKEN": "secret",
        "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, ROOT))),
    }
    with LiveServer("gunicorn-sync", "mounted:app", env=env, ready="GET /") as server:
        command = code("publish_app", "sh").strip()
        assert command.startswith("curl ")
        command = command.replace("curl", f"{curl} -sS --max-time 10", 1)
        command = command.replace("127.0.0.1:8000", server.host)

        def run(token):
            env = {**os.environ, "PUBLISH_TOKEN": token}
            words = ["sh", "-c", command]
            return json.loads(subprocess.run(words, stdout=-1, env=env).stdout)

        with follow(server) as client:
            assert "error" in run("wrong")
            (id,) = run("secret")["ids"]
            (event,) = [e for _ in range(3) for e in sse.Decoder().feed(client.block())]
            assert (event.id, event.data) == (id, "Hello")


def test_a_private_channel(monkeypatch):
    """A user gets what is theirs until they log out; before they log in, nothing."""
    monkeypatch.setenv("HUB_URL", "memory:")
    monkeypatch.setenv("SECRET_KEY", "secret")
    names = {"__name__": "private", "__file__": "private.py"}
    exec(code("private", "python", "security.md"), names)
    hub, client = names["hub"], names["app"].test_client()
    with contextlib.closing(hub):
        assert client.get("/mail").status_code == 401
        with client.session_transaction() as session:
            session["user"] = "ann"
        decoder, events = sse.Decoder(), []
        with client.get("/mail", headers=EVENT_SOURCE) as answer:
            chunks = iter(answer.response)
            decoder.feed(next(chunks))  # its head; from here on it listens
            hub.publish("user:bob", "not hers")
            hub.publish("user:ann", "hers")
            while not events:
                events = decoder.feed(next(chunks))
            assert [event.data for event in events] == ["hers"]
            assert client.post("/logout").status_code == 204
            assert decoder.feed(b"".join(chunks)) == []
        assert client.get("/mail").status_code == 401


def anchors(path):
    """Return the anchors of a page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in found}


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))],
    ids=lambda p: p.name,
)
def test_links_lead_somewhere(page):
    """To a file of this repository, and a heading in it."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        target, _, anchor = link.partition("#")
        if target.startswith("http"):
            continue
        path = page.parent / target if target else page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link


def test_the_readme_leads_to_every_page():
    """No page of the documentation can be found by chance alone."""
    links = re.findall(r"\]\((docs/[^)#]+)\)", (ROOT / "README.md").read_text())
    pages = [f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")]
    assert sorted(set(links)) == sorted(pages)


def test_a_session_of_sqlalchemy():
    """Its connection is one to publish with: told at the commit, or never."""
    sqlalchemy = pytest.importorskip("sqlalchemy")
    orm = pytest.importorskip("sqlalchemy.orm")
    with PostgreSQL() as server, contextlib.closing(Hub(server.url)) as hub:
        url = server.url.replace("postgresql:", "postgresql+psycopg:")
        database = sqlalchemy.create_engine(url)
        subscription = hub.subscribe("a")
        assert subscription.read(0) == []
        for text in ("rolled back", "committed"):
            with orm.Session(database) as session:
                connection = session.connection().connection.driver_connection
                hub.publish("a", text, connection=connection)
                if text == "committed":
                    session.commit()
        assert [event.data for event in subscription.read(5)] == ["committed"]
        database.dispose()
