"""A connection to a server, TLS included, before a deadline."""

from __future__ import annotations

import queue
import socket
import ssl
import threading
from typing import Any
from urllib.parse import urlsplit

from ..runtime.clock import time
from .observation import NoStream, show

__all__ = ["connect", "reason_of"]


def reason_of(error: OSError) -> str:
    """Return an error's reason, without Python's decorations."""
    if isinstance(error, ssl.SSLError):
        return (error.reason or "TLS error").replace("_", " ").lower()
    return error.strerror or str(error) or type(error).__name__


def connect(url: str, deadline: float, *, insecure: bool = False) -> socket.socket:
    """Return a connection to the address, encrypted if it is https.

    Raises:
        NoStream: There is none, or none before the deadline.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    where = f"port {port} of {show(host)}"
    error: OSError = TimeoutError("no time was left")
    for family, kind, protocol, _, address in _resolve(host, port, deadline):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        sock = None
        try:
            sock = socket.socket(family, kind, protocol)
            sock.settimeout(left)
            sock.connect(address)
        except OSError as e:
            error = e
            if sock is not None:
                sock.close()
            continue
        if parts.scheme == "http":
            return sock
        try:
            return _encrypted(sock, host, deadline, insecure)
        except BaseException:
            sock.close()
            raise
    if isinstance(error, ConnectionRefusedError):
        text = f"nothing listens on {where}: the connection was refused"
        cure = "start the server; check the port and the address that it binds to"
    elif isinstance(error, TimeoutError):
        text = f"{where} did not answer in time"
        cure = "check the address, the firewall and the security group"
    else:
        text = f"{where} cannot be reached: {reason_of(error)}"
        cure = "check the address and the network"
    raise NoStream("connection", text, cure) from error


def _resolve(host: str, port: int, deadline: float) -> list[Any]:
    """Return getaddrinfo's answer; getaddrinfo has no time limit of its own."""
    answers: queue.SimpleQueue[list[Any] | Exception] = queue.SimpleQueue()

    def resolve() -> None:
        try:
            answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:  # a label may be too long for IDNA
            answers.put(error)

    threading.Thread(target=resolve, daemon=True).start()
    answer: list[Any] | Exception
    try:
        answer = answers.get(timeout=max(deadline - time.monotonic(), 0.001))
    except queue.Empty:
        answer = TimeoutError("no answer in time")
    if isinstance(answer, Exception):
        reason = reason_of(answer) if isinstance(answer, OSError) else str(answer)
        raise NoStream(
            "dns",
            f"the name {show(host)} has no address: {show(reason)}",
            "check the spelling and the DNS records",
        ) from answer
    return answer


def _encrypted(
    sock: socket.socket, host: str, deadline: float, insecure: bool
) -> ssl.SSLSocket:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    sock.settimeout(max(deadline - time.monotonic(), 0.001))
    try:
        return context.wrap_socket(sock, server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        raise NoStream(
            "tls",
            f"the certificate is not trusted: {show(error.verify_message)}",
            "renew or correct the certificate and its chain; --insecure accepts it,"
            " but browsers will not",
        ) from error
    except TimeoutError as error:
        raise NoStream(
            "tls", "the TLS handshake took too long", "is this port HTTPS? Try http://"
        ) from error
    except (OSError, ValueError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else str(error)
        raise NoStream(
            "tls",
            f"the TLS handshake failed: {show(reason)}",
            "is this port HTTPS? If not, try http://",
        ) from error
