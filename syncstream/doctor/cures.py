"""Cures: the settings that mend a finding, by server and proxy."""

from __future__ import annotations

import re

from .observation import Head

__all__ = ["STATUS", "TIMEOUTS", "proxies_of", "proxy_cure"]


STATUS = {
    204: (
        "this status tells browsers not to reconnect",
        "right for a finished stream; otherwise answer 200; see --last-event-id",
    ),
    401: (
        "the server requires authentication",
        "send credentials: --header 'Authorization: ...' or --header 'Cookie: ...'."
        " A browser's EventSource sends cookies, but no headers of your own",
    ),
    403: (
        "the server denies access",
        "send a user's cookie: --header 'Cookie: ...'; check the server's permission"
        " and CSRF rules",
    ),
    404: (
        "the server does not know this path",
        "check the path, its trailing slash, and any prefix that a proxy adds or"
        " removes",
    ),
    405: (
        "this path does not accept the method",
        "route GET, which an EventSource sends; to send a POST, use --data '...'",
    ),
    406: (
        "the server offers no text/event-stream, which an EventSource requires",
        "answer text/event-stream; for other types use --header 'Accept: ...'."
        " Django REST framework needs a renderer: give the view one whose"
        ' media_type is "text/event-stream" (docs/frameworks.md)',
    ),
    410: ("the stream no longer exists", "browsers do not retry; use another address"),
    429: (
        "too many requests or connections",
        "raise the limit for streams: each browser tab keeps a connection open",
    ),
    500: (
        "the view failed before its first byte",
        "find the traceback in the server's log. On waitress and wsgiref, a hop-by-hop"
        " header such as Connection is one cause: leave it to the server",
    ),
    502: (
        "a proxy could not get an answer from the application",
        "make sure that the application's server runs at the address that the proxy"
        " uses, and check its log",
    ),
    503: (
        "the server is overloaded or not running",
        "give the server more threads or greenlets than it has streams",
    ),
    504: (
        "a proxy got no response from the application in time",
        "send the head at once, as SSEResponse does; raise the proxy's read timeout;"
        " make sure that a worker is free",
    ),
}


# Seconds, the span that they limit, and the software with this limit.
TIMEOUTS = (
    (30.0, "life", "gunicorn's --timeout for a sync worker"),
    (29.0, "life", "AWS API Gateway"),
    (55.0, "silence", "Heroku's router"),
    (60.0, "silence", "nginx's proxy_read_timeout or an AWS load balancer"),
    (60.0, "life", "Cloud Run or a CDN"),
    (100.0, "silence", "Cloudflare"),
)

# Name, header, pattern of its value, and the setting that lets streams through.
_PROXIES = (
    (
        "nginx",
        "Server",
        "nginx|openresty|tengine",
        "nginx: let the application send X-Accel-Buffering: no, or set"
        " proxy_buffering off (and gzip off) for this location",
    ),
    ("Apache", "Server", "apache", "Apache: ProxyPass ... flushpackets=on; no DEFLATE"),
    ("Caddy", "Server", "caddy", "Caddy: flush_interval -1 in reverse_proxy"),
    ("Envoy", "Server", "envoy", "Envoy: no buffer or compressor filter; timeout 0s"),
    ("Traefik", "Server", "traefik", "Traefik: no buffering or compress middleware"),
    ("IIS", "Server", "iis", "IIS: responseBufferLimit 0, no dynamic compression"),
    (
        "Cloudflare",
        "CF-Ray",
        "",
        "Cloudflare: Content-Type text/event-stream, no-transform, no cache rule",
    ),
    ("CloudFront", "Via", "cloudfront", "CloudFront: CachingDisabled, no compression"),
    ("Varnish", "X-Varnish", "", "Varnish: return (pipe), or beresp.do_stream true"),
    ("Varnish", "Via", "varnish", "Varnish: return (pipe), or beresp.do_stream true"),
    ("Squid", "Via", "squid", "Squid: no caching and no adaptation for this address"),
    ("Heroku", "Via", "vegur|heroku", "Heroku: send a byte at least every 55 s"),
    ("API Gateway", "Apigw-Requestid", "", "API Gateway buffers responses: bypass it"),
    (
        "Google",
        "Via",
        "google",
        "Google: use Cloud Run; App Engine's standard environment does not stream",
    ),
)


def proxies_of(head: Head) -> list[tuple[str, str]]:
    """Return the name and cure of each proxy that the head shows."""
    return [
        (name, cure)
        for name, header, pattern, cure in _PROXIES
        if any(re.search(pattern, v, re.IGNORECASE) for v in head.all(header))
    ]


def proxy_cure(head: Head) -> str:
    cures = dict.fromkeys(cure for _, cure in proxies_of(head))
    return "; ".join(cures) or (
        "send X-Accel-Buffering: no and Cache-Control: no-cache, no-transform, and"
        " look for a proxy or middleware that buffers or compresses"
    )
