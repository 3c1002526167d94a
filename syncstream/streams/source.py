"""`Source`: the iterable of a stream, and the objects that must still be closed."""

from __future__ import annotations

import inspect
from collections.abc import (
    AsyncIterable,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
)
from types import GeneratorType
from typing import Any

from ..protocol.sse import Event
from .async_source import AsyncItems, is_async
from .contract import Feed, is_feed
from .push import Pushed

__all__ = ["Source", "check_source", "name_as", "name_of_source"]

_claims: dict[Feed, Source] = {}  # the feeds that are being claimed now, and by whom


class Source:
    """A stream's source, from its construction to its close.

    Args:
        given: The source, as the application gave it.

    Attributes:
        given: The same, or the items of an asynchronous one; ``None`` once it is
            closed, or belongs to the loop.
        items: The items of an asynchronous source, else ``None``.
        feed: The same if it is a `Feed`, else ``None``.
        to_close: The objects to close, the first one last. Whoever pops one closes it.
    """

    __slots__ = ("feed", "given", "items", "to_close")

    def __init__(self, given: Iterable[Any] | AsyncIterable[Any]) -> None:
        self.items: AsyncItems | None = None
        self.given: Any = given
        if is_async(given):
            self.given = self.items = AsyncItems(given)
        self.feed: Feed | None = None
        if is_feed(given):
            self.feed = given
        self.to_close: list[Any] = [self.given]

    def iterate(self, given: Iterable[Any]) -> Iterator[Any]:
        """Return the iterator of the source, which is closed before the source."""
        iterator = iter(given)
        if iterator is not given:
            self.to_close.append(iterator)
        return iterator

    def claim(self, reader: Callable[[], object]) -> bool:
        """Take a feed for one stream; ``False`` if it is another one's, to close, too.

        Args:
            reader: A weak reference to the stream.
        """
        feed = self.feed
        if feed is None or feed.reader is reader:
            return True
        # One step, so that no lock is needed: of two responses that claim it at once,
        # the second one loses.
        is_first = _claims.setdefault(feed, self) is self
        if is_first:
            try:
                other = feed.reader
                if other is None or other() is None:
                    feed.reader = reader
                    return True
            finally:
                _claims.pop(feed, None)
        self.to_close.clear()
        return False

    def forget(self) -> None:
        """Drop the source: it is closed, or the loop closes it."""
        self.given = self.feed = self.items = None

    @property
    def name(self) -> str:
        """The source's name and place in the code, for the log; ``%`` is doubled."""
        return name_of_source(self.given).replace("%", "%%")


def name_of_source(source: Any) -> str:
    """Return a source's name and place in the code, for the log."""
    if isinstance(source, (AsyncItems, Pushed)):
        return source.name
    name = getattr(source, "__qualname__", None) or type(source).__qualname__
    if " " in name:  # of `name_as`
        return str(name)
    code = getattr(source, "gi_code", None)
    place = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
    return f"the generator {name}{place}"


def name_as(wrapper: GeneratorType[Any, Any, Any], source: Any) -> None:
    """Have the log call a framework's generator by the source that it wraps."""
    wrapper.__qualname__ = name_of_source(source)


def check_source(source: Any) -> None:
    """Refuse an object that cannot be a stream's source, and say how to mend it.

    Raises:
        TypeError: The object cannot be iterated, or is a single item.
    """
    if isinstance(source, Generator) or is_feed(source):
        return  # most are
    problem = None
    if is_async(source) and not isinstance(source, type):
        return
    if hasattr(source, "__await__"):
        problem = "a coroutine is not awaited here: make it a generator"
    elif isinstance(source, type) or inspect.isroutine(source):
        problem = "it has not been called: add ()"
    elif isinstance(source, (str, bytes, bytearray, memoryview, Mapping, Event)):
        problem = "a single item is not a stream of them: put it in a list"
    elif not hasattr(source, "__iter__") and not hasattr(source, "__getitem__"):
        problem = "it cannot be iterated"
    if problem is not None:
        if inspect.iscoroutine(source):
            source.close()  # or Python warns that it was never awaited
        raise TypeError(
            "source must be a generator, another iterable or an asynchronous one, got"
            f" {source!r}: {problem}"
        )
