"""Django with a database whose open connections are counted.

/APP/KIND/SOURCE?key=KEY. APP is "app", "wrapped" (in the middleware) or "limited" (to
one stream). KIND is "sse" for a response, "decorated" for ``@sse``, "hand" for a
StreamingHttpResponse. Connections stay open for ever (CONN_MAX_AGE=None), the view
itself makes a query, and ``{key}-view`` is the number of connections that its thread
or greenlet has then; /APP/held is what it has now.

The database is SQLite's, in a file. To see what another does, set DATABASE to Django's
settings for it, as JSON; there a runner's connection can be counted by itself only.
"""

import itertools
import json
import os
import queue
import sqlite3
import tempfile
import threading

import django
from django.conf import settings
from django.core.signals import request_finished, request_started
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse, JsonResponse, StreamingHttpResponse
from django.urls import path

from tests.apps.control import note
from tests.apps.mounted import mounted
from tests.apps.sources import SOURCES, as_sse

OPENED = {}  # the runners that opened the connections, by their ids
RUNNERS = {}  # the runners of the requests, by their keys
QUEUES = {}  # by key
ROWS = 250  # more than Django fetches at once (100)

local = threading.local()
numbers = itertools.count()


def runner():
    """Return what tells this thread or greenlet from all others, those of old too."""
    if not hasattr(local, "number"):
        local.number = next(numbers)
    return local.number


class Counted(sqlite3.Connection):
    """A connection that is counted while it is open."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        OPENED[id(self)] = runner()

    def close(self):
        super().close()
        OPENED.pop(id(self), None)

    def __del__(self):
        OPENED.pop(id(self), None)


SQLITE = {
    "ENGINE": "django.db.backends.sqlite3",
    "NAME": os.path.join(tempfile.mkdtemp(), "db.sqlite3"),
    "OPTIONS": {"factory": Counted},
}
DATABASE = json.loads(os.environ.get("DATABASE", "null")) or SQLITE
settings.configure(
    ROOT_URLCONF=__name__,
    ALLOWED_HOSTS=["*"],
    SECRET_KEY="tests",
    DATABASES={"default": {"CONN_MAX_AGE": None, **DATABASE}},
    USE_TZ=True,
)
django.setup()

from django.db import connection, models, transaction  # noqa: E402 (after setup())

from syncstream import StreamMiddleware, current_stream, sleep  # noqa: E402
from syncstream.django import SSEResponse, sse  # noqa: E402


class Row(models.Model):
    class Meta:
        app_label = "apps"


def create():
    with connection.schema_editor() as editor:
        if Row._meta.db_table in connection.introspection.table_names():
            editor.delete_model(Row)
        editor.create_model(Row)
    Row.objects.bulk_create(Row(id=n) for n in range(ROWS))
    connection.close()


def held(key):
    """Count the open connections of the thread or greenlet of a request."""
    if DATABASE is SQLITE:
        return list(OPENED.values()).count(RUNNERS[key])
    return None if RUNNERS[key] != runner() else is_open()


def is_open():
    return int(connection.connection is not None)


def wait_by_sleep(key):
    while QUEUES[key].empty():
        sleep(0.02)
    QUEUES[key].get()


def wait_for_queue(key):
    current_stream().wait(QUEUES[key])


def wait_for_event(key):
    event = threading.Event()

    def relay():
        QUEUES[key].get()
        event.set()

    threading.Thread(target=relay, daemon=True).start()
    current_stream().wait(event)


def polling(wait):
    """Make the source that waits, queries and yields, again and again."""

    def source(key):
        while True:
            wait(key)
            yield Row.objects.filter(id__lt=10).count()

    return source


def in_transaction(key):
    """Stay in a transaction during a wait, then roll it back."""
    try:
        with transaction.atomic():
            Row.objects.filter(id=1).delete()
            sleep(0.01)
            yield held(key)
            yield Row.objects.filter(id=1).count()
            raise RuntimeError
    except RuntimeError:
        yield Row.objects.filter(id=1).count()
    sleep(0.01)
    yield held(key)


def without_autocommit(key):
    """The same, by hand."""
    transaction.set_autocommit(False)
    Row.objects.filter(id=1).delete()
    sleep(0.01)
    yield held(key)
    yield Row.objects.filter(id=1).count()
    transaction.rollback()
    yield Row.objects.filter(id=1).count()
    transaction.rollback()  # of having read
    transaction.set_autocommit(True)
    sleep(0.01)
    yield held(key)


def iterator(key):
    """Wait between the rows of an iterator."""
    kept = set()
    for count, _row in enumerate(Row.objects.order_by("id").iterator(chunk_size=100)):
        if count % 50 == 0:
            sleep(0.001)
            kept.add(held(key))
    yield [count + 1, *kept]
    sleep(0.001)
    yield held(key)


def left_iterator(key):
    """Leave an iterator before its end."""
    for _ in Row.objects.iterator():
        sleep(0.001)
        yield held(key)
        break
    sleep(0.001)
    yield held(key)


def cursor(key):
    """Wait with an open cursor, then with a closed one."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1 UNION SELECT 2")
        first = cursor.fetchone()
        sleep(0.001)
        yield [held(key), first, cursor.fetchone()]
    sleep(0.001)
    yield held(key)
    # One that belongs to a connection that somebody has closed.
    cursor = connection.cursor()
    cursor.execute("SELECT 1")
    connection.close()
    yield Row.objects.count()
    sleep(0.001)
    yield held(key)


