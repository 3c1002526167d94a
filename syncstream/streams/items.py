"""The body of a stream whose source is a generator or another iterable."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

from ..runtime.clock import time
from ..runtime.waiting import entered
from .contract import Departure
from .iteration import LOOK_EVERY, Failure, Iteration
from .output import PIECE

__all__ = ["chunks_of_items"]


def chunks_of_items(
    run: Iteration, given: Iterable[Any], departure: Departure | None = None
) -> Iterator[bytes]:
    """Yield the response's chunks: each item of a source makes one.

    Args:
        run: Runs the source.
        given: The source, as the application gave it.
        departure: Takes the client to the loop, as soon as a chunk has left with the
            head; ``None``: the client stays.
    """
    stream, parts = run.stream, run.parts
    output, monitor, ended = parts.output, parts.monitor, parts.outcome.ended
    try:
        if departure is not None and not departure.is_possible:
            departure = None
        opening = output.opening
        # The descriptor will soon be another file's.
        is_leaving = departure is not None and opening is not None
        monitor.begin(stream, "never" if is_leaving else "soon")
        if opening is not None and not ended:
            if departure is not None:
                departure.begin()
            yield output.open()
            if departure is not None and departure.finish(run, opening):
                return
            departure = None
        if ended:
            yield from run.finish()
            return
        if departure is None:
            output.warn()
        failure = None
        try:
            with entered(stream):
                run.give_back()
                iterator = parts.source.iterate(given)
                advance: Callable[[], Any] = iterator.__next__
                throw = getattr(iterator, "throw", None)
        except BaseException as error:
            failure = run.take(error)
        if failure is not None:
            yield from run.fail(failure)
            return
        if ended:
            yield from run.finish()
            return
        # Local variables, because all of this is done for every event.
        step, take, encode = run.stepper(), advance, output.format.encode
        monotonic, keepalive, look_at = time.monotonic, monitor.keepalive, 0.0
        item = refused = None
        while True:
            item = step(take)
            if ended:
                break
            if type(item) is Failure:
                yield from run.fail(item)
                return
            if refused is not None:
                take, refused = advance, None
            try:
                chunk = encode(item)
            except BaseException as error:
                # Thrown at the yield, the user's line is in its traceback.
                refused = Failure(error) if throw is not None else run.take(error)
                if refused is None:
                    break
                chunk = None
            if refused is not None:
                if throw is None:
                    yield from run.fail(refused)
                    return
                take = _thrown(throw, refused)
            now = monotonic()
            if now >= look_at:
                look_at = now + LOOK_EVERY
                monitor.look(now)
                if ended:
                    break
                if departure is not None:
                    if chunk is None:
                        look_at = 0.0
                    elif (yield from _leave(run, item, chunk, departure)):
                        return
                    else:
                        departure = None
                        output.warn()
                        continue
            if chunk is not None:
                # What begins with neither a colon nor a line end says by itself
                # how it ends; most begin with a letter.
                if chunk > b";" or (len(chunk) > 3 and chunk[0] != 58):
                    output.tail = chunk
                else:
                    chunk = output.note(item, chunk)
                output.moved = now
                output.events += 1
                if len(chunk) > PIECE:
                    yield from output.pieces(chunk, monitor.piece(len(chunk)))
                    continue
                output.bytes += len(chunk)
                yield chunk
            elif keepalive.is_due(now) and output.is_whole:
                output.moved = now
                output.bytes += len(output.comment)
                yield output.comment
        run.take_overtaken(item)
        run.take_overtaken(refused)
        yield from run.finish()
    except GeneratorExit:
        run.drop()
        if not monitor.thrown_at:
            raise
        # Ours, which has hit a moment too late: it would end the server's thread.
        raised = parts.closing.cut()
        if raised is not None:
            raise raised from None


def _leave(
    run: Iteration, item: Any, chunk: bytes, departure: Departure
) -> Generator[bytes, None, bool]:
    """Send the first chunk with the head, and then leave; tell whether that was so."""
    output = run.parts.output
    chunk = output.note(item, chunk)
    output.moved = time.monotonic()
    output.events += 1
    opening, rest = chunk[:PIECE], chunk[PIECE:]
    departure.begin()
    output.bytes += len(opening)
    yield opening
    if departure.finish(run, opening, rest):
        return True
    yield from output.pieces(rest, run.parts.monitor.piece(len(chunk)))
    return False


def _thrown(throw: Callable[[BaseException], Any], failure: Failure) -> Any:
    """Return a function that throws an error into a source, for the next item."""
    return lambda: throw(failure.take())
