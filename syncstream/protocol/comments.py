"""Comments of event streams, and the places where one may stand.

Spec: https://html.spec.whatwg.org/multipage/server-sent-events.html, §9.2.6. A comment
within an event is ignored by the standard, and cuts the event in many a parser.
"""

from __future__ import annotations

__all__ = ["comment", "completion", "ends_blank", "tail_after", "without_blank"]


def comment(text: str, *, is_line: bool) -> bytes:
    """Return a comment of one line, to be written between two events.

    By the standard clients ignore it, with or without a blank line after it. In
    practice, parsers that dispatch an event at every blank line dispatch an empty one
    after the comment's, too (fetch-event-source; openai and httpx-sse, after an id).
    And parsers that split the stream at blank lines lose the event that follows a
    comment without one.

    Args:
        text: The comment, without line ends.
        is_line: Write no blank line after it.
    """
    return f": {text}\n".encode() if is_line else f": {text}\n\n".encode()


def without_blank(block: bytes) -> bytes:
    """Return a block without its blank line if it holds comments only."""
    if block.endswith(b"\n\n") and all(
        line.startswith(b":") for line in block[:-2].split(b"\n")
    ):
        return block[:-1]
    return block


def ends_blank(tail: bytes) -> bool:
    """Tell whether a stream that ends with these bytes is between two events.

    It is after a blank line, and after comment lines that follow a blank line.

    Args:
        tail: The last bytes written: 4 or more, or all if there were fewer (see
            `tail_after`); ``b""`` before the first byte.
    """
    if not tail or tail.endswith(b"\n\n"):
        return True
    tail = tail.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    end = len(tail)
    while tail.endswith(b"\n", 0, end):
        if tail.endswith(b"\n\n", 0, end):
            return True
        end = tail.rfind(b"\n", 0, end - 1) + 1  # where the last line begins
        if tail[end : end + 1] != b":":
            return False
    return False


def completion(tail: bytes) -> bytes:
    """Return the line ends that complete the last event; ``b""`` if it is complete.

    Args:
        tail: As for `ends_blank`.
    """
    if ends_blank(tail):
        return b""
    # A CR at the end may be the first half of a line end.
    return b"\n" if tail.endswith(b"\n") else b"\n\n"


def tail_after(tail: bytes, chunk: bytes) -> bytes:
    """Return the tail that `ends_blank` needs, after a chunk was written.

    Args:
        tail: The result for the chunk before; ``b""`` at the beginning.
        chunk: The bytes just written, not empty.
    """
    if len(chunk) > 3 and chunk[:1] != b":":
        return chunk
    joined = (tail or b"\n\n") + chunk  # a stream begins between two events
    return b"\n\n" if ends_blank(joined) else joined[-4:]
