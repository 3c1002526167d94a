"""A certificate for the servers and the sockets that speak TLS."""

import pytest

from tests.support.programs import certificate


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return certificate(tmp_path_factory.mktemp("tls"))
