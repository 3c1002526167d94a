"""Push style for coroutine functions: a view that sends is an asynchronous iterator.

The view is a task of the event loop, and may start others that send, too. Asked for an
item, the iterator takes the oldest that waits; its ``send`` returns when the next one
is asked for. The end of the stream cancels the view's task.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import ClientDisconnected
from ..protocol.sse import Event
from ..runtime.journal import journal
from ..runtime.waiting import insist
from .answers import checked_return, failure_of
from .async_task import Timed
from .interrupt import MOST_REMINDERS
from .push import CLOSED, item_of

if TYPE_CHECKING:
    import asyncio

__all__ = ["AsyncPushed", "AsyncSender"]

log = logging.getLogger("syncstream.stream")

View = Callable[[], Coroutine[Any, Any, Any]]


class AsyncSender:
    """What a coroutine view sends events with, its ``sse``; in its tasks only.

    Each method that sends waits until the server has written the event. The end of the
    stream cancels the view, which gets a CancelledError where it awaits. If it swallows
    that and sends again, it gets `ClientDisconnected`.
    """

    __slots__ = ("_framed", "_queue")

    def __init__(self, queue: Queue, framed: bool) -> None:
        self._queue, self._framed = queue, framed

    async def send(
        self,
        data: Any,
        event: str | None = None,
        id: str | int | None = None,
        retry: int | None = None,
    ) -> None:
        """Send an event.

        Args:
            data: Its data: text as it is, ``bytes`` as UTF-8 text, anything else as
                JSON, by the response's ``dumps``. Or an `Event`, alone.
            event: Its name.
            id: Its id, which a client that comes back presents.
            retry: The client's reconnection time, in milliseconds.

        Raises:
            asyncio.CancelledError: The stream has ended.
            ClientDisconnected: It had ended before.
            TypeError, ValueError: A field is wrong, or cannot be encoded.
            RuntimeError: This is another event loop than the view's, or it is after
                `close`.
        """
        await self._queue.give(item_of(data, event, id, retry, self._framed))

    async def comment(self, text: str) -> None:
        """Send a comment, which clients ignore.

        Raises:
            asyncio.CancelledError, ClientDisconnected, RuntimeError: As from `send`.
            TypeError: ``text`` is no ``str``.
        """
        await self._queue.give(Event(comment=text))

    def close(self) -> Awaitable[None]:
        """Send nothing more: the stream ends when the view returns.

        It is done at once, whether the result is awaited or not.
        """
        self._queue.is_closed = True
        return _Done()


class _Done:
    """Nothing to wait for; may be awaited as the other methods' results must be."""

    __slots__ = ()

    def __await__(self) -> Generator[Any, None, None]:
        yield from ()


class Queue:
    """The items that wait to be taken, each with a future of its sender.

    Args:
        name: What the log calls the view.

    Attributes:
        waiting: The items and the futures, oldest first.
        loop: The view's event loop; ``None`` before it has begun.
        changed: A future that the taker awaits, if it does.
        is_closed: Whether the view has said that it sends no more.
        is_over: Whether the stream has ended.
    """

    __slots__ = (
        *("_is_named", "_name", "_refused"),
        *("changed", "is_closed", "is_over", "loop", "waiting"),
    )

    def __init__(self, name: str) -> None:
        self._name = name
        self._is_named = False
        self._refused: Counter[int] = Counter()  # by a task's id
        self.waiting: deque[tuple[Any, asyncio.Future[None]]] = deque()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.changed: asyncio.Future[None] | None = None
        self.is_closed = False
        self.is_over = False

    async def give(self, item: object) -> None:
        """Have an item taken; return when it was written."""
        import asyncio

        loop = asyncio.get_running_loop()
        if loop is not self.loop:
            raise RuntimeError(
                "sse must be used in the view's own event loop: from others, and from"
                " threads, use asyncio.run_coroutine_threadsafe(sse.send(…), loop) with"
                " what asyncio.get_running_loop() returns in the view"
            )
        if self.is_over:
            self._refuse()
        if self.is_closed:
            raise RuntimeError(CLOSED)
        written: asyncio.Future[None] = loop.create_future()
        entry = item, written
        self.waiting.append(entry)
        self.change()
        try:
            await written
        except asyncio.CancelledError:
            if entry in self.waiting:
                self.waiting.remove(entry)
            raise

    def _refuse(self) -> NoReturn:
        """Raise the end in a task that sends after it.

        A loop that swallows that never awaits anything, and no other task of the
        process has its turn: it is ended.
        """
        import asyncio

        ended, task = ClientDisconnected("the stream has ended"), asyncio.current_task()
        self._refused[id(task)] += 1
        if self._refused[id(task)] <= MOST_REMINDERS:
            raise ended
        if not self._is_named:
            self._is_named = True
            text = "%s swallows the end of its stream, and is ended there"
            journal().later(log, logging.WARNING, text, self._name)
        insist(ended)

    def has_items(self) -> bool:
        """Tell whether there is an item to take; one of a cancelled task is none."""
        while self.waiting and self.waiting[0][1].cancelled():
            self.waiting.popleft()
        return bool(self.waiting)

    def change(self, *_: object) -> None:
        """Wake the taker."""
        if self.changed is not None and not self.changed.done():
            self.changed.set_result(None)

    async def wait(self) -> None:
        """Wait for a change; in the taker."""
        assert self.loop is not None
        self.changed = self.loop.create_future()
        try:
            await self.changed
        finally:
            self.changed = None

    def end(self) -> None:
        """Refuse what waits, and what comes."""
        self.is_over = True
        while self.waiting:
            _, written = self.waiting.popleft()
            written.cancel()


