"""The command line, ``syncstream``: the commands demo, listen, publish and doctor."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import Hub, __version__
from .arguments import Parser
from .doctor import checks, listen, report, request
from .errors import BrokerError, Uncertain
from .listen import listen_to
from .terminal import discard, fail

if TYPE_CHECKING:
    _Commands = argparse._SubParsersAction[Parser]

__all__ = ["main"]

_MAX_DATA = 1 << 20  # bytes of an event's data: the default ``max_payload`` of a hub


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status.

    Args:
        argv: The words after the program's name; ``None`` takes them from ``sys.argv``.

    Raises:
        SystemExit: An argument is wrong, or help or the version was printed.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    if options.run is None:
        parser.print_help()
        return 0
    try:
        status: int = options.run(options)
    except KeyboardInterrupt:
        return 130  # the shell's 128 + SIGINT
    return status


def _parser() -> Parser:
    parser = Parser(
        prog="syncstream",
        description="Live streams (SSE, NDJSON) from synchronous Python web apps.",
        epilog="""examples:
  syncstream demo
  syncstream listen http://127.0.0.1:8000/events
  syncstream publish local: news 'Hello'
  syncstream doctor https://example.com/events

Each command has more: syncstream listen --help
Exit status of all: 0 success, 1 failure, 2 wrong arguments, 130 Ctrl-C; doctor and
publish have more.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"syncstream {__version__}"
    )
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="")
    _add_demo(commands)
    _add_listen(commands)
    _add_publish(commands)
    _add_doctor(commands)
    return parser


