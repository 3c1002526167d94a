"""The transactions and traces of agents, as docs/deployments.md has them."""

import pytest

from tests.support.pairs import check_script

pytestmark = pytest.mark.matrix

VIEWS = """
from flask import Flask
from werkzeug.test import Client
from syncstream import sse, with_sse

app = Flask(__name__)

@app.get("/generator")
@sse
def generator(): yield found()

@app.get("/plain")
@with_sse
def plain(sse): sse.send(found())

@app.get("/coroutine")
@with_sse
async def coroutine(sse): await sse.send(found())

@app.get("/source")
@sse
async def source(): yield found()

def ask(client):
    for name in ("generator", "plain", "coroutine", "source"):
        print(client.get(f"/{name}").text.split()[-1])
"""


def test_new_relics_transaction():
    """It is that of the request's thread and greenlet only."""
    done = check_script(
        """
import os
os.environ.update(
    NEW_RELIC_LICENSE_KEY="0" * 40, NEW_RELIC_APP_NAME="tests",
    NEW_RELIC_LOG="stderr", NEW_RELIC_LOG_LEVEL="error",
    NEW_RELIC_DEVELOPER_MODE="true", NEW_RELIC_MONITOR_MODE="true",
)
import newrelic.agent
newrelic.agent.initialize()
newrelic.agent.register_application(timeout=0)
"""
        + VIEWS
        + """
found = lambda: newrelic.agent.current_transaction() is not None
ask(Client(newrelic.agent.WSGIApplicationWrapper(app.wsgi_app)))
"""
    )
    assert done.split() == ["true", "false", "false", "false"]


def test_opentelemetrys_trace():
    """Views that send, and asynchronous sources, are in the request's."""
    done = check_script(
        VIEWS
        + """
from opentelemetry import trace
from opentelemetry.instrumentation.flask import FlaskInstrumentor
from opentelemetry.sdk.trace import TracerProvider

trace.set_tracer_provider(TracerProvider())
FlaskInstrumentor().instrument_app(app)
found = lambda: trace.get_current_span().get_span_context().is_valid
ask(app.test_client())
"""
    )
    assert done.split() == ["false", "true", "true", "true"]
