"""Celery tasks that publish: tests/live/test_deployments.py.

The hub is the module's, and has published before Celery forks its processes.
"""

import os

import billiard.pool
import psutil
from celery import Celery
from celery.signals import worker_init

from syncstream import Hub
from tests.apps.control import gate, note

# A process that has finished waits until its parent has read its last results. One
# that stops may not read them any more, hub or no hub: 30 s, then all goes on.
billiard.pool.GUARANTEE_MESSAGE_CONSUMPTION_RETRY_LIMIT = 20  # of 0.1 s

hubs = [Hub(url) for url in os.environ["HUB_URLS"].split()]
app = Celery("deploy", broker=os.environ["BROKER_URL"])
app.conf.update(
    worker_hijack_root_logger=False,
    broker_connection_retry_on_startup=True,
    worker_enable_remote_control=False,
)


@worker_init.connect
def warm(**kwargs):
    for hub in hubs:
        hub.publish("parent", os.getpid())


@app.task(acks_late=True)
def publish(channel, text, gated=False):
    """Publish to all hubs; tell what this process holds after that."""
    if gated:
        note(f"{channel}-began", os.getpid())
        gate(channel)
    for hub in hubs:
        hub.publish(channel, text)
    me = psutil.Process()
    note(f"{channel}-held", [os.getpid(), me.num_fds(), me.num_threads()])
