"""A real redis-server on a free port, as a child process: `RedisServer`, `Sentinel`.

Debian's program. Where it is missing the test is skipped; under ``CI=true`` it fails.
"""

from __future__ import annotations

import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis

from tests.support.live import free_port
from tests.support.programs import program
from tests.support.waits import TIMEOUT


class RedisServer:
    """A server that keeps nothing on disk, unless told to.

    Args:
        options: More words for its command line, ``--appendonly yes``.
        tls: `port` speaks TLS, with this cert.pem and key.pem.
    """

    def __init__(self, *options: str, tls: tuple[Path, Path] | None = None) -> None:
        self._program = program("redis-server", "redis-server")
        self._folder = tempfile.TemporaryDirectory(prefix="redis-")
        self.folder = Path(self._folder.name)
        self.port = free_port()
        self.socket = self.folder / "redis.sock"
        self._tls: dict[str, Any] = {}
        words = ["--port", str(self.port)]
        if tls is not None:
            cert, key = map(str, tls)
            words = ["--port", "0", "--tls-port", str(self.port)]
            words += ["--tls-cert-file", cert, "--tls-key-file", key]
            words += ["--tls-auth-clients", "no"]
            self._tls = {"ssl": True, "ssl_ca_certs": cert, "ssl_check_hostname": False}
        self._words = [
            *("--bind", "127.0.0.1", *words, "--unixsocket", str(self.socket)),
            *("--dir", str(self.folder), "--save", "", *options),
        ]
        self._log = self.folder / "log"
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def client(self, **options: Any) -> redis.Redis:
        """Return a client for the test's own questions; close it."""
        return redis.Redis(port=self.port, **{**self._tls, **options})

    def command(self, *words: Any, **options: Any) -> Any:
        """Send one command, and return the reply."""
        with self.client(**options) as client:
            return client.execute_command(*words)

    def start(self, *options: str, is_ready: bool = True) -> None:
        """Start it, on the same port as before; wait until it is ready, or loading."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [self._program, *self._words, *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                with self.client(protocol=2, socket_timeout=1) as client:
                    client.execute_command("PING")
            except redis.AuthenticationError:
                return
            except redis.BusyLoadingError:
                if not is_ready:
                    return
                time.sleep(0.02)
            except redis.RedisError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"it did not start:\n{self.log()}") from None
                time.sleep(0.02)
            else:
                return

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def send(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it, by SIGKILL for no good end, and wait for that."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        try:
            process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def restart(self, number: int = signal.SIGTERM) -> None:
        self.stop(number)
        self.start()

    def restart_slowly(self) -> None:
        """Stop it in good order; start it, and return while it loads its data."""
        self.stop()
        words = ("--key-load-delay", "500")
        words += ("--loading-process-events-interval-bytes", "1024")
        self.start(*words, is_ready=False)

    def is_loading(self) -> bool:
        try:
            self.command("PING", protocol=2)
        except redis.BusyLoadingError:
            return True
        return False

    def listeners(self) -> list[dict[str, Any]]:
        """Return the connections that are subscribed to anything; no Sentinel's."""
        with self.client() as client:
            found: list[dict[str, Any]] = client.client_list(_type="pubsub")
        return [one for one in found if not one["name"].startswith("sentinel-")]

    def close(self) -> None:
        """Stop it, and remove its files."""
        self.stop(signal.SIGKILL)
        self._folder.cleanup()

    def __enter__(self) -> RedisServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class Sentinel:
    """One that watches a server, and promotes a replica two seconds after its end.

    Args:
        name: Of the service.
        port: The server's.
    """

    def __init__(self, name: str, port: int) -> None:
        self._program = program("redis-server", "redis-server")
        self._folder = tempfile.TemporaryDirectory(prefix="sentinel-")
        self._name = name
        self.port = free_port()
        config = Path(self._folder.name) / "sentinel.conf"
        lines = [
            *(f"port {self.port}", "bind 127.0.0.1", f"dir {self._folder.name}"),
            f"sentinel monitor {name} 127.0.0.1 {port} 1",
            f"sentinel down-after-milliseconds {name} 2000",
            f"sentinel failover-timeout {name} 3000",
        ]
        config.write_text("\n".join([*lines, ""]))
        self._process = subprocess.Popen(
            [self._program, str(config), "--sentinel"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        try:
            self._await(lambda: self._ask("PING"))
        except BaseException:
            self.close()
            raise

    def _ask(self, *words: str) -> Any:
        with redis.Redis(port=self.port, protocol=2, socket_timeout=1) as client:
            return client.execute_command(*words)

    def _await(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                if condition():
                    return
            except redis.RedisError:
                pass
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def await_replica(self) -> None:
        """Wait until it knows whom to promote."""
        self._await(lambda: self._ask("SENTINEL REPLICAS", self._name))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()

    def __enter__(self) -> Sentinel:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
