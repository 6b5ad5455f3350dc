"""One call in progress: what the engine reads and reports, and the result built from it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from polydraft.contract.results import Chunk, FinishReason, GenerationResult, GenerationStats, Round
from polydraft.errors import EngineError

if TYPE_CHECKING:
    from polydraft.contract.requests import OffReason, TokenRequest
    from polydraft.contract.results import RunningInfo, TokenLogprobs
    from polydraft.text._tracker import OutputTracker

__all__ = ["Call"]


class Call:
    """Implements ``polydraft.contract.Generation``.

    Args:
        request: The call in tokens.
        tracker: Gets every emitted token and decides when the output ends.
        running: Copied into the result.
        speculation_off: Why this call does not speculate; None if it does.
    """

    def __init__(
        self,
        request: TokenRequest,
        tracker: OutputTracker,
        running: RunningInfo,
        speculation_off: OffReason | None = None,
    ) -> None:
        self.request = request
        self.tracker = tracker
        self.running = running
        self.speculation_off = speculation_off
        self.counts = RoundCounts()
        self.logprobs: tuple[TokenLogprobs, ...] | None = None
        self._cancelled = threading.Event()

    def cancelled(self) -> bool:
        """Whether the caller has cancelled or closed the stream."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Ask the engine to stop, from any thread."""
        self._cancelled.set()

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens emitted so far."""
        return self.tracker.token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the output has ended; None until then."""
        return self.tracker.finish_reason

    @property
    def stop_match(self) -> str | int | None:
        """The stop string or token id that ended the output; None if something else ended it, and until then."""
        return self.tracker.stop_match

    def emit(
        self,
        token_ids: Sequence[int],
        *,
        num_draft_tokens: int | None,
        num_accepted_tokens: int | None,
        logprobs: Sequence[TokenLogprobs] | None = None,
        seconds: float | None = None,
    ) -> Round:
        """Push a round's tokens to the tracker; return the round, cut after the token that ends the output."""
        if self.finish_reason is not None:
            raise EngineError(
                "The engine emitted tokens after the end of the output.",
                "This is a defect of the backend; report it to its authors.",
            )
        accepted = num_accepted_tokens or 0
        kept = 0
        for index, token_id in enumerate(token_ids):
            kept += 1
            if self.tracker.push(token_id, is_draft=index < accepted) is not None:
                break
        return Round(
            token_ids=tuple(token_ids[:kept]),
            num_draft_tokens=num_draft_tokens,
            num_accepted_tokens=None if num_accepted_tokens is None else min(accepted, kept),
            logprobs=None if logprobs is None else tuple(logprobs[:kept]),
            seconds=seconds,
        )

    def report(self, stats: GenerationStats) -> None:
        """Use the engine's own statistics instead of those counted from rounds."""
        self.counts.reported = stats

    def count(self, emitted: Round, seconds: float) -> None:
        """Add a round that took ``seconds`` to the statistics and the log-probabilities."""
        self.counts.add(emitted, seconds)
        if emitted.logprobs is not None:
            self.logprobs = (self.logprobs or ()) + emitted.logprobs

    def chunk(self, emitted: Round, reason: FinishReason | None) -> Chunk:
        """The chunk of a round, with the text that became stable since the last one; all that is left if ``reason``."""
        delta = self.tracker.take() if reason is None else self.tracker.finish(reason)
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

    def result(self) -> GenerationResult:
        """The result of the tokens generated so far."""
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
            speculation_off=self.speculation_off,
        )


class RoundCounts:
    """Sums over the rounds of a call; ``reported`` replaces them if the engine counts by itself."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.num_rounds = 0
        self.num_drafts = 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0
        self.accepted_per_position: list[int] = []
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self.reported: GenerationStats | None = None
        self._known = True  # False once a round lacks its counts of drafts

    def add(self, emitted: Round, seconds: float) -> None:
        """Count one round that took ``seconds`` of the engine's time; the first one is prefill."""
        if self.num_rounds == 0:
            self.prefill_seconds = seconds
        else:
            self.decode_seconds += seconds
        self.num_rounds += 1
        self.num_tokens += len(emitted.token_ids)
        if emitted.num_draft_tokens is None or emitted.num_accepted_tokens is None:
            self._known = False
            return
        if emitted.num_draft_tokens:
            self.num_drafts += 1
            self.num_draft_tokens += emitted.num_draft_tokens
            self.num_accepted_tokens += emitted.num_accepted_tokens
            missing = emitted.num_draft_tokens - len(self.accepted_per_position)
            self.accepted_per_position.extend([0] * missing)
            for position in range(emitted.num_accepted_tokens):
                self.accepted_per_position[position] += 1

    def stats(self) -> GenerationStats:
        """The finished statistics."""
        if self.reported is not None:
            return self.reported
        if not self._known:
            return GenerationStats(
                num_tokens=self.num_tokens, prefill_seconds=self.prefill_seconds, decode_seconds=self.decode_seconds
            )
        return GenerationStats(
            num_tokens=self.num_tokens,
            num_target_steps=max(self.num_rounds - 1, 0),
            num_drafts=self.num_drafts,
            num_draft_tokens=self.num_draft_tokens,
            num_accepted_tokens=self.num_accepted_tokens,
            accepted_per_position=tuple(self.accepted_per_position),
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
        )
