"""Lines out of chunks: what both decoders keep of a line that has not ended."""

from __future__ import annotations

__all__ = ["LineBuffer"]


class LineBuffer:
    """Split chunks at LF; a line may come in any number of them.

    Attributes:
        size: How long the line is that has not ended, bytes.
    """

    def __init__(self) -> None:
        self.size = 0
        self._pieces: list[bytes] = []

    def split(self, chunk: bytes) -> list[bytes]:
        """Return the lines that chunk ends, without their line ends."""
        lines = chunk.split(b"\n")
        rest = lines.pop()
        if lines and self._pieces:
            self._pieces.append(lines[0])
            lines[0] = self.rest()
            self._pieces = []
            self.size = 0
        if rest:
            self._pieces.append(rest)
            self.size += len(rest)
        return lines

    def rest(self) -> bytes:
        """Return the line that has not ended, as far as it has come."""
        return b"".join(self._pieces)
