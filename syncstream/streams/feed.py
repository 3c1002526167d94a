"""The body of a stream whose source is a `Feed`, until its client leaves the thread."""

from __future__ import annotations

from collections.abc import Iterator

from ..channels.options import Failed
from ..errors import Unavailable
from ..protocol.json import dumps_or_default
from ..runtime.clock import time
from ..runtime.waiting import entered
from .contract import Departure, Feed
from .iteration import LOOK_EVERY, Failure, Iteration
from .monitor import WATCHED_LOOK_EVERY
from .output import PIECE

__all__ = ["chunks_of_feed"]


def chunks_of_feed(
    run: Iteration, feed: Feed, departure: Departure | None
) -> Iterator[bytes]:
    """Yield the response's chunks: all events that are ready make one.

    The steps run no code of the application and encode nothing, so they need less than
    those of a generator.

    Args:
        run: Runs the feed.
        feed: The feed.
        departure: Takes the client to the loop; ``None``: the client stays.
    """
    parts, stream = run.parts, run.stream
    output, monitor, ended = parts.output, parts.monitor, parts.outcome.ended
    failure = None
    try:
        if departure is not None and not departure.is_possible:
            departure = None
        # The descriptor will soon be another file's, unless code of the application
        # runs before, which may take long.
        is_leaving = departure is not None and not feed.begins_with_user_code
        monitor.begin(stream, "never" if is_leaving else "now")
        # Before the client sees the stream open: it may publish as soon as it does.
        first, events = b"", 0
        try:
            if not ended:
                first, events = _first_step(run, feed, is_leaving=departure is not None)
        except BaseException as error:
            failure = run.take(error)
        if output.opening is not None and not ended:
            if departure is not None and failure is None:
                departure.begin()
            yield output.open()
            if departure is not None and departure.finish(
                run, output.opening, first, events
            ):
                return
        if failure is not None:
            if not ended:
                yield from run.fail(failure)
                return
            run.take_overtaken(failure)
        if not ended:
            output.warn()
            if first:
                output.moved = time.monotonic()
                output.events += events
                yield from output.pieces(first, monitor.piece(len(first)))
        # A feed sends whole events, or lines.
        output.tail = b"\n\n" if output.is_event_stream else b""
        dumps = dumps_or_default(output.format.dumps)
        frames = feed.frames(output.is_event_stream, dumps, stream)
        step, advance, before = run.stepper(), frames.__next__, output.events
        monotonic, look_at = time.monotonic, 0.0
        look_every = WATCHED_LOOK_EVERY if monitor.is_watching else LOOK_EVERY
        while not ended:
            chunk = step(advance)
            if ended:
                run.take_overtaken(chunk)
                break
            if type(chunk) is Failure:
                yield from run.fail(chunk)
                return
            output.moved = now = monotonic()
            if now >= look_at:
                look_at = now + look_every
                monitor.look(now)
                if ended:
                    break
            output.events = before + frames.events
            if len(chunk) > PIECE:
                yield from output.pieces(chunk, monitor.piece(len(chunk)))
                continue
            output.bytes += len(chunk)
            yield chunk
        yield from run.finish()
    except GeneratorExit:
        run.drop()
        run.take_overtaken(failure)
        raise


def _first_step(run: Iteration, feed: Feed, *, is_leaving: bool) -> tuple[bytes, int]:
    """Begin the feed; return the first bytes for the loop, and their number of events.

    Args:
        is_leaving: Whether the client leaves; else the first bytes come later.
    """
    with entered(run.stream):
        try:
            feed.begin()
            if not is_leaving:
                return b"", 0
            run.give_back()
            chunk, events, _ = feed.step()
        except Failed as failed:
            raise failed.error from None
        except Unavailable:
            return b"", 0  # it waits for the broker, as open streams do
        feed.count(events)
    return chunk, events
