"""The benchmarks that a claim of the documentation needs run, in their small form."""

import subprocess
import sys

import pytest

from tests import ROOT
from tests.support.programs import program


@pytest.mark.matrix
def test_asynchronous_sources():
    """It ends with an error unless each event comes once, in order, without threads.

    Its figures are those of a busy machine here: they are not looked at.
    """
    program("cc", "gcc libc6-dev")  # for the clients
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.async_sources", "--quick"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    for name in ("syncstream | gunicorn sync", "Starlette | uvicorn: asyncio, h11"):
        assert f"| {name} | text |" in done.stdout, done.stdout
