"""Push style: a view that sends, turned into a source that is asked for its items.

A plain view runs in a greenlet, in the thread or greenlet of its request. The two take
turns: asked for an item, the source resumes the view, and waits for its next `send`;
`send` gives the turn back with the item, and returns when the next one is asked for,
which is when the server has written it. So the view is interrupted, told of errors and
closed as a generator is at its ``yield``. Views that are coroutine functions are in
``async_push``.
"""

from __future__ import annotations

import _thread
import inspect
import logging
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from typing import Any

from ..protocol.sse import Event
from ..runtime.greenlets import make_inner
from ..runtime.journal import journal
from ..runtime.sockets import native
from ..runtime.waiting import (
    Scope,
    current,
    current_scope,
    gevent_hub,
    gevent_hub_of_thread,
    insist,
    runner,
)
from .answers import failure_of
from .contract import FRAMED
from .interrupt import MOST_REMINDERS

__all__ = ["CLOSED", "Pushed", "Sender", "item_of", "name_of_view", "run_view"]

log = logging.getLogger("syncstream.stream")

CLOSED = "nothing can be sent after close()"

View = Callable[[], Any]


def item_of(
    data: Any, event: str | None, id: str | int | None, retry: int | None, framed: bool
) -> Any:
    """Return the item for a stream that the arguments of a ``send`` mean.

    Args:
        data, event, id, retry: The fields of an `Event`; or ``data`` alone is one.
        framed: Text and bytes without other fields are framed already.

    Raises:
        TypeError, ValueError: As from `Event`; or an `Event` has company.
    """
    if isinstance(data, Event):
        if (event, id, retry) != (None, None, None):
            raise TypeError(
                "send() takes an Event alone: give the Event itself its event=, id=,"
                " retry="
            )
        return data
    is_plain = event is None and id is None and retry is None
    if is_plain and (isinstance(data, str) or (framed and isinstance(data, FRAMED))):
        return data
    return Event(data, event=event, id=id, retry=retry)


def name_of_view(view: Any) -> str:
    """Return a view's name and its place in the code, for the log."""
    inner = inspect.unwrap(view)
    name = getattr(inner, "__qualname__", None) or type(inner).__qualname__
    code = getattr(inner, "__code__", None)
    place = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
    return f"{name}{place}"


