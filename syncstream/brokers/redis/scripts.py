"""The Lua scripts, and the event ids that they make."""

from __future__ import annotations

import hashlib
import re
from importlib.resources import files

__all__ = ["HEADS", "ID", "ID_BYTES", "NEWEST", "PUBLISH", "READ", "Script"]
# What Redis takes, with room to count on. Ids come from outside.
ID = re.compile(r"[0-9]{1,15}-[0-9]{1,16}")
ID_BYTES = re.compile(ID.pattern.encode())


class Script:
    """A script of a file, after what it has in common with the others.

    Args:
        name: The file's, without its ending.

    Attributes:
        text: What the server is sent once.
        sha: What stands for it from then on.
    """

    def __init__(self, name: str) -> None:
        folder = files(__package__)
        parts = (folder.joinpath(f"{file}.lua") for file in ("common", name))
        texts = (part.read_text("utf-8") for part in parts)
        self.text = "".join(f"\n{text}" for text in texts).encode()
        self.sha = hashlib.sha1(self.text, usedforsecurity=False).hexdigest().encode()


# What is refused, for want of memory, say, is refused at its first write; what fails
# after that, for want of rights, is stored.
PUBLISH = Script("publish")

# Returns the head, whether nothing is missing, then id, prev and payload of each. In
# pieces, because payloads may be large and nobody takes more than `log.JOIN` of them:
# hundreds of MiB would hold up the server for all.
READ = Script("read")

# Returns the id before the newest of a channel that are not too old, and its head.
NEWEST = Script("newest")

# Returns the heads of channels, "" of those without one, and keeps their keys alive.
HEADS = Script("heads")
