"""The application with channels, and a hub on the server of $HUB_URL.

Each response names its process.
"""

import os

from apps import hub_app
from syncstream import Hub, StreamMiddleware

hub_app.hub = Hub(os.environ["HUB_URL"], capacity=100_000)


def app(environ, start_response):
    def with_pid(status, headers, *more):
        return start_response(status, [*headers, ("X-Pid", str(os.getpid()))], *more)

    return hub_app.app(environ, with_pid)


wrapped = StreamMiddleware(app)
