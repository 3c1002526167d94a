"""A real nginx on a free port, as a child process: `Nginx`.

Debian's program, with the configuration that a test gives it. Where it is missing
the test is skipped; under ``CI=true`` it fails.
"""

from __future__ import annotations

import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.support.live import Client, free_port
from tests.support.programs import certificate, program
from tests.support.waits import TIMEOUT

# What is around a server block. Nothing of it changes how a stream is passed on:
# one process in the foreground, all its files below its prefix.
MAIN = """
daemon off;
master_process off;
pid nginx.pid;
error_log error.log info;
events {{ worker_connections {connections}; }}
http {{
    access_log off;
    client_body_temp_path temp;
    proxy_temp_path temp;
    fastcgi_temp_path temp;
    uwsgi_temp_path temp;
    scgi_temp_path temp;
    {servers}
}}
"""


class Nginx:
    """A running nginx, and what it has logged.

    Args:
        servers: What its ``http`` block holds; ``$PORT`` becomes `port`, a free one.
        tls: ``cert.pem`` and ``key.pem`` are made where the configuration finds
            them by those names, and `port` speaks TLS.
        connections: Its ``worker_connections``; nginx' own default is 512.
    """

    def __init__(
        self, servers: str, *, tls: bool = False, connections: int = 512
    ) -> None:
        nginx = program("nginx", "nginx-light")
        self.port = free_port()
        self._folder = tempfile.TemporaryDirectory(prefix="nginx-")
        folder = Path(self._folder.name)
        self._log = folder / "error.log"
        self._log.touch()
        servers = servers.replace("$PORT", str(self.port))
        config = folder / "nginx.conf"
        config.write_text(MAIN.format(servers=servers, connections=connections))
        if tls:
            certificate(folder)
        self._process = subprocess.Popen(
            [nginx, "-p", str(folder), "-c", str(config), "-e", str(self._log)],
            stdin=subprocess.DEVNULL,
        )
        try:
            self._await_ready()
        except BaseException:
            self.close()
            raise

    def _await_ready(self) -> None:
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), TIMEOUT).close()
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"nginx did not start:\n{self.log()}") from None
                time.sleep(0.02)
            else:
                return

    def connect(self) -> Client:
        return Client(socket.create_connection(("127.0.0.1", self.port), TIMEOUT))

    def get(self, path: str, **options: Any) -> Client:
        """Return a client that has sent a request; see `Client.request`."""
        client = self.connect()
        client.request("GET", path, **options)
        return client

    def log(self) -> str:
        """Return what it has written to its error log so far."""
        return self._log.read_text(errors="replace")

    def close(self) -> None:
        """Stop it, and remove its files."""
        self._process.terminate()
        try:
            self._process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def __enter__(self) -> Nginx:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def location(to, settings="", listen=""):
    """Return a server block whose only location passes everything on.

    Args:
        to: An upstream server's or another proxy's port, or what proxy_pass names.
        settings: More directives for the location.
        listen: More words for the listen directive.
    """
    to = f"http://127.0.0.1:{to}" if isinstance(to, int) else to
    return (
        f"server {{ listen 127.0.0.1:$PORT {listen};"
        f" location / {{ proxy_pass {to}; {settings} }} }}"
    )
