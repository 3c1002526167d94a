"""What tests need and Python does not bring, programs and rights: or a skip.

Under ``CI=true`` a test that lacks something fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest

__all__ = ["certificate", "lack", "need_root", "program"]


def need_root(what: str) -> None:
    """Skip the test, or in CI fail it, where we are not root."""
    if os.geteuid():
        lack(f"{what}: run as root")


def lack(message: str) -> NoReturn:
    """Skip the test, or in CI fail it, for what this message says."""
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


def program(name: str, package: str) -> str:
    """Return a program's path; skip the test, or in CI fail it, where it is missing."""
    # Debian's users have no sbin in their PATH.
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    if path is None:
        lack(f"no {name}: apt-get install {package}")
    return path


def certificate(folder: Path, host: str = "localhost") -> tuple[Path, Path]:
    """Make a self-signed certificate; return cert.pem and key.pem."""
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    cert, key = folder / "cert.pem", folder / "key.pem"
    files = ["-keyout", str(key), "-out", str(cert)]
    names = ["-subj", f"/CN={host}", "-addext", f"subjectAltName=DNS:{host}"]
    openssl = program("openssl", "openssl")
    subprocess.run(
        [openssl, *words.split(), *files, *names], check=True, capture_output=True
    )
    return cert, key
