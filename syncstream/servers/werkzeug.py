"""Werkzeug's development server, ``flask run``."""

from __future__ import annotations

from .contract import Environ, Server, has_cipher, speaks_http_1_1

__all__ = ["SERVER"]


def _marks_end(environ: Environ) -> bool:
    # It answers with HTTP/1.1, and so chunked, only if it has threads or processes.
    many: bool = environ["wsgi.multithread"] or environ["wsgi.multiprocess"]
    return many and speaks_http_1_1(environ)


SERVER = Server(
    "werkzeug",
    runs=lambda environ: "werkzeug.socket" in environ,
    socket=lambda environ: environ["werkzeug.socket"],
    marks_end=_marks_end,
    is_tls=lambda environ: has_cipher(environ["werkzeug.socket"]),
    write_module="werkzeug.serving",
)
