"""The body of a stream whose source is a `Feed`, until its client leaves the thread."""

from __future__ import annotations

from collections.abc import Iterator

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
    """Yield the response's chunks: all that is there makes one.

    No code of the application's runs in the steps, nor is there anything to encode:
    less is to be done for each of them than for the items of a generator.

    Args:
        run: Runs the feed.
        feed: It.
        departure: Takes its client along, where that can be; ``None``: it stays.
    """
    parts, stream = run.parts, run.stream
    output, monitor, ended = parts.output, parts.monitor, parts.outcome.ended
    try:
        if departure is not None and not departure.is_possible:
            departure = None
        # The number of its connection is soon another's; but not if the application's
        # code runs before, which may take its time.
        is_leaving = departure is not None and not feed.begins_with_user_code
        monitor.begin(stream, is_leaving=is_leaving)
        # Before the client hears that it is open: it may publish then.
        first, events, failure = b"", 0, None
        try:
            if not ended:
                first, events = _first_step(run, feed, is_leaving=departure is not None)
        except BaseException as error:
            failure = run.failure_in(error)
        if output.opening is not None and not ended:
            if departure is not None and failure is None:
                departure.begin()
            yield output.open()
            if departure is not None and departure.finish(first, events):
                return
        if failure is not None and not ended:
            yield from run.fail(failure)
            return
        if not ended:
            output.warn()
            if first:
                output.moved = time.monotonic()
                output.events += events
                yield from output.pieces(first, monitor.piece(len(first)))
        # What it sends is whole events, or lines, as no bytes at all are.
        output.tail = b"\n\n" if output.is_event_stream else b""
        dumps = dumps_or_default(output.format.dumps)
        frames = feed.frames(output.is_event_stream, dumps, stream)
        step, advance, before = run.stepper(), frames.__next__, output.events
        monotonic, look_at = time.monotonic, 0.0
        look_every = WATCHED_LOOK_EVERY if monitor.is_watching else LOOK_EVERY
        while not ended:
            chunk = step(advance)
            if ended:
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
        raise


def _first_step(run: Iteration, feed: Feed, *, is_leaving: bool) -> tuple[bytes, int]:
    """Begin; return what there is for a client that is to leave, and how many events.

    Args:
        is_leaving: It is.
    """
    with entered(run.stream):
        try:
            feed.begin()
            if not is_leaving:
                return b"", 0
            run.stream.before_wait()
            chunk, events, _ = feed.step()
        except Unavailable:
            return b"", 0  # it waits for the broker, as those who are there do
        feed.count(events)
    return chunk, events
