"""One generation in progress: an iterator of chunks with a result at its end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Self

from polydraft.contract.results import Chunk, GenerationResult, Round
from polydraft.errors import EngineError, OutOfMemoryError, PolydraftError
from polydraft.loop.counts import RoundCounts
from polydraft.session.forks import HomeProcess
from polydraft.session.inside import Inside

if TYPE_CHECKING:
    from polydraft.contract.requests import OffReason, TokenRequest
    from polydraft.contract.results import RunningInfo, TokenLogprobs
    from polydraft.text.tracker import OutputTracker, TextDelta

__all__ = ["Generation", "TokenStream"]


class Generation:
    """The state of one call: what a backend's ``rounds`` reads and the stream reports.

    Attributes:
        request: The call in tokens.
        tracker: To be told each emitted token in order (``push``); says when to end.
        counts: Counts rounds by itself; an engine with statistics of its own sets ``counts.reported``.
        cancelled: Set when the caller has closed or cancelled; look at it between engine calls.
    """

    def __init__(
        self, request: TokenRequest, tracker: OutputTracker, running: RunningInfo, off: OffReason | None
    ) -> None:
        self.request = request
        self.tracker = tracker
        self.counts = RoundCounts()
        self.cancelled = threading.Event()
        self.running = running
        self.off = off
        self.logprobs: tuple[TokenLogprobs, ...] | None = None

    def result(self) -> GenerationResult:
        """The result of what was generated so far."""
        tracker = self.tracker
        return GenerationResult(
            text=tracker.text,
            raw_text=tracker.raw_text,
            token_ids=tracker.token_ids,
            prompt_token_ids=self.request.prompt_token_ids,
            finish_reason=tracker.finish_reason or "cancelled",
            stop_match=tracker.stop_match,
            thinking=tracker.thinking,
            tool_calls=tracker.tool_calls,
            logprobs=self.logprobs,
            settings=self.request.settings.model_copy(update={"seed": self.request.seed}),
            stats=self.counts.stats(),
            running=self.running,
            speculation_off=self.off,
        )


class TokenStream(Iterator[Chunk]):
    """Chunks of one generation, one a round. Also a context manager: leaving it cancels.

    ``cancel()`` may be called from any thread; ``close()`` ends it at once, and is what leaving a ``for`` loop early
    and dropping the stream comes to. ``result`` is there once the stream has ended, however it ended.
    """

    def __init__(
        self,
        generation: Generation,
        rounds: Callable[[Generation], Iterator[Round]],
        acquire: Callable[[Callable[[], bool]], bool],
        finished: Callable[[Generation], None],
        inside: Inside,
    ) -> None:
        self._generation = generation
        self._acquire = acquire
        self._finished = finished
        self._make_rounds = rounds
        self._rounds: Iterator[Round] | None = None
        self._state = "new"
        self._home = HomeProcess()
        self._inside = inside
        self._step_lock = threading.Lock()
        self._close_asked = False
        self._result: GenerationResult | None = None

    def use_slot(self, acquire: Callable[[Callable[[], bool]], bool]) -> None:
        """Replace how the stream takes its session's slot; for a driver that has taken it already.

        Args:
            acquire: Told how to learn that the call was cancelled while it waited; False: it was.
        """
        self._acquire = acquire

    @property
    def result(self) -> GenerationResult | None:
        """The result; None until the stream has ended."""
        return self._result

    @property
    def cancelled(self) -> bool:
        """Whether it was cancelled or closed."""
        return self._generation.cancelled.is_set()

    def start(self) -> None:
        """Hand the request to the engine without waiting for its first chunk; ``next`` does so otherwise."""
        with self._step():
            if self._state != "ended" and self._take_slot():
                self._open()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        with self._step():
            if self._state == "ended":
                raise StopIteration
            try:
                return self._advance()
            except BaseException:
                self._end()
                raise

    @contextmanager
    def _step(self) -> Iterator[None]:
        self._home.check()  # before the lock: another thread of the parent may hold it for ever
        self._inside.check()
        with self._inside.entered():
            try:
                with self._step_lock:
                    yield
            finally:
                if self._close_asked:  # meanwhile, by someone who could not wait
                    self._end_unless_in_use()

    def _take_slot(self) -> bool:
        """Begin; False if the call was cancelled before."""
        if self._state == "new":
            if self.cancelled or not self._acquire(self._generation.cancelled.is_set):
                return False
            self._state = "running"
        return True

    def _open(self) -> Iterator[Round]:
        if self._rounds is None:
            with self._typed_errors():
                self._rounds = self._make_rounds(self._generation)
        return self._rounds

    def _advance(self) -> Chunk:
        generation = self._generation
        emitted: Round | None = None
        taken = self._take_slot()
        started = time.perf_counter()  # waiting for other calls is no part of the prefill
        if taken:
            rounds = self._open()
            with self._typed_errors():
                emitted = next(rounds, None)
        if emitted is None:
            if generation.tracker.finish_reason is not None:
                raise StopIteration
            delta = generation.tracker.finish("cancelled")
            self._end()
            return _chunk(Round(token_ids=(), num_draft_tokens=0, num_accepted_tokens=0), delta, "cancelled")
        seconds = time.perf_counter() - started if emitted.seconds is None else emitted.seconds
        generation.counts.add(emitted, seconds)
        if emitted.logprobs is not None:
            generation.logprobs = (generation.logprobs or ()) + emitted.logprobs
        reason = generation.tracker.finish_reason or ("cancelled" if self._close_asked else None)
        delta = generation.tracker.take() if reason is None else generation.tracker.finish(reason)
        if reason is not None:
            self._end()
        return _chunk(emitted, delta, reason)

    @contextmanager
    def _typed_errors(self) -> Iterator[None]:
        """What an engine raises, as polydraft's errors with the text so far."""
        generation = self._generation
        try:
            yield
        except PolydraftError as error:
            if isinstance(error, EngineError) and not error.partial_text:
                error.partial_text = generation.tracker.text
            raise
        except MemoryError as error:
            raise OutOfMemoryError(
                "Memory ran out while generating.", "Give a smaller context_length, or a smaller model."
            ) from error
        except Exception as error:
            raise EngineError(
                f"The engine {generation.running.engine} failed: {type(error).__name__}: {error}",
                "The text so far is in the error's partial_text.",
                partial_text=generation.tracker.text,
            ) from error

    def cancel(self) -> None:
        """Ask the generation to end before its next engine call; the stream then ends with reason ``cancelled``.

        Raises:
            ForkedSessionError: The stream belongs to the parent process.
        """
        self._home.check()
        self._generation.cancelled.set()

    def close(self) -> None:
        """Cancel and free what the call holds. Waits only for an engine call under way in another thread.

        Called from inside a step of the session (a logits processor, a signal handler) it does not wait: the stream
        ends when its step is over. In a forked process it does nothing: what the stream holds is the parent's.
        """
        if not self._home.is_here:
            return
        self._generation.cancelled.set()
        if self._inside:
            self._close_asked = True
            self._end_unless_in_use()
            return
        with self._inside.entered(), self._step_lock:
            self._end()

    def _end_unless_in_use(self) -> None:
        """End the stream; whoever is stepping or ending it now does so afterwards."""
        if self._step_lock.acquire(blocking=False):
            try:
                self._end()
            finally:
                self._step_lock.release()

    def _end(self) -> None:
        if self._state == "ended":
            return
        began = self._state == "running"
        self._state = "ended"
        rounds, self._rounds = self._rounds, None
        close = getattr(rounds, "close", None)
        try:
            if close is not None:
                close()
        finally:
            if self._generation.tracker.finish_reason is None:
                self._generation.tracker.finish("cancelled")
            self._result = self._generation.result()
            if began:
                self._finished(self._generation)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_state", "ended") == "running":
            self.close()


def _chunk(emitted: Round, delta: TextDelta, reason: str | None) -> Chunk:
    return Chunk.model_construct(
        token_ids=emitted.token_ids,
        text=delta.text,
        num_accepted_tokens=emitted.num_accepted_tokens,
        num_draft_tokens=emitted.num_draft_tokens,
        segments=delta.segments,
        thinking=delta.thinking,
        tool_calls=delta.tool_calls,
        logprobs=emitted.logprobs,
        finish_reason=reason,
    )
