"""What the examples that change something share: they answer their own pages only.

A page of any other site may send a POST to 127.0.0.1 from its visitor's browser, which
says so by the header Origin; or have its own name resolve to 127.0.0.1, which the
header Host then says (DNS rebinding). HOSTS names the hosts of a real deployment.
"""

import os
from ipaddress import ip_address
from urllib.parse import urlsplit

from flask import abort, request

HOSTS = frozenset(os.environ.get("HOSTS", "").split())


def is_local(name):
    """Tell an address, or a name that no stranger can own, from others."""
    if name in HOSTS or "." not in name or name.endswith(".localhost"):
        return True
    try:
        return bool(ip_address(name))
    except ValueError:
        return False


def same_site_only():
    """Refuse requests of other sites' pages: ``app.before_request(same_site_only)``."""
    try:
        host, origin = urlsplit(f"//{request.host}"), urlsplit(request.origin or "")
        is_ours = is_local(host.hostname or "")
    except ValueError:
        abort(400)
    if not is_ours or (request.origin and origin.netloc != request.host):
        abort(403)
