"""Django as gunicorn finds it: the views are imported at the first request.

``/ready`` is answered without Django.
"""

from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import StreamingHttpResponse

settings.configure(
    ROOT_URLCONF="tests.apps.fresh_views",
    ALLOWED_HOSTS=["*"],
    SECRET_KEY="tests",
    MIDDLEWARE=["tests.apps.fresh_django.rewrapped"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
)


def rewrapped(get_response):
    """Be a middleware that changes a body on its way, as Django's documentation has.

    Or one that puts it into a response of its own.

    Before the views are imported it has asked the database, and left no cursor open.
    """

    def middleware(request):
        from django.db import connection

        with connection.cursor() as cursor:
            cursor.execute("select 1")
        response = get_response(request)
        if "rewrap" in request.GET:
            body = response.streaming_content
            response.streaming_content = (chunk for chunk in body)
        if "anew" in request.GET:
            body = response.streaming_content
            kind = response.headers["Content-Type"]
            response = StreamingHttpResponse((c for c in body), content_type=kind)
        return response

    return middleware


django = get_wsgi_application()


def outer(inner):
    def application(environ, start_response):
        if environ["PATH_INFO"] != "/ready":
            return inner(environ, start_response)
        start_response("200 OK", [("Content-Length", "0")])
        return []

    return application


app = outer(django)


def late(environ, start_response):
    """Make the middleware at the first request, when the package is imported."""
    if not made:
        from syncstream import StreamMiddleware

        made.append(StreamMiddleware(django))
    return made[0](environ, start_response)


made = []
wrapped = outer(late)
