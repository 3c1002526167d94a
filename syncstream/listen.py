"""The command ``listen``: the events of a URL, on a terminal or in a pipe.

Events go to the standard output, in UTF-8. What happens to the connection goes to the
standard error, so that a pipe gets events only.
"""

from __future__ import annotations

import json
import os
import sys
from codecs import getincrementaldecoder
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, TextIO

from .channels.gap import GAP_EVENT
from .client import EventSource
from .errors import ConnectError, RemoteProtocolError
from .protocol.sse import Event
from .terminal import discard, fail, has_colours, printable

if TYPE_CHECKING:
    import requests

__all__ = ["Form", "listen_to"]

Form = Literal["pretty", "json", "raw"]

_DIM, _NAME, _ID, _GAP = "2", "1;36", "33", "1;31"  # SGR parameters, ECMA-48, 8.3.117
_INDENT = "    "


def listen_to(
    url: str,
    *,
    form: Form = "pretty",
    headers: Mapping[str, Any] | None = None,
    data: bytes | None = None,
    last_event_id: str | None = None,
    once: bool = False,
) -> int:
    """Print a stream's events until it ends; return the exit status.

    Args:
        url: The stream's.
        form: "pretty" for people, "json" for one object a line, "raw" for the bytes
            as they come, comments included.
        headers: Of each request.
        data: The body of a POST; ``None`` sends a GET.
        last_event_id: The id of the event to resume after.
        once: Whether to read one response and not to reconnect.

    Returns:
        0 if the stream has ended, or the reader of a pipe; 1 if it failed; 2 if an
        argument is wrong.
    """
    if sys.stdout is None:
        return fail("nothing can be printed: the standard output is closed")
    listening = _Listening(form)
    try:
        source = EventSource(
            url,
            method="GET" if data is None else "POST",
            headers=headers,
            data=data,
            last_event_id=last_event_id,
            reconnect=not once,
            on_open=listening.open,
            on_error=listening.fail,
        )
        return listening.run(source)
    except (ConnectError, RemoteProtocolError, ImportError) as error:
        return fail(str(error))
    except (TypeError, ValueError) as error:
        return fail(str(error), 2)


class _Listening:
    """A run of the command: its output, and the notes on the connection."""

    def __init__(self, form: Form) -> None:
        self._source: EventSource | None = None
        self._output = output = _Output(sys.stdout)
        self._show: Callable[[Event], str] | None = None
        self._raw: _Raw | None = None
        if form == "raw":
            self._raw = _Raw(output)
        else:
            self._show = _json if form == "json" else _Pretty(output).show
        self._notes = None if sys.stderr is None else _Output(sys.stderr)
        self._was_open = False
        self._retry: int | None = None  # the last that was shown

    def run(self, source: EventSource) -> int:
        self._source = source
        outputs = [self._output] if self._notes is None else [self._output, self._notes]
        for output in outputs:
            output.source = source
        with source:
            for event in source:
                self._note_retry()
                if self._show is not None:
                    self._output.write(f"{self._show(event)}\n".encode())
                self._note_gap(event)
        self._note_retry()
        errors = [error for output in outputs if (error := output.end()) is not None]
        if not errors:
            self._note("the stream has ended")
            return 0
        if isinstance(errors[0], BrokenPipeError):  # `| head` has seen enough
            return 0
        return fail(f"the output cannot be written: {errors[0].strerror}")

    def open(self, response: requests.Response) -> None:
        """Note a connection."""
        if self._raw is not None:
            response.raw = _Copied(response.raw, self._raw.write)
        server = response.headers.get("Server")
        again = " again" if self._was_open else ""
        self._was_open = True
        self._note(f"connected{again}" + (f" to {server}" if server else ""))

    def fail(self, error: ConnectError) -> None:
        """Note the end of a connection."""
        self._note_retry()
        id = self._source.last_event_id if self._source is not None else None
        after = f" after id {id}" if id else ""
        self._note(f"{error}; reconnecting{after}")

    def _note_retry(self) -> None:
        retry = self._source.retry if self._source is not None else None
        if retry is not None and retry != self._retry:
            self._retry = retry
            self._note(f"retry: {retry} ms")

    def _note_gap(self, event: Event) -> None:
        gap = _gap_of(event)
        if gap is not None:
            channel, reason = gap
            self._note(f"gap: events of {channel} are missing ({reason})", _GAP)

    def _note(self, text: str, style: str = _DIM) -> None:
        if self._notes is None:
            return
        text = f"-- {_line(text)}"
        if self._notes.has_colours:
            text = _styled(text, style)
        self._notes.write(f"{text}\n".encode())


