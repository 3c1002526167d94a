"""Cures: the settings that mend a finding, by server and proxy."""

from __future__ import annotations

import re

from .observation import Head

__all__ = ["STATUS", "TIMEOUTS", "proxies_of", "proxy_cure"]


STATUS = {
    204: (
        "which tells a browser to stop for good",
        "right for a stream that has finished, else answer 200; see --last-event-id",
    ),
    401: (
        "the server wants to know who you are",
        "give credentials: --header 'Authorization: ...' or --header 'Cookie: ...'."
        " A browser's EventSource sends cookies, and no header of your own",
    ),
    403: (
        "the server does not let you in",
        "give a user's cookie by --header 'Cookie: ...'; look at the server's"
        " permission and CSRF rules",
    ),
    404: (
        "there is no such address",
        "check the path, its trailing slash too, and the prefix that a proxy adds"
        " or takes away",
    ),
    405: (
        "the address takes no such method",
        "an EventSource sends GET: route it; what is asked for by POST: --data '...'",
    ),
    406: (
        "the server has nothing of the type that an EventSource accepts",
        "answer text/event-stream; for another stream say --header 'Accept: ...'."
        " Django REST framework refuses it for want of a renderer: give the view one"
        ' whose media_type is "text/event-stream" (docs/frameworks.md)',
    ),
    410: ("the stream is gone for good", "browsers stop here; give another address"),
    429: (
        "too many requests or connections",
        "raise the limit for streams: each browser tab holds one connection open",
    ),
    500: (
        "the view failed before its first byte",
        "the server's log has the traceback. On waitress and wsgiref a hop-by-hop"
        " header, such as Connection, is one cause: leave it to the server",
    ),
    502: (
        "a proxy could not get an answer from the application",
        "see that the application's server runs where the proxy looks for it, and"
        " what its log says",
    ),
    503: (
        "the server has no room or is not up",
        "give it more threads or greenlets than it has streams",
    ),
    504: (
        "a proxy waited in vain for the application",
        "let the head leave at once (SSEResponse does); raise the proxy's read"
        " timeout; see that a worker is free",
    ),
}


# Seconds, what they are counted over, and who ends streams after them.
TIMEOUTS = (
    (30.0, "life", "gunicorn's --timeout for a sync worker"),
    (29.0, "life", "AWS API Gateway"),
    (55.0, "silence", "Heroku's router"),
    (60.0, "silence", "nginx's proxy_read_timeout or an AWS load balancer"),
    (60.0, "life", "Cloud Run or a CDN"),
    (100.0, "silence", "Cloudflare"),
)

# Name, header, pattern of its value, and how to let a stream through.
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
    ("Heroku", "Via", "vegur|heroku", "Heroku: a byte at least every 55 s"),
    ("API Gateway", "Apigw-Requestid", "", "API Gateway buffers: go around it"),
    ("Google", "Via", "google", "Google: Cloud Run streams, App Engine standard not"),
)


def proxies_of(head: Head) -> list[tuple[str, str]]:
    """Return name and cure of each proxy that shows."""
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
