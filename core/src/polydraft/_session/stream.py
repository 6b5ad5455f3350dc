"""``TokenStream``: an iterator over the chunks of one generation, with the result at its end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self, TypeVar

from polydraft._containment import is_callers_own
from polydraft._session.failures import as_engine_errors, engine_failure
from polydraft.contract.results import Chunk, Round
from polydraft.errors import EngineError

if TYPE_CHECKING:
    from polydraft._session.call import Call
    from polydraft._session.guards import StepGuard
    from polydraft.contract.results import GenerationResult

__all__ = ["TokenStream", "read_together"]

R = TypeVar("R")


def read_together(streams: Sequence[TokenStream], most: int) -> None:
    """Read streams to their ends in threads, at most ``most`` at a time; the first error ends all of them."""
    if min(most, len(streams)) < 2:
        return
    with ThreadPoolExecutor(min(most, len(streams)), thread_name_prefix="polydraft-call") as threads:
        readers = [threads.submit(_read, stream) for stream in streams]
        try:
            wait(readers, return_when=FIRST_EXCEPTION)
            for reader in readers:
                if reader.done():
                    reader.result()
        finally:  # after an error or an interrupt
            for stream in streams:
                stream.cancel()


def _read(stream: TokenStream) -> None:
    for _ in stream:
        pass


class TokenStream(Iterator[Chunk]):
    """Chunks of one generation, one per round. Also a context manager: leaving it closes the stream.

    ``cancel()`` may be called from any thread: the stream then ends with the finish reason ``cancelled`` and what was
    generated until then. ``close()`` ends the stream at once; garbage collection calls it on a stream that was left
    unfinished. ``result`` is set once the stream has ended, for whatever reason.
    """

    def __init__(
        self,
        call: Call,
        rounds: Callable[[Call], Iterator[Round]],
        acquire: Callable[[Call], bool],
        release: Callable[[Call], None],
        finished: Callable[[Call, bool], None],
        guard: StepGuard,
    ) -> None:
        self._call = call
        self._acquire = acquire
        self._release = release
        self._finished = finished
        self._make_rounds = rounds
        self._rounds: Iterator[Round] | None = None
        self._guard = guard
        self._step_lock = threading.Lock()
        # Set by ``close`` from inside a step, which cannot wait for ``_step_lock``: it holds it.
        self._close_asked = False
        self._result: GenerationResult | None = None
        # new -> running (holds the session's call lock) -> ended; without a step, new -> ended. Set last, for __del__.
        self._state = "new"

    def __repr__(self) -> str:
        if self._result is not None:
            return f"<TokenStream, ended: {self._result!r}>"
        return f"<TokenStream, {'not begun' if self._state == 'new' else 'running'}>"

    @property
    def result(self) -> GenerationResult | None:
        """The result; None until the stream has ended."""
        return self._result

    @property
    def cancelled(self) -> bool:
        """Whether the stream was cancelled or closed."""
        return self._call.cancelled()

    def start(self) -> None:
        """Hand the request to the engine without waiting for its first chunk; ``next`` does so otherwise."""
        self._guard.check()  # before the lock: in a forked process, a thread of the parent holds it for ever
        self._step(self._start)

    def _start(self) -> None:
        if self._state != "ended" and self._take_lock() and self._rounds is None:
            self._open()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        self._guard.check()  # before the lock, as in ``start``
        return self._step(self._advance)

    def _step(self, work: Callable[[], R]) -> R:
        """Run ``work`` under the step lock; whatever it raises ends the stream and releases the session's lock.

        Written out, not as context managers: an interrupt (Ctrl+C) may come at the start of any Python function, such
        as their ``__exit__``. A lock's own methods are not interrupted.
        """
        guard, depth = self._guard, self._guard.depth
        try:
            # Before waiting for the lock: a signal handler that closes the stream meanwhile sees it, and returns.
            guard.depth = depth + 1
            try:
                with self._step_lock:
                    try:
                        return work()
                    except BaseException as error:
                        self._end_after(error)
                        raise
            finally:
                if self._close_asked:  # by a call of close from inside this step
                    self._end_unless_in_use()
        finally:
            guard.depth = depth

    def _take_lock(self) -> bool:
        """Wait for the session's call lock, unless taken already; False if the call was cancelled before."""
        if self._state == "new":
            # A stream that is cancelled before its first step never takes the session's lock.
            if self.cancelled or not self._acquire(self._call):
                return False
            self._state = "running"
        return True

    def _advance(self) -> Chunk:
        if self._state == "ended":
            raise StopIteration
        call = self._call
        emitted: Round | None = None
        taken = self._take_lock()
        started = time.perf_counter()  # waiting for other calls is not part of the prefill
        if taken:
            rounds = self._open() if self._rounds is None else self._rounds
            try:
                # None: the engine has no more rounds, for example because the call was cancelled.
                emitted = next(rounds, None)
                call.check_yielded(emitted)
            except BaseException as error:
                self._fail(error)
        if emitted is None:
            # A last chunk without tokens, for the text that was held back as the possible start of a stop string.
            empty = Round(token_ids=(), num_draft_tokens=0, num_accepted_tokens=0)
            chunk = call.chunk(empty, call.finish_reason or "cancelled")
            self._end()
            return chunk
        call.count(emitted, time.perf_counter() - started if emitted.seconds is None else emitted.seconds)
        # Closed from inside this step: the tokens are delivered all the same, in the last chunk.
        reason = call.finish_reason or ("cancelled" if self._close_asked else None)
        chunk = call.chunk(emitted, reason)
        if reason is not None:
            self._end()
        return chunk

    def _open(self) -> Iterator[Round]:
        """Hand the request to the engine."""
        try:
            rounds = self._rounds = self._make_rounds(self._call)
            if not hasattr(rounds, "__next__"):
                raise TypeError(f"its rounds() gave a {type(rounds).__name__}, which is not an iterator")
        except BaseException as error:
            self._fail(error)
        return rounds

    def _fail(self, error: BaseException) -> NoReturn:
        """Raise what the engine raised, as one of polydraft's errors unless it is the caller's own."""
        raised = engine_failure(error, self._call.running)
        if raised is error:
            raise error
        raise raised from error

    def cancel(self) -> None:
        """Ask the generation to end before its next engine call; the stream then ends with reason ``cancelled``.

        From any thread. It may be called again, before the first chunk is read (nothing is then generated), and after
        the end (nothing changes then).

        Raises:
            ForkedSessionError: The stream belongs to the parent process.
        """
        self._guard.check_home()
        self._call.cancel()

    def close(self) -> None:
        """Cancel and free what the call holds. Waits only for an engine call under way in another thread.

        Called from inside a step of the session (a logits processor, a signal handler) it does not wait: the stream
        ends when its step is over. In a forked process it does nothing: what the stream holds belongs to the parent.
        """
        if not self._guard.is_home:
            return
        self._call.cancel()
        if self._guard.depth:
            self._close_asked = True
            self._end_unless_in_use()
            return
        self._step(self._end)

    def _end_unless_in_use(self) -> None:
        """End the stream; if another step is under way, that one ends it afterwards."""
        if self._step_lock.acquire(blocking=False):
            try:
                self._end()
            finally:
                self._step_lock.release()

    def _end_after(self, error: BaseException) -> None:
        """End the stream because of an error, which says more than what goes wrong in ending it."""
        try:
            if isinstance(error, EngineError) and not error.partial_text:
                # Before the end, which turns the bytes of an unfinished character into U+FFFD.
                error.partial_text = self._call.stable_text()
            self._end()
        except Exception as second:
            if is_callers_own(second):
                raise

    def _end(self) -> None:
        """Close the engine's iterator, make the result, release the session's lock; each even if one before fails.

        If an interrupt stops it, it continues when it is called again.
        """
        if self._state == "ended":
            return
        started = self._state == "running"
        try:
            # The iterator is dropped first, so that a second call does nothing even if closing it fails.
            rounds, self._rounds = self._rounds, None
            close = getattr(rounds, "close", None)
            if close is not None:
                with as_engine_errors(self._call.running, "in ending a generation"):
                    close()
        finally:
            try:
                if self._result is None:
                    self._call.end()
                    self._result = self._call.result()
            finally:
                # Last: another thread's call may start at once.
                self._release(self._call)
                self._state = "ended"
                self._finished(self._call, started)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # ``__init__`` may have failed before it set the state.
        if getattr(self, "_state", "ended") != "ended":
            self.close()
