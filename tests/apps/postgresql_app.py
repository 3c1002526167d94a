"""The application with channels, and a hub in the database of $HUB_URL."""

import os

from apps import hub_app
from syncstream import Hub

hub_app.hub = Hub(os.environ["HUB_URL"], capacity=100_000)
wrapped = hub_app.wrapped