def from_view(key):
    """Read a cursor that the view has opened."""
    cursor = connection.cursor()
    cursor.execute("SELECT 1 UNION SELECT 2 UNION SELECT 3")

    def source():
        for row in cursor:
            sleep(0.001)
            yield row[0]

    return source()


def execute_wrapper(key):
    """Open a connection under an execute wrapper, which ends with its block."""
    called = []

    def wrapper(execute, *args):
        called.append(args)
        return execute(*args)

    fresh = connection.copy()
    with fresh.execute_wrapper(wrapper), fresh.cursor() as cursor:
        cursor.execute("SELECT 1")
    inside = len(called)
    with fresh.cursor() as cursor:
        cursor.execute("SELECT 1")
    fresh.close()
    yield [inside, len(called)]


def own_thread(key):
    """Tell whether each query runs on a connection of this greenlet's own."""
    for _ in range(5):
        Row.objects.count()
        yield [connection._thread_ident == threading.get_ident(), held(key)]
        sleep(0.01)


DB_SOURCES = {
    "sleep": polling(wait_by_sleep),
    "queue": polling(wait_for_queue),
    "event": polling(wait_for_event),
    "atomic": in_transaction,
    "autocommit": without_autocommit,
    "iterator": iterator,
    "left-iterator": left_iterator,
    "cursor": cursor,
    "from-view": from_view,
    "execute-wrapper": execute_wrapper,
    "own": own_thread,
}


def prepare(request, name):
    """Do what the views have in common; return the source."""
    key = request.GET["key"]
    if name in SOURCES:
        return SOURCES[name](key)
    QUEUES[key] = queue.Queue()
    RUNNERS[key] = runner()
    Row.objects.first()
    note(f"{key}-view", held(key))
    return DB_SOURCES[name](key)


def events(request, name):
    return SSEResponse(prepare(request, name))


@sse
def decorated(request, name):
    yield from prepare(request, name)


def hand(request, name):
    source = as_sse(map(json.dumps, prepare(request, name)))
    return StreamingHttpResponse(source, content_type="text/event-stream")


def poke(request):
    QUEUES[request.GET["poke"]].put(None)
    return HttpResponse("poked")


urlpatterns = [
    path("health", lambda request: HttpResponse("ok")),
    path("sse/<name>", events),
    path("decorated/<name>", decorated),
    path("hand/<name>", hand),
    path("poke", poke),
    path("held", lambda request: JsonResponse({"held": held(request.GET["held"])})),
]


def started(environ, **kwargs):
    _, _, local.key = environ["QUERY_STRING"].partition("key=")
    if local.key:
        note(f"{local.key}-calls", "started")


def finished(**kwargs):
    if local.key:
        note(f"{local.key}-calls", "finished")


request_started.connect(started)
request_finished.connect(finished)

create()
django_app = get_wsgi_application()
APPS = {
    "app": django_app,
    "wrapped": StreamMiddleware(django_app),
    "limited": StreamMiddleware(django_app, max_streams=1),
}


app = mounted(APPS)
