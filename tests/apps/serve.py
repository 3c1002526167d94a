"""Serve ``module:attribute`` by a server that has no command of its own.

python -m tests.apps.serve KIND MODULE:ATTRIBUTE PORT

KIND is pywsgi, werkzeug, waitress, cheroot or runserver.

waitress listens at the Unix socket, too, that $UNIX_SOCKET names.
"""

import importlib
import sys


def main() -> None:
    kind, target, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
    if kind == "pywsgi":
        from gevent import monkey

        monkey.patch_all()
    module, _, attribute = target.partition(":")
    app = getattr(importlib.import_module(module), attribute)
    globals()[f"serve_{kind}"](app, port)


def serve_pywsgi(app, port):
    import signal

    import gevent
    from gevent.pywsgi import WSGIServer

    server = WSGIServer(("127.0.0.1", port), app)
    gevent.signal_handler(signal.SIGINT, server.stop)
    server.serve_forever()


def serve_werkzeug(app, port):
    from werkzeug.serving import run_simple

    run_simple("127.0.0.1", port, app, threaded=True)


def serve_waitress(app, port):
    import logging
    import os
    import threading

    import waitress

    logging.basicConfig()
    if "UNIX_SOCKET" in os.environ:
        path = os.environ["UNIX_SOCKET"]
        other = waitress.create_server(app, unix_socket=path, threads=8)
        threading.Thread(target=other.run, daemon=True).start()
    waitress.serve(app, host="127.0.0.1", port=port, threads=8)


def serve_cheroot(app, port):
    from cheroot.wsgi import Server

    server = Server(("127.0.0.1", port), app, numthreads=8)
    server.safe_start()


def serve_runserver(app, port):
    """Do as Django's ``manage.py runserver --noreload`` does."""
    import sys

    from django.core.servers import basehttp

    try:
        basehttp.run("127.0.0.1", port, app, threading=True)
    except KeyboardInterrupt:
        sys.exit(0)


main()
