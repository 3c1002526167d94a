"""Requests to a WSGI application, in process."""

from werkzeug.middleware.lint import LintMiddleware
from werkzeug.test import Client

# As an EventSource asks.
ASK = {"Accept": "text/event-stream", "Cache-Control": "no-cache"}


def get(app, method="GET", **options):
    return Client(LintMiddleware(app)).open("/", method=method, **options)
