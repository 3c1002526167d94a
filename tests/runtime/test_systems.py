"""Other systems: what Linux has is taken away, one subprocess each."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests import ROOT
from tests.support.pairs import run_script
from tests.support.programs import lack


@pytest.mark.parametrize("kind", ["werkzeug", "waitress"])
@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_streams_on_other_systems(kind, system):
    """Events, hang-ups, keepalives, the send time-out and the stop, and no log line."""
    done = subprocess.run(
        [
            sys.executable,
            "-X",
            "dev",
            "-m",
            "tests.runtime.other_systems",
            kind,
            system,
        ],
        capture_output=True,
        text=True,
        timeout=100,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )
    assert (done.stdout, done.returncode) == ("done syncstream\n", 0), done.stderr


def test_eventlet_is_refused():
    """In one sentence, at the first stream."""
    if find_spec("eventlet") is None:  # imported it would be here, too
        lack("no eventlet: pip install eventlet")
    done = run_script(
        "import os, warnings; warnings.simplefilter('ignore')\n"
        "os.environ['EVENTLET_NO_GREENDNS'] = 'yes'  # which imports trio, and fails\n"
        "import eventlet; eventlet.monkey_patch()\n"
        "from syncstream import SSEResponse\n"
        "SSEResponse([])"
    )
    assert done.returncode == 1
    assert "RuntimeError: syncstream cannot stream under eventlet" in done.stderr
