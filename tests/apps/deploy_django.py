"""Django as ``startproject`` makes it: views are loaded by the first request.

Nothing of syncstream is imported here but what a wsgi.py holds.
"""

import os

import django
from django.conf import settings
from django.core.wsgi import get_wsgi_application

settings.configure(
    ROOT_URLCONF="tests.apps.deploy_urls",
    ALLOWED_HOSTS=["*"],
    SECRET_KEY="tests",
    MIDDLEWARE=[
        "django.middleware.security.SecurityMiddleware",
        "django.middleware.common.CommonMiddleware",
    ],
)
django.setup()
app = get_wsgi_application()

if os.environ.get("MIDDLEWARE"):
    from syncstream import StreamMiddleware

    app = StreamMiddleware(app)
