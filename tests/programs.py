"""Programs that tests need and Python does not bring: where they are, or a skip.

Under ``CI=true`` a test whose program is missing fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

__all__ = ["certificate", "program"]


def program(name: str, package: str) -> str:
    """Return a program's path; skip the test, or in CI fail it, where it is missing."""
    # Debian's users have no sbin in their PATH.
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    if path is None:
        message = f"no {name}: apt-get install {package}"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
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
