"""Print tox's names of the oldest and the newest Python that tox finds here."""

from __future__ import annotations

import subprocess
import sys

VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


def is_here(version: str) -> bool:
    """Tell whether virtualenv, which tox asks, finds this Python and it runs."""
    code = (
        "import sys; from virtualenv.discovery.builtin import get_interpreter as get;"
        f"sys.exit(get('{version}', []) is None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.returncode == 0


here = [version for version in VERSIONS if is_here(version)]
if not here:
    sys.exit(f"no Python of {', '.join(VERSIONS)} was found")
chosen = dict.fromkeys((here[0], here[-1]))
print(*(f"py{version.replace('.', '')}" for version in chosen))
