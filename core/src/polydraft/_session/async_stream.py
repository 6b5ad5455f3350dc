"""``AsyncTokenStream``: a token stream for an event loop."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Coroutine, Hashable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from polydraft._session.call_lock import busy_error
from polydraft.contract.results import Chunk
from polydraft.errors import SessionBusyError

if TYPE_CHECKING:
    from polydraft._session.call_lock import CallLock
    from polydraft._session.stream import TokenStream
    from polydraft.contract.results import GenerationResult

__all__ = ["AsyncTokenStream"]


class AsyncTokenStream(AsyncIterator[Chunk]):
    """Chunks of one generation, one per round, for one task. Also an asynchronous context manager.

    ``cancel()`` may be called from any task or thread: the stream then ends with the finish reason ``cancelled`` and
    what was generated until then in ``result``. ``aclose()``, leaving the context manager and cancelling the reading
    task end it as well, and wait until the engine has stopped.
    """

    def __init__(self, stream: TokenStream, lock: CallLock) -> None:
        self._stream = stream
        self._lock = lock
        self._reading = False

    def __repr__(self) -> str:
        return f"<Async{repr(self._stream).removeprefix('<')}"

    @property
    def result(self) -> GenerationResult | None:
        """The result; None until the stream has ended."""
        return self._stream.result

    @property
    def cancelled(self) -> bool:
        """Whether the stream was cancelled or closed."""
        return self._stream.cancelled

    def cancel(self) -> None:
        """Ask the generation to end before its next engine call, from any task or thread.

        It may be called again, before the first chunk is read (nothing is then generated), and after the end (nothing
        changes then).

        Raises:
            ForkedSessionError: The stream belongs to the parent process.
        """
        self._stream.cancel()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        if self._reading:
            raise SessionBusyError("Another task is reading this stream.", "Give each task a stream of its own.")
        self._reading = True
        try:
            await self._wait_for_lock()
            # Each step may run in another worker thread; that is why the lock is held for the call, not for a thread.
            chunk = await asyncio.to_thread(next, self._stream, None)
        except GeneratorExit:  # the event loop is gone: nothing can be awaited
            self._stream.cancel()
            raise
        except BaseException:
            await self.aclose()
            raise
        finally:
            self._reading = False
            if self._stream._state == "ended":  # perhaps before this task took the lock
                self._lock.release(self._stream._call)
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    async def aclose(self) -> None:
        """Cancel, and wait until the engine has stopped, however often the waiting task is cancelled meanwhile."""
        if self._stream.result is None:
            await _to_the_end(asyncio.to_thread(self._stream.close))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # Left by ``break``: closed at once, while the worker of the last step may still hold the stream for a moment.
        if hasattr(self, "_stream"):
            self._stream.close()

    async def _wait_for_lock(self) -> None:
        """Take the call lock for the stream, unless it is cancelled while it waits."""
        task = asyncio.current_task()
        # Weak: a task's result may be the stream itself, which would then never be collected.
        owner: Hashable = ("task", task and weakref.ref(task))
        while self._stream._state != "ended" and not self._lock.try_acquire(self._stream._call, owner):
            if self._stream.cancelled:
                return
            if self._lock.held_by(owner):
                raise busy_error("task")
            # Polled: a threading lock cannot be awaited, and waiting in worker threads could use up the pool.
            await asyncio.sleep(0.002)


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Wait for ``work`` however often the waiting task is cancelled, and only then be cancelled."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            # Cancelling the waiting task must not cancel the clean-up.
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
