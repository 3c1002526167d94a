"""Bytes <-> values, without sockets, threads, clocks, environs or logging.

One module for each format. Each has an encoder: a function that turns an item yielded
by a generator into the bytes of one chunk, or into ``None`` for a checkpoint, at which
nothing is written. No encoder ever returns ``b""``: servers do not write an empty
chunk, so it would never show that a client has gone (measured on Werkzeug, pywsgi,
gunicorn and waitress).
"""