class AsyncPushed:
    """The items that a coroutine view sends; an asynchronous iterator.

    Args:
        bind: Returns the view with all of its arguments, of which it gets the sender.
        name: The view's name, from ``name_of_view``.
        framed: Text and bytes without other fields are framed already.
    """

    def __init__(
        self, bind: Callable[[AsyncSender], View], name: str, *, framed: bool = False
    ) -> None:
        self.__qualname__ = name  # for the log, as generators have it
        self._queue = Queue(f"the view {name}")
        self._view = bind(AsyncSender(self._queue, framed))
        self._task: asyncio.Task[None] | None = None
        self._written: asyncio.Future[None] | None = None  # of the item that was taken
        self._raised: list[BaseException] = []

    must_be_asked = True  # its `send` waits until then

    @property
    def is_unstarted(self) -> bool:
        """Whether nothing has been run, so that there is nothing to close."""
        return self._task is None

    def __aiter__(self) -> AsyncPushed:
        return self

    async def __anext__(self) -> Any:
        return await self._next(None)

    async def athrow(self, error: BaseException) -> Any:
        """Raise an error at the ``send`` of the last item; return the next one."""
        return await self._next(error)

    async def _next(self, error: BaseException | None) -> Any:
        queue, task = self._queue, self._task
        if task is None:
            task = self._begin()
        written, self._written = self._written, None
        is_heard = written is not None and not written.done()
        if is_heard and written is not None:
            if error is None:
                written.set_result(None)
            else:
                # No future takes a StopIteration, of ``dumps``.
                written.set_exception(failure_of(error, "the encoding of an item"))
        elif error is not None:  # its sender was cancelled
            raise error
        error = None
        while not (queue.has_items() or task.done()):
            await queue.wait()
        if task.done():
            queue.end()
            self._raise_end()
            raise StopAsyncIteration
        item, self._written = queue.waiting.popleft()
        return item

    def _begin(self) -> asyncio.Task[None]:
        import asyncio

        loop = self._queue.loop = asyncio.get_running_loop()
        task = self._task = loop.create_task(self._run(), name=self.__qualname__)
        task.add_done_callback(self._queue.change)
        return task

    async def _run(self) -> None:
        try:
            coroutine = self._view()
            name = f"the view {self.__qualname__}"
            returned = checked_return(await Timed(coroutine, name, coroutine))
            if returned is not None:
                raise returned
        except BaseException as error:
            self._raised.append(error)

    def _raise_end(self) -> None:
        """Raise what the view has raised, if anything."""
        if self._raised:
            raise failure_of(self._raised.pop(), f"the view {self.__qualname__}")

    async def aclose(self) -> None:
        """Cancel the view, and wait until it has ended.

        Raises:
            BaseException: What the view has raised, other than its cancellation.
        """
        import asyncio

        queue, task = self._queue, self._task
        queue.is_over = True
        if task is not None and not task.done():
            task.cancel()
            await asyncio.wait([task])
        queue.end()
        if self._written is not None:  # of a task that the view has left
            self._written.cancel()
        with suppress(asyncio.CancelledError, GeneratorExit):
            self._raise_end()