class Sender:
    """What a plain view sends events with, its ``sse``: in the view's own thread only.

    Each method that sends waits until the server has written the event. Then it raises
    `ClientDisconnected` if the client has left, and `GeneratorExit` if the stream has
    ended for another reason.
    """

    __slots__ = ("_framed", "_turns")

    def __init__(self, turns: Turns, framed: bool) -> None:
        self._turns, self._framed = turns, framed

    def send(
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
            ClientDisconnected: The client has left.
            GeneratorExit: The stream has ended for another reason.
            TypeError, ValueError: A field is wrong, or cannot be encoded.
            RuntimeError: This is another thread or greenlet than the view's, or it is
                after `close`.
        """
        self._turns.give(item_of(data, event, id, retry, self._framed))

    def comment(self, text: str) -> None:
        """Send a comment, which clients ignore.

        Raises:
            ClientDisconnected, GeneratorExit, RuntimeError: As from `send`.
            TypeError: ``text`` is no ``str``.
        """
        self._turns.give(Event(comment=text))

    def close(self) -> None:
        """Send nothing more: the stream ends when the view returns."""
        self._turns.is_closed = True


class Turns:
    """Whose turn it is, of a view and of the source that it is.

    It does not refer to the view's greenlet: what a suspended one refers to is hidden
    from the garbage collector.

    Args:
        name: What the log calls the view.

    Attributes:
        view: A weak reference to the view's greenlet.
        taker: The greenlet that has resumed the view.
        is_resumed: Whether the taker has done so. Others may resume the view, too: a
            time-out of gevent's.
        items: The item to take, if any.
        raised: What the view has raised, if anything.
        returned: What the view has returned.
        is_closed: Whether the view has said that it sends no more.
        is_over: Whether the view was told that the stream has ended.
        refused: How often it has sent since.
    """

    __slots__ = (
        *("_name", "is_closed", "is_over", "is_resumed", "items", "raised", "refused"),
        *("returned", "taker", "view"),
    )

    def __init__(self, name: str) -> None:
        self._name = name
        self.view: Callable[[], object] = object
        self.taker: Any = None
        self.is_resumed = False
        self.items: list[Any] = []
        self.raised: list[BaseException] = []
        self.returned: Any = None
        self.is_closed = False
        self.is_over = False
        self.refused = 0

    def give(self, item: object) -> None:
        """Give the taker an item, and wait for the view's next turn; in the view."""
        if runner() is not self.view():
            raise RuntimeError(
                "sse must be used in the view's own thread and greenlet: let others put"
                " what they have into a queue.Queue, and send what"
                " current_stream().wait(queue) returns in the view"
            )
        if self.is_closed:
            raise RuntimeError(CLOSED)
        scope = current_scope()
        if scope is not None and (self.is_over or scope.is_over()):
            scope.check()
        if self.is_over:
            ending = scope.ending() if scope is not None else GeneratorExit()
            self.refused += 1
            if self.refused > MOST_REMINDERS:  # a loop in a handler
                text = "%s swallows the end of its waits, and is ended there"
                journal().later(log, logging.WARNING, text, self._name)
                insist(ending)
            raise ending
        self.items.append(item)
        self.is_resumed = False
        self._switch(self.taker)

    def _switch(self, to: Any) -> None:
        """Wait for the view's next turn.

        What others throw into the view meanwhile, whose server is at work, is raised
        when its turn has come.
        """
        thrown: BaseException | None = None
        try:
            while not self.is_resumed:
                try:
                    to.switch()
                except BaseException as error:
                    if self.is_resumed:
                        raise
                    thrown = error
                # Others throw in their hub, which goes on.
                to = gevent_hub_of_thread() or to
            if thrown is not None:
                raise thrown
        finally:
            thrown = None  # its traceback has this frame


def run_view(view: View, turns: Turns) -> None:
    """Run a view to its end, and note that; the first function of its greenlet."""
    try:
        turns.returned = view()
    except BaseException as error:
        turns.raised.append(error)
    scope = current_scope()
    if scope is not None and gevent_hub() is not None:
        # The database connections of the view's greenlet are no other's: nobody else
        # gives them back.
        scope.before_wait()


class Pushed:
    """The items that a plain view sends, for the stream that asks for them.

    It is an iterator like a generator, which begins the view when it is first asked. An
    error that is thrown is raised at the view's `send`; `close` raises the stream's end
    there, and waits for the view's end.

    The view runs in a copy of the context that is the current one now.

    Args:
        bind: Returns the view with all of its arguments, of which it gets the sender.
        name: The view's name, from `name_of_view`.
        framed: Text and bytes without other fields are framed already.

    Attributes:
        name: What the log calls it.
    """

    def __init__(
        self, bind: Callable[[Sender], View], name: str, *, framed: bool = False
    ) -> None:
        self.name = f"the view {name}"
        self._greenlet: Any = None
        self._thread = 0
        self._first: tuple[Any, ...] = ()  # what its first turn takes
        self._scope: Any = None  # a weak reference to the stream
        self._turns = Turns(self.name)
        self._view: View | None = bind(Sender(self._turns, framed))
        # The request's: that of the first turn is the server's, which has left the
        # application's middleware.
        self._context = copy_context()

    def __iter__(self) -> Pushed:
        return self

    def __next__(self) -> Any:
        return self._next(None)

    def throw(self, error: BaseException) -> Any:
        """Raise an error at the view's `send`; return the next item."""
        if self._greenlet is None:
            self._view = None
            raise error
        return self._next(error)

    def _next(self, error: BaseException | None) -> Any:
        turns = self._turns
        if self._greenlet is None:
            if self._view is None:
                raise StopIteration
            self._begin()
        elif self._greenlet.dead:
            raise StopIteration
        self._resume(error)
        error = None
        if turns.items:
            return turns.items.pop()
        self._raise_end()
        returned = turns.returned
        if inspect.iscoroutine(returned) or inspect.isgenerator(returned):
            returned.close()
            raise TypeError(
                f"{self.name} has returned a {type(returned).__name__}: @with_sse takes"
                " a function that sends by itself, or a coroutine function"
            )
        raise StopIteration(returned)

    def _raise_end(self) -> None:
        """Raise what the view has raised, if anything."""
        if self._turns.raised:
            raise failure_of(self._turns.raised.pop(), self.name)

    def _begin(self) -> None:
        view, self._view = self._view, None
        assert view is not None
        self._greenlet = made = make_inner(run_view)
        self._thread = native(_thread, "get_ident")()
        self._turns.view = weakref.ref(made)
        self._first = (view, self._turns)
        scope = current_scope()
        self._scope = None if scope is None else scope.reference
        self._context.run(current.set, self._scope)
        made.gr_context = self._context

    def _stream(self) -> Scope | None:
        """Return the stream, if that is what runs the view now."""
        scope = current_scope()
        is_ours = scope is not None and scope.reference is self._scope
        return scope if is_ours else None

    def _resume(self, error: BaseException | None) -> None:
        """Let the view run until it sends or ends."""
        if native(_thread, "get_ident")() != self._thread:
            raise RuntimeError(
                f"{self.name} runs in another thread than this, which asks it for"
                " an event or closes it: a server or a middleware iterates a response"
                " in several threads. Use a generator with @sse there"
            )
        turns, view = self._turns, self._greenlet
        here: Any = runner()
        if view.parent is not here:
            view.parent = here
        scope = self._stream()
        thrown: BaseException | None = None
        arguments, self._first = self._first, ()
        turns.taker = here
        if scope is not None:
            scope.runner = view
        try:
            turns.is_resumed = True
            while True:
                try:
                    if error is None:
                        view.switch(*arguments)
                    else:
                        thrown, error = error, None
                        view.throw(thrown)
                    return
                except BaseException as foreign:
                    # It was thrown into this greenlet, because it waits. What waits
                    # is the view.
                    if view.dead:
                        raise
                    error = foreign
        finally:
            turns.taker = error = thrown = None
            if scope is not None:
                scope.runner = here

    def close(self) -> None:
        """Raise the stream's end in the view, and wait for the view's end.

        Raises:
            BaseException: What the view has raised, other than that.
            RuntimeError: This is not the thread that the view has begun in.
        """
        self._view = None
        if self._greenlet is None or self._greenlet.dead:
            return
        scope = self._stream()
        self._turns.is_over = True
        if scope is not None:
            scope.was_told = True
        self._resume(scope.ending() if scope is not None else GeneratorExit())
        self._turns.items.clear()
        with suppress(GeneratorExit):
            self._raise_end()

    def __del__(self) -> None:
        # Elsewhere greenlet ends it, with GreenletExit, when its thread next runs one.
        if self._greenlet is None or sys.is_finalizing():
            return
        if self._thread == native(_thread, "get_ident")():
            self.close()
