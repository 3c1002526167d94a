"""``hub_app`` on the broker that $HUB_URL names, for servers of several processes.

Each answer names its process, in X-Pid. /state tells how many streams that has:
``attached`` ones, which hold a thread, and ``parked`` ones, which were handed over. A
stream with ``attached=1`` in its query is not handed over.
"""

import json
import os

from syncstream import Hub, StreamMiddleware
from tests.apps import hub_app

try:
    from syncstream.runtime.process import process
except ImportError:  # an older release, beside which broker_soak.py runs this one
    from syncstream.process import process

hub_app.hub = Hub(os.environ["HUB_URL"], capacity=100_000)


def app(environ, start_response):
    def with_pid(status, headers, *more):
        return start_response(status, [*headers, ("X-Pid", str(os.getpid()))], *more)

    if environ["PATH_INFO"] == "/state":
        own = process()
        attached = own.attached_streams
        parked = own.open_streams - attached
        text = json.dumps({"attached": attached, "parked": parked})
        return hub_app.plain(text, with_pid)
    if "attached=1" in environ["QUERY_STRING"]:
        environ["syncstream.handover"] = False
    return hub_app.app(environ, with_pid)


wrapped = StreamMiddleware(app)
