"""A Django project's own tests of its streams, with a database: run as a script."""

import sys

import django
from django.conf import settings

if __name__ == "__main__":
    settings.configure(
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3"}},
        INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes"],
        ROOT_URLCONF=__name__,
        SECRET_KEY="tests",
        ALLOWED_HOSTS=["*"],
    )
    django.setup()

from django.contrib.auth.models import Group
from django.db import connection
from django.test import TestCase, TransactionTestCase
from django.test.runner import DiscoverRunner
from django.urls import path

from syncstream import sleep
from syncstream.django import SSEResponse
from syncstream.testing import events, reading


def groups():
    while True:
        yield [group.name for group in Group.objects.order_by("id")]
        sleep(0.01)


urlpatterns = [path("groups", lambda request: SSEResponse(groups()))]


class Promises:
    def test_a_stream_sees_the_tests_rows(self):
        Group.objects.create(name="staff")
        found = events(self.client.get("/groups"), 2)
        assert [event.data for event in found] == ['["staff"]'] * 2
        assert connection.connection is not None
        assert Group.objects.count() == 1

    def test_a_stream_sees_what_changes(self):
        with reading(self.client.get("/groups")) as stream:
            assert stream.events(1)[0].json() == []
            Group.objects.create(name="staff")
            assert stream.events(1)[0].json() == ["staff"]
        Group.objects.create(name="guests")


class InATransaction(Promises, TestCase):
    pass


class WithoutOne(Promises, TransactionTestCase):
    pass


if __name__ == "__main__":
    runner = DiscoverRunner(verbosity=1)
    suite = runner.build_suite([__name__])
    runner.setup_test_environment()
    old = runner.setup_databases()
    result = runner.run_suite(suite)
    runner.teardown_databases(old)
    sys.exit(bool(result.failures or result.errors))
