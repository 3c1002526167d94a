"""`advance`, by ``clock_cases.py``: others compare their clock with the real one."""

import subprocess
import sys
from pathlib import Path

from tests import ROOT

CASES = Path(__file__).with_name("clock_cases.py")


def test_in_a_process_of_its_own():
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-m", "pytest", "-q", str(CASES)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,  # CI gives a test 120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
