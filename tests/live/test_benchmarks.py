"""The benchmarks that a claim of the documentation needs run, in their small form."""

import subprocess
import sys

import pytest

from tests import ROOT
from tests.support.programs import program


@pytest.mark.matrix
def test_asynchronous_sources():
    """Every event arrives, and no stream needs a thread, on one sync worker."""
    program("cc", "gcc libc6-dev")  # for the clients
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.async_sources", "--quick"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    met = [line for line in done.stdout.splitlines() if line.startswith("PASS")]
    for what in ("threads", "an ordinary request", "events arrived in time"):
        assert any(what in line for line in met), done.stdout
