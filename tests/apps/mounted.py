"""Several WSGI applications in one, by the first part of the path."""

from urllib.parse import parse_qs
from wsgiref.util import shift_path_info

from werkzeug.wsgi import ClosingIterator

from tests.apps.control import note


def mounted(apps):
    """Make one of them; it notes ``{key}-closed`` when a response has been closed."""

    def app(environ, start_response):
        body = apps[shift_path_info(environ)](environ, start_response)
        keys = parse_qs(environ["QUERY_STRING"]).get("key")
        if not keys:
            return body
        return ClosingIterator(body, lambda: note(f"{keys[0]}-closed", True))

    return app
