"""``apps.hub_app`` with the broker that ``HUB_URL`` names; /pid tells the process."""

import os

from apps import hub_app
from syncstream import Hub, StreamMiddleware

hub_app.hub = Hub(os.environ["HUB_URL"])


def app(environ, start_response):
    if environ["PATH_INFO"] == "/pid":
        return hub_app.plain(str(os.getpid()), start_response)

    def with_pid(status, headers, *more):
        return start_response(status, [*headers, ("X-Pid", str(os.getpid()))], *more)

    return hub_app.app(environ, with_pid)


wrapped = StreamMiddleware(app)
