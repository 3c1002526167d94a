"""An error before a stream's first item is answered by its status, in each framework.

The frameworks are below one server of each kind.
"""

import itertools

import pytest

from tests.support.live import TABLE, LiveServer

pytestmark = pytest.mark.matrix

# What differs between gunicorn's workers is not in the way of a head.
SERVERS = [kind for kind in TABLE if kind not in ("gunicorn-sync", "gunicorn-gevent")]
KINDS = ("ndjson", "raw", "streaming", "async-ndjson", "async-streaming")
STATUS = {"abort": 404, "http404": 404, "denied": 403, "falcon": 403, "broken": 500}
NAMES = ("flask", "falcon", "pyramid", "django/plain", "django/rest")


@pytest.mark.parametrize("kind", SERVERS)
def test_an_error_before_the_first_item_has_its_status(kind):
    """The response is whole, and keeps the headers that are not about its body."""
    paths = [*itertools.product(NAMES, KINDS, ("abort", "broken"))]
    paths += [("django/plain", "ndjson", error) for error in STATUS]
    if kind != "uwsgi":  # it shows no start_response but to the framework
        kinds = ("raw", "async-ndjson")
        paths += [("django/rewrapped", kind, "abort") for kind in kinds]
    found, expected, answers = {}, {}, {}
    with LiveServer(kind, "tests.apps.answering_app:app") as server:
        for name, response, error in paths:
            path = f"/{name}/{response}/{error}"
            with server.get(path) as client:
                body = client.rest()
            kept = client.headers.get("x-other")
            found[path] = (client.status, body[:3], client.is_whole, kept)
            expected[path] = (STATUS[error], b"%d" % STATUS[error], True, "kept")
            answers[path] = client.headers
        assert found == expected
        cookie = answers["/django/plain/ndjson/abort"]["set-cookie"]
        assert cookie.startswith("cookie=crumb")
        # Bottle takes the first item itself, and answers with a page.
        for response in KINDS:
            for error, status in {"bottle": 404, "broken": 500}.items():
                with server.get(f"/bottle/{response}/{error}") as client:
                    assert b"<title>Error" in client.rest()
                    assert client.status == status
