"""Reading event streams: `EventSource`, and `events` and `lines` of a response.

`EventSource` connects, reconnects and resumes as the HTML standard says
(https://html.spec.whatwg.org/multipage/server-sent-events.html, §9.2.3 and §9.2.4). It
needs requests, the extra ``client``; `events` and `lines` need no package.
"""

from .responses import events, lines
from .source import EventSource

__all__ = ["EventSource", "events", "lines"]
