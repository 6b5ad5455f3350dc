"""An engine in a worker, as the app's session sees it: a whole engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from polydraft._workers.failures import error_of
from polydraft._workers.logs import levels_here, replay_warning
from polydraft._workers.messages import Cancel, Credit, Ended, Generate, Loaded, RoundDone, Warned
from polydraft._workers.process import Inbox, WorkerProcess
from polydraft._workers.tokenizer import tokenizer_of
from polydraft.contract.requests import OffReason
from polydraft.contract.results import Round, TokenLogprobs
from polydraft.contract.whole import WholeEngine
from polydraft.errors import SessionClosedError

if TYPE_CHECKING:
    from polydraft.contract.requests import GenerationSettings, TokenRequest
    from polydraft.contract.whole import Generation

__all__ = ["ROOM", "WorkerEngine"]

ROOM = 16
"""Rounds of a call that a worker may be ahead of the reader. Enough to hide the pipe; what a cancelled call has
computed in vain, and what waits in memory for a slow reader, stays small."""
_WAKE = "cancelled"


class WorkerEngine(WholeEngine):
    """A loaded pair in a worker process.

    Args:
        worker: The process; the engine closes it.
        loaded: What it said at load.
        reason: Why it is a process of its own, one sentence.
    """

    def __init__(self, worker: WorkerProcess, loaded: Loaded, reason: str) -> None:
        self._worker = worker
        self._checks_settings = loaded.checks_settings
        self.picks_k = loaded.picks_k
        self.shared_sequences = loaded.shared_sequences
        self.shows_logits = loaded.shows_logits
        """Whether ``measure_tie`` can be asked: a stepping engine whose logits can be read is in the worker."""
        self._levels = levels_here()
        self.tokenizer = tokenizer_of(worker, loaded.tokenizer)
        told = {"process": "worker", "process_reason": reason, "process_id": worker.pid}
        notes = (*loaded.running.notes, *loaded.notes)
        self.running = loaded.running.model_copy(update={**told, "notes": notes})

    def rounds(self, generation: Generation) -> Iterator[Round]:
        """Hand the request to the worker at once, and return its rounds."""
        return _Rounds(self._worker, generation, self._changed_levels())

    def _changed_levels(self) -> dict[str, int] | None:
        """Levels of the app's loggers, if they have changed since the worker was told."""
        levels = levels_here()
        if levels == self._levels:
            return None
        self._levels = levels
        return levels

    def check_settings(self, settings: GenerationSettings) -> None:
        """Ask a whole engine in the worker whether it refuses them; a stepping engine takes all but some ``guided``."""
        if self._checks_settings or settings.guided is not None:
            self._worker.ask("check_settings", {"settings": settings.model_dump(mode="json")})

    def speculation_conflict(self, settings: GenerationSettings) -> OffReason | None:
        """Ask a whole engine in the worker; a stepping engine speculates with all settings."""
        if not self._checks_settings:
            return None
        found = self._worker.ask("speculation_conflict", {"settings": settings.model_dump(mode="json")}).value
        return None if found is None else OffReason.model_validate(found)

    def measure_tie(self, request: TokenRequest, **rest: Any) -> Any:
        """``polydraft.verification.measure_tie`` where the logits are; its ``Tie`` as data. ``rest``: JSON-ready."""
        return self._worker.ask(
            "measure_tie", {"request": request.model_dump(mode="json"), **rest}, doing="in scoring an output again"
        ).value

    def memory(self) -> dict[str, int]:
        """Memory of the worker in bytes: ``resident`` now and ``peak`` so far, where the system tells them."""
        found: dict[str, int] = self._worker.ask("memory").value
        return found

    def close(self) -> None:
        """Free the engine and end the worker. May be called twice."""
        self._worker.close()


class _Rounds(Iterator[Round]):
    """The rounds of one call. Not a generator: ``close`` must cancel the call even if no round was read."""

    def __init__(self, worker: WorkerProcess, generation: Generation, levels: dict[str, int] | None) -> None:
        self._worker = worker
        self._generation = generation
        self._inbox = inbox = Inbox()
        self._taken = 0
        self._over = False

        def make(call: int) -> Generate:
            return Generate(
                call=call, request=generation.request, off=generation.speculation_off, room=ROOM, levels=levels
            )

        self._call = worker.begin(make, self._inbox)
        generation.on_cancel(lambda: inbox.put(_WAKE))

    def __next__(self) -> Round:
        while not self._over and not self._generation.cancelled():
            message = self._inbox.get()
            if isinstance(message, RoundDone):
                return self._emit(message)
            self._heed(message)
        self.close()
        raise StopIteration

    def _emit(self, done: RoundDone) -> Round:
        if done.stats is not None:
            self._generation.report(done.stats)
        if done.reused is not None:
            self._generation.report_reused(done.reused)
        emitted = self._generation.emit(
            done.token_ids,
            num_draft_tokens=done.drafted,
            num_accepted_tokens=done.accepted,
            draft_token_ids=done.drafts,
            logprobs=None if done.logprobs is None else [_logprobs(*entry) for entry in done.logprobs],
            seconds=done.seconds,
            certain_ids=done.certain,
        )
        if done.all_certain:
            self._generation.confirm_ids()
        self._taken += 1
        if done.last:
            self._over = True
            self._worker.forget(self._call)
        elif self._taken == ROOM // 2:
            self._worker.send(Credit(call=self._call, rounds=self._taken))
            self._taken = 0
        return emitted

    def _heed(self, message: Any) -> None:
        """What is no round: a warning, the end, an error, the worker's death (None)."""
        if isinstance(message, Warned):
            replay_warning(message)
        elif isinstance(message, Ended):
            self._over = True
            if message.error is not None:
                raise error_of(message.error)
            if message.stats is not None:
                self._generation.report(message.stats)
            if message.finish is not None:
                self._generation.finish(message.finish)
        elif message is None:
            self._over = True
            self._worker.check_alive("while it generated")
            raise SessionClosedError("This engine is closed.", "Load a new session with polydraft.load.")

    def close(self) -> None:
        """End the call, without waiting for the worker."""
        if not self._over:
            self._over = True
            self._worker.forget(self._call)
            self._worker.send(Cancel(call=self._call))


def _logprobs(token_id: int, logprob: float, top: tuple[tuple[int, float], ...]) -> TokenLogprobs:
    return TokenLogprobs(token_id=token_id, logprob=logprob, top=top)
