"""Splits chunks into lines, and keeps an unfinished line for both decoders."""

from __future__ import annotations

__all__ = ["LineBuffer"]


class LineBuffer:
    """Splits chunks at LF; a line may be spread over any number of chunks.

    Attributes:
        size: The length of the unfinished line, in bytes.
    """

    def __init__(self) -> None:
        self.size = 0
        self._pieces: list[bytes] = []

    def split(self, chunk: bytes) -> list[bytes]:
        """Return the lines that end in this chunk, without their line ends."""
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
        """Return the beginning of the unfinished line, ``b""`` if there is none."""
        return b"".join(self._pieces)
