"""Bytes <-> values. No socket, thread, clock, environ or logging in here.

One module a format. Each has an ``encoder``: what a generator may yield, turned
into the bytes of one chunk, or ``None`` for a checkpoint (nothing is written).
No encoder ever returns ``b""``: servers do not write it, so a client that has
gone would never be noticed by it (measured on Werkzeug, pywsgi, gunicorn and
waitress).
"""