class _Output:
    """The standard output, or the standard error; its failure ends the source.

    A write raises nothing: it may happen inside the source's reading, which takes an
    ``OSError`` for one of the connection.

    Attributes:
        source: What to close.
    """

    def __init__(self, file: TextIO) -> None:
        self.source: EventSource | None = None
        self.is_terminal = file.isatty()
        self.has_colours = has_colours(file)
        self._file = file
        self._error: OSError | None = None

    def write(self, data: bytes) -> None:
        if self._error is not None:
            return
        try:
            self._file.buffer.write(data)
            self._file.buffer.flush()
        except OSError as error:
            self._error = error
            if self.source is not None:
                self.source.close()

    def end(self) -> OSError | None:
        """Return why nothing could be written any more, ``None`` if all was."""
        if self._error is not None:
            discard(self._file)
        return self._error

    def width(self) -> int | None:
        """Return the terminal's columns now; ``None`` elsewhere."""
        if not self.is_terminal:
            return None
        try:
            return os.get_terminal_size(self._file.fileno()).columns or None
        except OSError:  # the terminal is gone
            return None


class _Pretty:
    """Events for people: a line each, with its data below if that needs room."""

    def __init__(self, output: _Output) -> None:
        self._output = output

    def show(self, event: Event) -> str:
        name = event.event or "message"
        parts = [(datetime.now().strftime("%H:%M:%S.%f")[:-3], _DIM)]
        parts.append((_line(name), _NAME if _gap_of(event) is None else _GAP))
        if event.id:
            parts.append((f"id {_line(event.id)}", _ID))
        head = "  ".join(text for text, _ in parts)
        lines = printable(event.data).split("\n")
        width = self._output.width()
        is_wide = width is not None and len(head) + 2 + len(lines[0]) > width
        if self._output.has_colours:
            head = "  ".join(_styled(text, style) for text, style in parts)
        if len(lines) == 1 and not is_wide:
            return f"{head}  {lines[0]}".rstrip(" ")
        if is_wide:
            lines = _indented(event) or lines
        return "\n".join([head, *(_INDENT + line for line in lines)])


class _Raw:
    """Bytes as they come; a terminal gets them without control characters."""

    def __init__(self, output: _Output) -> None:
        self._output = output
        self._decoder = getincrementaldecoder("utf-8")("backslashreplace")

    def write(self, data: bytes) -> None:
        if self._output.is_terminal:
            text = self._decoder.decode(data).replace("\r\n", "\n")
            data = printable(text).encode()
        self._output.write(data)


class _Copied:
    """A response's body, whose bytes are written where they are read, too."""

    def __init__(self, body: Any, write: Callable[[bytes], None]) -> None:
        self._body = body
        self._write = write

    def read1(self, *args: Any, **options: Any) -> bytes:
        data: bytes = self._body.read1(*args, **options)
        self._write(data)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)


def _json(event: Event) -> str:
    """Return an event as one line of JSON; its data stay text, as they came."""
    fields = {"id": event.id, "event": event.event or "message", "data": event.data}
    return json.dumps(fields, ensure_ascii=False)


def _indented(event: Event) -> list[str]:
    """Return JSON data over several lines; none if they are no object or list."""
    try:
        value = event.json()
        if not isinstance(value, (dict, list)):
            return []
        text = json.dumps(value, indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        return []
    return [_line(line) for line in text.split("\n")]


def _gap_of(event: Event) -> tuple[str, str] | None:
    """Return the channel and the reason of a hub's reset."""
    if event.event != GAP_EVENT:
        return None
    try:
        fields = event.json()
    except ValueError:
        return None
    if not isinstance(fields, dict) or not fields.keys() >= {"channel", "reason"}:
        return None
    return str(fields["channel"]), str(fields["reason"])


def _line(text: str) -> str:
    return printable(text).replace("\n", r"\n").replace("\t", r"\t")


def _styled(text: str, style: str) -> str:
    return f"\x1b[{style}m{text}\x1b[0m"
