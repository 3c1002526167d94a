"""A request's environ, for a socket that is there."""

from types import SimpleNamespace


def gunicorn_body():
    """Return as much of gunicorn's ``wsgi.input`` as is looked at."""
    return SimpleNamespace(reader=SimpleNamespace(unreader=SimpleNamespace(buf=b"")))


def environ_of(sock, **more):
    return {
        "REQUEST_METHOD": "GET",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "gunicorn.socket": sock,
        "wsgi.input": gunicorn_body(),
        **more,
    }