def _add_demo(commands: _Commands) -> None:
    command = commands.add_parser(
        "demo",
        help="serve a page with a live chart, and its stream",
        description="Serve a page with a live chart with one gunicorn gevent worker.",
        epilog="""examples:
  syncstream demo
  syncstream demo --port 0                    any free port; it is printed
  syncstream demo --host 0.0.0.0 --port 80    for other machines, too

Its stream, in a second terminal:
  syncstream listen http://127.0.0.1:8000/events

Exit status: 0 stopped (Ctrl-C), 1 cannot listen, or a package is missing, 2 wrong
arguments.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on, and accepted host name; 0.0.0.0: all addresses"
        " (default: 127.0.0.1)",
    )
    command.add_argument(
        "--port",
        type=_port,
        default=8000,
        help="port to listen on; 0: any free port (default: 8000)",
    )
    command.set_defaults(run=_demo)


def _add_listen(commands: _Commands) -> None:
    command = commands.add_parser(
        "listen",
        help="print a stream's events, and reconnect as a browser does",
        description="Print the events of a stream. It reconnects and resumes as a"
        " browser does. Events go to\nthe standard output; connections, retries and"
        " gaps go to the standard error.",
        epilog="""examples:
  syncstream listen http://127.0.0.1:8000/events
  syncstream listen https://example.com/events -H 'Cookie: session=abc'
  syncstream listen https://example.com/events --last-event-id 42
  syncstream listen https://example.com/events --json | jq -r .data
  syncstream listen https://example.com/events --raw > stream.txt
  syncstream listen https://example.com/chat --once --data '{"prompt": "Hi"}'

Colours appear on a terminal only, and not if NO_COLOR is set.

Exit status: 0 the stream ended, or a pipe was closed; 1 it failed: the server refused,
or with --once the response broke off; 2 wrong arguments; 130 Ctrl-C.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_request(command)
    forms = command.add_mutually_exclusive_group()
    forms.add_argument(
        "--json",
        dest="form",
        action="store_const",
        const="json",
        default="pretty",
        help="print a line of JSON for each event: its id, event and data (text)",
    )
    forms.add_argument(
        "--raw",
        dest="form",
        action="store_const",
        const="raw",
        help="print the stream as it comes, with its comments",
    )
    command.add_argument(
        "--once",
        action="store_true",
        help="read one response, and do not reconnect: for streams that end",
    )
    command.set_defaults(run=_listen)


def _add_request(command: argparse.ArgumentParser) -> None:
    """Add the arguments that make a request."""
    command.add_argument(
        "url",
        type=_checked(request.parse_url),
        help="http or https address of a stream",
    )
    command.add_argument(
        *("-H", "--header"),
        type=_checked(request.parse_header),
        action="append",
        default=[],
        metavar="'NAME: VALUE'",
        help="send this header, such as a cookie; may be repeated",
    )
    command.add_argument(
        "--last-event-id", metavar="ID", help="resume after this event"
    )
    command.add_argument(
        "--data",
        metavar="BODY",
        help="send a POST with this body: JSON, a form's fields, or the type given by"
        " -H 'Content-Type: …'",
    )


def _add_doctor(commands: _Commands) -> None:
    command = commands.add_parser(
        "doctor",
        help="listen to a stream, and diagnose it",
        description="Listen to a stream as a browser would, and report its faults:"
        " late heads, buffering,\ncompression, wrong headers, cuts.",
        epilog="""examples:
  syncstream doctor http://127.0.0.1:8000/events
  syncstream doctor https://example.com/events --seconds 90 -H 'Cookie: session=abc'
  syncstream doctor https://localhost/events --insecure
  syncstream doctor https://example.com/chat --data '{"prompt": "Hi"}'

Exit status: 0 healthy; 1 faults; 2 no connection, or wrong arguments; 130 Ctrl-C.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_request(command)
    command.add_argument(
        "--seconds",
        type=_seconds,
        default=20.0,
        metavar="N",
        help="how long to listen (default: 20)",
    )
    command.add_argument(
        "--insecure", action="store_true", help="accept any TLS certificate"
    )
    command.set_defaults(run=_doctor)


def _add_publish(commands: _Commands) -> None:
    command = commands.add_parser(
        "publish",
        help="send an event to a channel",
        description="Send an event to all subscribers of a channel; print its id.",
        epilog="""examples:
  syncstream publish local: news 'Hello from cron'
  syncstream publish redis://127.0.0.1 jobs:7 '{"percent": 40}' --event progress
  syncstream publish postgresql:///app news - < article.json
  tail -F access.log | syncstream publish local: log --lines -

Exit status: 0 stored; 1 not stored; 2 the arguments or the data are wrong; 3 perhaps
stored; 130 Ctrl-C. With --lines, the status and the error are about the last line
read; the lines before it are stored.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("url", help="the hub's URL: local:, redis://…, postgresql://…")
    command.add_argument("channel", help="the channel's name")
    command.add_argument(
        "data",
        help="the event's data, UTF-8, 1 MiB at most; - reads it from standard input",
    )
    command.add_argument("--event", metavar="NAME", help="the event's name")
    command.add_argument(
        "--lines",
        action="store_true",
        help="with -: publish each line as an event, as soon as it is read",
    )
    command.set_defaults(run=_publish)


def _checked(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a function that parses, and shows its ``ValueError`` through argparse."""

    def checked(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= 86400:
            return float(text)
    raise argparse.ArgumentTypeError(
        f"must be seconds, above 0 and at most 86400, got {text!r}"
    )


def _listen(options: argparse.Namespace) -> int:
    """Print events until the stream ends."""
    data = None if options.data is None else os.fsencode(options.data)
    try:
        headers = _merged(options.header)
    except ValueError as error:
        return fail(str(error), 2)
    names = {name.lower() for name in headers}
    if data is not None and "content-type" not in names:
        headers["Content-Type"] = request.type_of(data)
    if "user-agent" not in names:
        headers["User-Agent"] = f"syncstream-listen/{__version__}"
    return listen_to(
        options.url,
        form=options.form,
        headers=headers,
        data=data,
        last_event_id=options.last_event_id,
        once=options.once,
    )


def _merged(pairs: Sequence[tuple[str, str]]) -> dict[str, str | bytes]:
    """Return headers by name, in UTF-8.

    Raises:
        ValueError: A name comes twice, or is that of an option.
    """
    headers: dict[str, str | bytes] = {}
    names: set[str] = set()
    for name, value in pairs:
        if name.lower() in names:
            raise ValueError(f"the header {name} must be given once")
        if name.lower() == "last-event-id":
            raise ValueError("the header Last-Event-ID needs --last-event-id instead")
        names.add(name.lower())
        headers[name] = value.encode()
    return headers


def _doctor(options: argparse.Namespace) -> int:
    """Listen, and print the report."""
    print(f"syncstream: listening for {options.seconds:g} s", file=sys.stderr)
    try:
        seen = listen.examine(
            options.url,
            seconds=options.seconds,
            headers=options.header,
            last_event_id=options.last_event_id,
            insecure=options.insecure,
            data=None if options.data is None else os.fsencode(options.data),
        )
    except ValueError as error:
        return fail(str(error), 2)
    findings = checks.judge(seen)
    try:
        print(report.report(seen, findings), end="", flush=True)
    except BrokenPipeError:  # `| head` has exited
        discard(sys.stdout)
    return checks.exit_status(seen, findings)


def _publish(options: argparse.Namespace) -> int:
    """Publish, and print the ids."""
    line = 0
    try:
        if options.url.partition(":")[0] == "memory":
            raise ValueError(
                "url must be one that other processes share, got memory:, which is"
                " only for this process"
            )
        if options.lines and options.data != "-":
            raise ValueError("data must be - with --lines")
        with contextlib.closing(Hub(options.url)) as hub:
            for data in _data(options):
                line += options.lines
                text = _decoded(data)
                id = hub.publish(options.channel, text, event=options.event)
                if not _printed(id):
                    text = "the event is stored, but its id cannot be printed"
                    return fail(_at(line, text), 3)
    except (ValueError, TypeError, ImportError) as error:
        return fail(_at(line, str(error)), 2)
    except Uncertain as error:
        return fail(_at(line, f"the event may have been stored: {error}"), 3)
    except (BrokerError, OSError) as error:
        return fail(_at(line, str(error)))
    return 0


def _at(line: int, message: str) -> str:
    return f"line {line}: {message}" if line else message


def _data(options: argparse.Namespace) -> Iterator[bytes]:
    """Yield the data of each event, cut one byte above the limit.

    Standard input is read as bytes: text is decoded in blocks, and one wrong byte would
    hold back the lines before it.
    """
    if options.data != "-":
        yield os.fsencode(options.data)
        return
    if sys.stdin is None:
        raise ValueError("data must be given: the standard input is closed")
    if not options.lines:
        yield sys.stdin.buffer.read(_MAX_DATA + 1)
        return
    while line := sys.stdin.buffer.readline(_MAX_DATA + 1):
        yield line.removesuffix(b"\n").removesuffix(b"\r")


def _decoded(data: bytes) -> str:
    if len(data) > _MAX_DATA:
        raise ValueError(f"data must have {_MAX_DATA} bytes at most")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"data must be UTF-8: {error.reason}") from None


def _printed(id: str | None) -> bool:
    try:
        print(id, flush=True)
    except OSError:  # `| head` has exited
        discard(sys.stdout)
        return False
    return True


def _port(text: str) -> int:
    if text.isascii() and text.isdecimal() and int(text) < 65536:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be 0 to 65535, got {text!r}")


def _demo(options: argparse.Namespace) -> int:
    """Become the demo's server, or print why that is not possible."""
    missing = [n for n in ("flask", "gevent", "gunicorn") if find_spec(n) is None]
    if missing:
        return fail(
            f"the demo needs {', '.join(missing)}: pip install 'syncstream-wsgi[demo]'"
        )
    try:
        sock = _bind(options.host, options.port)
    except OSError as error:
        where = f"port {options.port} of {options.host}"
        text = f"cannot listen on {where}: {error.strerror}; use --host or --port"
        return fail(text)
    print(f"syncstream demo: open {_url(sock)} (Ctrl-C stops it)", flush=True)
    # Replace this process: gevent must patch modules before they are imported.
    settings = Path(__file__).with_name("demo") / "settings.py"
    sock.set_inheritable(True)
    os.environ["SYNCSTREAM_DEMO_HOST"] = options.host
    gunicorn = [sys.executable, "-m", "gunicorn", "-c", str(settings)]
    return os.execv(sys.executable, [*gunicorn, "-b", f"fd://{sock.fileno()}"])


def _bind(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Binding it here gives one clear error for a busy port (gunicorn tries five times,
    for five seconds), and the number of the port chosen for port 0.

    Raises:
        OSError: The port is taken or not allowed, or the host is not this machine.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen()  # with SO_REUSEADDR a busy port may show only here
    except BaseException:
        sock.close()
        raise
    return sock


def _url(sock: socket.socket) -> str:
    """Return the URL to open on this machine."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


if __name__ == "__main__":
    sys.exit(main())
