"""The tests: a folder for each room of the package, and

=============  =================================================================
``live/``      the promises as real clients see them: servers, deployments, browsers
``soak/``      long runs and full sizes: ``tox -e soak``
``support/``   what several tests need: servers, engines, pairs of sockets
``apps/``      the applications that the tests' servers run
=============  =================================================================

What stands at the package's top level is tested by the files here.
"""

from pathlib import Path

ROOT = Path(__file__).parent.parent
