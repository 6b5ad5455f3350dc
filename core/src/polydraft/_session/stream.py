"""``TokenStream``: an iterator over the chunks of one generation, with the result at its end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self

from polydraft.contract.results import Chunk, Round
from polydraft.errors import EngineError, OutOfMemoryError, PolydraftError

if TYPE_CHECKING:
    from polydraft._session.call import Call
    from polydraft._session.guards import StepGuard
    from polydraft.contract.results import GenerationResult

__all__ = ["TokenStream"]


class TokenStream(Iterator[Chunk]):
    """Chunks of one generation, one per round. Also a context manager: leaving it closes the stream.

    ``cancel()`` may be called from any thread. ``close()`` ends the stream at once; garbage collection calls it on a
    stream that was left unfinished. ``result`` is set once the stream has ended, for whatever reason.
    """

    def __init__(
        self,
        call: Call,
        rounds: Callable[[Call], Iterator[Round]],
        acquire: Callable[[Callable[[], bool]], bool],
        finished: Callable[[Call], None],
        guard: StepGuard,
    ) -> None:
        self._call = call
        self._acquire = acquire
        self._finished = finished
        self._make_rounds = rounds
        self._rounds: Iterator[Round] | None = None
        # new -> running (holds the session's call lock) -> ended; without a step, new -> ended.
        self._state = "new"
        self._guard = guard
        self._step_lock = threading.Lock()
        # Set by ``close`` from inside a step, which cannot wait for ``_step_lock``: it holds it.
        self._close_asked = False
        self._result: GenerationResult | None = None

    def _use_lock(self, acquire: Callable[[Callable[[], bool]], bool]) -> None:
        """Replace how the stream takes its session's call lock, for a caller that has taken it already.

        Args:
            acquire: Gets a function that says whether the call has been cancelled; returns False if it was cancelled
                while waiting, else True.
        """
        self._acquire = acquire

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
        with self._step():
            if self._state != "ended" and self._take_lock() and self._rounds is None:
                self._open()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        with self._step():
            if self._state == "ended":
                raise StopIteration
            try:
                return self._advance()
            # StopIteration, too: whatever leaves a step this way ends the stream and releases the session's lock.
            except BaseException:
                self._end()
                raise

    @contextmanager
    def _step(self) -> Iterator[None]:
        self._guard.check()  # before the lock: in a forked process, a thread of the parent holds it for ever
        # Before waiting for the lock: a signal handler that closes the stream meanwhile sees ``depth``, and returns.
        with self._guard:
            try:
                with self._step_lock:
                    yield
            finally:
                if self._close_asked:  # by a call of close from inside this step
                    self._end_unless_in_use()

    def _take_lock(self) -> bool:
        """Wait for the session's call lock, unless taken already; False if the call was cancelled before."""
        if self._state == "new":
            # A stream that is cancelled before its first step never takes the session's lock.
            if self.cancelled or not self._acquire(self._call.cancelled):
                return False
            self._state = "running"
        return True

    def _advance(self) -> Chunk:
        call = self._call
        emitted: Round | None = None
        taken = self._take_lock()
        started = time.perf_counter()  # waiting for other calls is not part of the prefill
        if taken:
            rounds = self._open() if self._rounds is None else self._rounds
            try:
                # None: the engine has no more rounds, for example because the call was cancelled.
                emitted = next(rounds, None)
            except Exception as error:
                self._fail(error)
        if emitted is None:
            if call.finish_reason is not None:
                raise StopIteration
            # A last chunk without tokens, for the text that was held back as the possible start of a stop string.
            chunk = call.chunk(Round(token_ids=(), num_draft_tokens=0, num_accepted_tokens=0), "cancelled")
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
            self._rounds = self._make_rounds(self._call)
        except Exception as error:
            self._fail(error)
        return self._rounds

    def _fail(self, error: Exception) -> NoReturn:
        """Raise what the engine raised, as one of polydraft's errors, with the text so far."""
        call = self._call
        if isinstance(error, PolydraftError):
            if isinstance(error, EngineError) and not error.partial_text:
                error.partial_text = call.tracker.text
            raise error
        if isinstance(error, MemoryError):
            raise OutOfMemoryError(
                "Memory ran out while generating.", "Give a smaller `context_length`, or a smaller model."
            ) from error
        raise EngineError(
            f"The engine {call.running.engine} failed: {type(error).__name__}: {error}",
            "The text so far is in the error's partial_text.",
            partial_text=call.tracker.text,
        ) from error

    def cancel(self) -> None:
        """Ask the generation to end before its next engine call; the stream then ends with reason ``cancelled``.

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
        with self._guard, self._step_lock:
            self._end()

    def _end_unless_in_use(self) -> None:
        """End the stream; if another step is under way, that one ends it afterwards."""
        if self._step_lock.acquire(blocking=False):
            try:
                self._end()
            finally:
                self._step_lock.release()

    def _end(self) -> None:
        if self._state == "ended":
            return
        started = self._state == "running"
        self._state = "ended"
        # State and iterator change first, so that a second call does nothing even if closing the iterator fails.
        rounds, self._rounds = self._rounds, None
        close = getattr(rounds, "close", None)
        try:
            if close is not None:
                close()
        finally:
            # The result is made and the session's lock released even if the engine fails to close.
            if self._call.tracker.finish_reason is None:
                self._call.tracker.finish("cancelled")
            self._result = self._call.result()
            # Last: it releases the call lock, and another thread's call may start at once.
            if started:
                self._finished(self._call)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # ``__init__`` may have failed before it set the state. A stream that never ran holds nothing.
        if getattr(self, "_state", "ended") == "running":
            self.close()
