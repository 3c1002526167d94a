"""PEP 3333: the response classes, the middleware, ``@sse``."""
