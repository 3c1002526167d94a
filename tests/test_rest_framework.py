"""Django REST framework: what docs/frameworks.md tells its users to write."""

import json
import re

import pytest
from django.conf import settings
from django.test import Client, override_settings
from django.urls import path

from syncstream import sse as in_flask
from syncstream.django import SSEResponse, sse
from tests.apps import django_app

assert callable(django_app.app)  # it configures Django
settings.REST_FRAMEWORK = {
    "UNAUTHENTICATED_USER": None,
    "DEFAULT_AUTHENTICATION_CLASSES": [],
}

# isort: split

from rest_framework.decorators import api_view, renderer_classes  # noqa: E402
from rest_framework.exceptions import PermissionDenied  # noqa: E402
from rest_framework.renderers import JSONRenderer  # noqa: E402
from rest_framework.views import APIView  # noqa: E402

from tests import ROOT  # noqa: E402

PAGE = (ROOT / "docs" / "frameworks.md").read_text()
CODE = re.search(r"```python\n(class EventStream.*?)```", PAGE, re.DOTALL)[1]
names = {
    "__name__": __name__,
    "JSONRenderer": JSONRenderer,
    "api_view": api_view,
    "renderer_classes": renderer_classes,
    "sse": sse,
}
exec(CODE, names)


class Events(APIView):
    renderer_classes = [names["EventStream"], JSONRenderer]  # noqa: RUF012

    def get(self, request):
        if "forbidden" in request.query_params:
            raise PermissionDenied
        return SSEResponse(["hello"])


@api_view(["GET"])
@sse
def without_renderer(request):
    yield "hello"


@api_view(["GET"])
@in_flask
def not_djangos(request):
    yield "hello"


urlpatterns = [
    path("wrong", not_djangos),
    path("function", names["events"]),
    path("class", Events.as_view()),
    path("without", without_renderer),
]
ACCEPT = {"Accept": "text/event-stream"}  # and nothing else: as a browser's


@pytest.fixture(autouse=True)
def _settings():
    with override_settings(ROOT_URLCONF=__name__):
        yield


@pytest.mark.parametrize("name", ["function", "class"])
def test_a_view_has_a_renderer(name):
    """An EventSource gets its stream."""
    response = Client().get(f"/{name}", headers=ACCEPT)
    assert response.status_code == 200
    assert b"data: hello\n\n" in response.getvalue()


def test_errors_are_json():
    """They go through the renderer."""
    response = Client().get("/class?forbidden", headers=ACCEPT)
    assert response.status_code == 403
    assert set(json.loads(response.content)) == {"detail"}


def test_without_a_renderer():
    """That is the 406 that is spoken of, whatever the view returns."""
    assert Client().get("/without", headers=ACCEPT).status_code == 406


@override_settings(ROOT_URLCONF=__name__)
def test_a_decorator_that_is_not_djangos():
    """REST framework's request is none of Django's by its type."""
    with pytest.raises(TypeError, match=r"from syncstream\.django import sse"):
        Client().get("/wrong")
