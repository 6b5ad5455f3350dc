"""One call in progress: what the engine reads and reports, and the result built from it."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from polydraft.contract.results import Chunk, FinishReason, GenerationResult, GenerationStats, Round
from polydraft.errors import EngineError, NonFiniteLogitsError

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
        # Of each round: tokens, drafted and accepted tokens (None: not reported), seconds.
        self._rounds: list[tuple[int, int | None, int | None, float]] = []
        self._reported: GenerationStats | None = None
        self._logprobs: list[TokenLogprobs] = []
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
        unsound = next((index for index, entry in enumerate(logprobs or ()) if not entry.logprob < math.inf), None)
        for index, token_id in enumerate(token_ids):
            if index == unsound:
                # NaN or +Inf in the logits make it NaN. (-inf is the log-probability of a forced token.)
                position = len(self.request.prompt_token_ids) + len(self.token_ids)
                raise NonFiniteLogitsError.at(None, position, self.running.dtype)
            kept += 1
            # Accepted drafts come first, so the index decides where a token comes from.
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
        """Replace the statistics counted from rounds by the engine's own."""
        self._reported = stats

    def stats(self) -> GenerationStats:
        """The engine's own statistics, else those of the rounds so far."""
        return self._reported or _stats(self._rounds)

    def count(self, emitted: Round, seconds: float) -> None:
        """Add a round that took ``seconds`` to the statistics and the log-probabilities."""
        counted = len(emitted.token_ids), emitted.num_draft_tokens, emitted.num_accepted_tokens, seconds
        self._rounds.append(counted)
        self._logprobs += emitted.logprobs or ()

    def chunk(self, emitted: Round, reason: FinishReason | None) -> Chunk:
        """The chunk of a round, with the text that became stable since the last one; all that is left if ``reason``."""
        delta = self.tracker.take() if reason is None else self.tracker.finish(reason)
        # Without validation: all fields are made here, and this runs once per round.
        return Chunk.model_construct(
            token_ids=emitted.token_ids,
            num_accepted_tokens=emitted.num_accepted_tokens,
            num_draft_tokens=emitted.num_draft_tokens,
            logprobs=emitted.logprobs,
            finish_reason=reason,
            **delta._asdict(),
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
            logprobs=tuple(self._logprobs) or None,
            settings=self.request.settings.model_copy(update={"seed": self.request.seed}),
            stats=self.stats(),
            running=self.running,
            speculation_off=self.speculation_off,
        )


def _stats(rounds: Sequence[tuple[int, int | None, int | None, float]]) -> GenerationStats:
    """Statistics of rounds, given as (tokens, drafted, accepted, seconds) of each; the first one is the prefill's."""
    measured: dict[str, Any] = {
        "num_tokens": sum(tokens for tokens, *_ in rounds),
        "prefill_seconds": rounds[0][3] if rounds else 0.0,
        "decode_seconds": sum(seconds for *_, seconds in rounds[1:]),
    }
    counts = [(drafted, accepted) for _, drafted, accepted, _ in rounds if drafted is not None and accepted is not None]
    if len(counts) < len(rounds):
        return GenerationStats(**measured)  # the engine does not report all of them
    drafts = [(drafted, accepted) for drafted, accepted in counts if drafted]
    longest = max((drafted for drafted, _ in drafts), default=0)
    return GenerationStats(
        # The first round is the prefill, which is not a step of decoding.
        num_target_steps=max(len(rounds) - 1, 0),
        num_drafts=len(drafts),
        num_draft_tokens=sum(drafted for drafted, _ in drafts),
        num_accepted_tokens=sum(accepted for _, accepted in drafts),
        # Drafts are accepted from the front: position i counts in each draft with more than i accepted tokens.
        accepted_per_position=tuple(sum(accepted > index for _, accepted in drafts) for index in range(longest)),
        **measured,
    )
