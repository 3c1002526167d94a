"""A request's environ, for a socket that is there, and a stack as a server's is."""

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


def called(ask, *names, owner=None, variable="self"):
    """Ask from within functions of these modules, the innermost first."""
    for name in names:
        scope = {"__name__": name, "ask": ask, "owner": owner}
        exec(f"def step({variable}=owner):\n    return ask()", scope)
        ask = scope["step"]
    return ask()
