"""The Lua scripts, and the event ids that they make."""

from __future__ import annotations

import hashlib
import re
from importlib.resources import files

__all__ = ["HEADS", "ID", "ID_BYTES", "NEWEST", "PUBLISH", "READ", "Script"]
# Clients send ids: accept no larger numbers than Redis can count on from.
ID = re.compile(r"[0-9]{1,15}-[0-9]{1,16}")
ID_BYTES = re.compile(ID.pattern.encode())


class Script:
    """A script from a file, with the common functions before it.

    Args:
        name: The file's name without its ending.

    Attributes:
        text: The script, which is sent to a server once.
        sha: Its hash, which is sent from then on.
    """

    def __init__(self, name: str) -> None:
        folder = files(__package__)
        parts = (folder.joinpath(f"{file}.lua") for file in ("common", name))
        texts = (part.read_text("utf-8") for part in parts)
        self.text = "".join(f"\n{text}" for text in texts).encode()
        self.sha = hashlib.sha1(self.text, usedforsecurity=False).hexdigest().encode()


# A call that is refused, for example for want of memory, fails at its first write. If
# it fails later, for want of rights, its event is stored, and the error says so.
PUBLISH = Script("publish")

# Returns the head, 1 if nothing is missing, then id, prev and payload of each entry. It
# reads in pieces up to `log.JOIN` bytes of payload: reading hundreds of MiB at once
# would block the server for all clients.
READ = Script("read")

# Returns the id before the newest entries that are not too old, and the head.
NEWEST = Script("newest")

# Returns the heads of channels, "" for those without one, and keeps their keys alive.
HEADS = Script("heads")
