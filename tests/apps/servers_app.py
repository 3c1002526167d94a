"""An application that tells what the package knows of the server beneath it.

As a program it is a server in a configuration that tests/apps/serve.py does not have:

python servers_app.py CONFIGURATION PORT
"""

import json
import os
import signal
import sys
import threading
import time
import weakref
from urllib.parse import parse_qsl

from syncstream.servers import server_of
from tests.apps.control import gate, note

REPORTED = {}  # what a request has left behind: weak references to its parts


class Crumb:
    """Part of a request, that is gone when the request is."""


def facts(environ):
    server = server_of(environ)
    check = server.stopping(environ)
    return {
        "name": server.name,
        "unsent": server.unsent(environ),
        "stopping": None if check is None else check() is not None,
        "threads": server.threads(environ),
        "warnings": list(server.warnings(environ)),
    }


def start(environ, start_response):
    return start_response("200 OK", [("Content-Type", "text/plain")])


def show_facts(environ, start_response, key):
    start(environ, start_response)
    return [json.dumps(facts(environ)).encode()]


def show_facts_late(environ, start_response, key):
    """Ask in the iteration, rather than in the call."""
    start(environ, start_response)
    yield json.dumps(facts(environ)).encode()


def show_headers(environ, start_response, key):
    """Note the headers before and after the head has been sent."""
    server = server_of(environ)
    write = start(environ, start_response)
    assert write.__module__ == server.write_module, write.__module__
    for _ in range(2):
        headers = server.headers(write)
        note(key, [[name, value] for name, value in headers])
        write(b".")
    return []


def watch_stop(environ, start_response, key):
    """Serve until the gate opens; note when the server has been told to stop."""
    start(environ, start_response)
    check = server_of(environ).stopping(environ)

    def watch():
        looks = []
        while len(looks) < 5:
            looks = [*looks, check() is not None] if is_main_waiting() else []
            time.sleep(0.01)
        # By now the server's main thread is in its wait. A signal between its last
        # look and the system call would be handled when that returns: waitress looks
        # once a second, and a sync worker waits for this stream.
        note(f"{key}-begins", [os.getpid(), os.getppid(), any(looks)])
        while not check():
            time.sleep(0.01)
        note(f"{key}-stopping", time.monotonic())

    # Not a daemon: Werkzeug's and pywsgi's processes would be gone at once.
    threading.Thread(target=watch, daemon=False).start()
    yield b"open\n"
    gate(key)
    yield b"end\n"


def is_main_waiting():
    """Tell whether the main thread is in a wait; under gevent it is ours."""
    if threading.get_native_id() == os.getpid():
        return True
    with open("/proc/self/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "S"


def leave(environ, start_response, key):
    """Keep what tells of the stop, and look later whether it keeps the request."""
    start(environ, start_response)
    crumb = environ["crumb"] = Crumb()
    body = Body(server_of(environ), environ, crumb)
    REPORTED["check"] = None
    REPORTED["crumbs"] = [weakref.ref(crumb), weakref.ref(body)]
    return body


class Body:
    def __init__(self, server, environ, crumb):
        self.parts = [server, environ, crumb]

    def __iter__(self):
        server, environ, _ = self.parts
        REPORTED["check"] = server.stopping(environ)
        yield b"left\n"


def show_left(environ, start_response, key):
    start(environ, start_response)
    left = [crumb() is not None for crumb in REPORTED["crumbs"]]
    return [json.dumps([REPORTED["check"] is not None, left]).encode()]


def fill(environ, start_response, key):
    """Write to a client that does not read; note what the server keeps for it."""
    server = server_of(environ)
    write = start(environ, start_response)
    chunk = b"x" * 100_000
    written = 0
    # More than what the kernel may still take, a moment later.
    while written < 8_000_000 and server.unsent(environ) < 1_000_000:
        write(chunk)
        written += len(chunk)
    notes = []
    thread = threading.Thread(target=lambda: notes.append(server.unsent(environ)))
    thread.start()
    thread.join()
    note(key, [written, *notes])
    gate(key)
    while server.unsent(environ):
        time.sleep(0.005)
    note(key, [written, server.unsent(environ)])
    return []


VIEWS = {
    "/facts": show_facts,
    "/late": show_facts_late,
    "/headers": show_headers,
    "/stop": watch_stop,
    "/leave": leave,
    "/left": show_left,
    "/fill": fill,
}


def plain(environ, start_response):
    if environ["PATH_INFO"] == "/health":
        start_response("200 OK", [("Content-Length", "2")])
        return [b"ok"]
    key = dict(parse_qsl(environ["QUERY_STRING"])).get("key")
    return VIEWS[environ["PATH_INFO"]](environ, start_response, key)


def app(environ, start_response):
    """Add a header, as a compressing middleware does, and pass ``write`` through."""

    def encoded(status, headers, exc_info=None):
        return start_response(status, [*headers, ("X-Encoding", "gzip")])

    return plain(environ, encoded)


def wrap_signals():
    """Do as applications do that want to know of SIGTERM, too."""
    before = signal.getsignal(signal.SIGTERM)

    def handle(*args):
        sys.stderr.write("wrapped\n")
        return before(*args)

    signal.signal(signal.SIGTERM, handle)


if "WRAP_SIGNALS" in os.environ:
    wrap_signals()


def serve(configuration, port):
    if configuration == "pywsgi unpatched":
        from gevent.pywsgi import WSGIServer

        WSGIServer(("127.0.0.1", port), app).serve_forever()
    elif configuration == "pywsgi stop":
        import gevent
        from gevent import monkey
        from gevent.pywsgi import WSGIServer

        monkey.patch_all()
        server = WSGIServer(("127.0.0.1", port), app)
        gevent.signal_handler(signal.SIGINT, server.stop)
        server.serve_forever()
    elif configuration == "pywsgi pool":
        from gevent import monkey
        from gevent.pywsgi import WSGIServer

        monkey.patch_all()
        WSGIServer(("127.0.0.1", port), app, spawn=7).serve_forever()
    elif configuration in ("werkzeug single", "werkzeug processes"):
        from werkzeug.serving import run_simple

        processes = 1 if configuration == "werkzeug single" else 3
        run_simple("127.0.0.1", port, app, processes=processes)
    elif configuration == "waitress sockets":
        import waitress

        waitress.serve(app, listen=f"127.0.0.1:{port} 127.0.0.1:0", threads=3)
    elif configuration == "waitress close":
        import waitress

        server = waitress.create_server(app, host="127.0.0.1", port=port)
        signal.signal(signal.SIGINT, lambda *_: server.close())
        server.run()
    elif configuration == "werkzeug shutdown":
        from werkzeug.serving import make_server

        server = make_server("127.0.0.1", port, app, threaded=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        signal.sigwait({signal.SIGINT})
        server.shutdown()
    elif configuration == "a2wsgi":
        import a2wsgi
        import uvicorn

        uvicorn.run(a2wsgi.WSGIMiddleware(app), port=port)
    elif configuration == "uvicorn":
        import uvicorn

        uvicorn.run(app, port=port, interface="wsgi")
    elif configuration == "hypercorn":
        import asyncio

        from hypercorn.asyncio import serve
        from hypercorn.config import Config

        config = Config()
        config.bind = [f"127.0.0.1:{port}"]
        asyncio.run(serve(app, config, mode="wsgi"))
    else:
        raise LookupError(configuration)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
