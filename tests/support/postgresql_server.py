"""A real PostgreSQL on a free port, as a child process, and a line to it that fails.

Debian's program, in a folder of its own; as root it runs as an ordinary user, since it
refuses to run as root. Where it is missing the test is skipped; under ``CI=true`` it
fails.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import psycopg

from tests.support.live import free_port
from tests.support.programs import program
from tests.support.waits import TIMEOUT, await_true

__all__ = ["Line", "PostgreSQL"]

# The file system's own cache outlives the processes that tests kill.
SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "fsync": "off",
    "max_connections": "200",
    "shared_buffers": "16MB",
    "log_min_messages": "warning",
}


def _program(name: str) -> str:
    # Debian has none of them in the PATH.
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else program(name, "postgresql")


class PostgreSQL:
    """A running server; all may log in as "postgres", without a password.

    Args:
        env: More environment variables.
    """

    def __init__(self, env: dict[str, str] | None = None) -> None:
        self._env = {**os.environ, **(env or {})}
        initdb, self._program = _program("initdb"), _program("postgres")
        self._user: dict[str, Any] = {}
        if os.geteuid() == 0:
            self._user = {"user": "postgres", "group": "postgres", "extra_groups": []}
        self.port = 0
        self._folder = Path(tempfile.mkdtemp(prefix="pg-"))
        self.data = self._folder / "data"
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: psycopg.Connection[Any] | None = None
        self._log = self._folder / "log"
        self._log.touch()
        try:
            if self._user:
                for path in (self._folder, self._log):
                    shutil.chown(path, "postgres", "postgres")
            words = "-U postgres -A trust -N -E UTF8 --locale C"
            subprocess.run(
                [initdb, "-D", str(self.data), *words.split()],
                check=True,
                capture_output=True,
                cwd=self._folder,
                **self._user,
            )
            self.port = free_port()  # not before: others look for some meanwhile
            self.start()
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        return self.url_at(self.port)

    def url_at(self, port: int, database: str = "postgres") -> str:
        return f"postgresql://postgres@127.0.0.1:{port}/{database}"

    def start(self) -> None:
        """Start it, on the port it had before; return when it answers."""
        settings = [f"{name}={value}" for name, value in SETTINGS.items()]
        words = [word for setting in settings for word in ("-c", setting)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(self._program, "-D", str(self.data), "-p", str(self.port)),
                    *("-k", str(self._folder), *words),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                env=self._env,
                **self._user,
            )
        deadline = time.monotonic() + 3 * TIMEOUT
        while True:
            try:
                self.connect().close()
            except psycopg.OperationalError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    message = f"PostgreSQL did not start:\n{self.log()}"
                    raise RuntimeError(message) from None
                time.sleep(0.02)
            else:
                return

    def connect(self, **options: Any) -> psycopg.Connection[Any]:
        return psycopg.connect(self.url, autocommit=True, **options)

    def execute(self, sql: str, *words: Any) -> list[Any]:
        """Run a statement as the superuser, over a connection that is kept for that.

        A new one for each would keep a machine busy where something is waited for.
        """
        if self._connection is None:
            # What is prepared would outlive the tables that it names.
            self._connection = self.connect(prepare_threshold=None)
        cursor = self._connection.execute(sql, words or None)
        return cursor.fetchall() if cursor.description else []

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def stop(self) -> None:
        """Stop it as an operator does who does not wait for clients."""
        self._hang_up()
        if self._process is None:
            return
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process = None

    def kill(self) -> None:
        """Kill it, and all its processes, at once."""
        self._hang_up()
        if self._process is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self._process.pid)
            own.suspend()
            ends = psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE
            await_true(lambda: own.status() in ends)
            family = [own, *own.children(recursive=True)]
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(family[1:], TIMEOUT)
        self._process.wait(TIMEOUT)
        self._process = None

    def save(self, name: str) -> None:
        """Copy what it has, as a backup does; it is stopped for that."""
        self.stop()
        subprocess.run(
            ["cp", "-a", str(self.data), str(self._folder / name)], check=True
        )
        self.start()

    def restore(self, name: str) -> None:
        """Have it as it was."""
        self.kill()
        shutil.rmtree(self.data)
        (self._folder / name).rename(self.data)
        self.start()

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> PostgreSQL:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class Line:
    """A TCP proxy to a port of this machine, that can be cut, or go silent.

    Attributes:
        refused: How many connections have come while it was cut, or led nowhere.
        waiting: How many have come while it was silent.
    """

    def __init__(self, port: int) -> None:
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self.refused = self.waiting = 0
        self._passes = {"in": threading.Event(), "out": threading.Event()}
        for event in self._passes.values():
            event.set()
        self._is_cut = self._is_closed = False
        self._start(self._accept)

    def _start(self, function: Any, *words: Any) -> None:
        thread = threading.Thread(target=function, args=words, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                is_refused = self._is_cut or self._is_closed
                self.refused += is_refused
                self.waiting += not self._passes["in"].is_set()
                if not is_refused:
                    self._sockets.add(client)
            if is_refused:
                client.close()
                continue
            self._start(self._carry, client)

    def _carry(self, client: socket.socket) -> None:
        # A server that listens and does not answer, while it is silent.
        self._passes["in"].wait()
        try:
            server = socket.create_connection(("127.0.0.1", self._to), TIMEOUT)
        except OSError:
            self._end(client)
            with self._lock:
                self.refused += 1
            return
        server.settimeout(None)
        with self._lock:
            self._sockets.add(server)
        self._start(self._pump, client, server, "in")
        self._pump(server, client, "out")

    def _pump(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        try:
            while data := source.recv(65536):
                self._passes[way].wait()
                sink.sendall(data)
        except OSError:
            pass
        self._passes[way].wait()
        self._end(source)
        self._end(sink)

    def _end(self, sock: socket.socket) -> None:
        with self._lock:
            self._sockets.discard(sock)
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        sock.close()

    def cut(self) -> None:
        """Close all connections, and each that comes, until `mend`."""
        with self._lock:
            self._is_cut = True
            sockets = list(self._sockets)
        for sock in sockets:
            self._end(sock)

    def silence(self, *ways: str) -> None:
        """Pass nothing on, "in" to the server or "out", and close nothing."""
        for way in ways or self._passes:
            self._passes[way].clear()

    def mend(self) -> None:
        """Let all pass again."""
        with self._lock:
            self._is_cut = False
        for event in self._passes.values():
            event.set()

    def close(self) -> None:
        self._is_closed = True
        self.cut()
        self.mend()
        self._end(self._listener)
        for thread in self._threads:
            thread.join(TIMEOUT)

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
