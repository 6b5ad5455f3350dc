"""One call in progress: what the engine reads and reports, and the result built from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from polydraft._loop.returned import checked_count, checked_ids, checked_logprobs, checked_seconds, defect
from polydraft.contract.results import Chunk, FinishReason, GenerationResult, GenerationStats, Round
from polydraft.errors import NonFiniteLogitsError

if TYPE_CHECKING:
    from polydraft.contract.requests import OffReason, TokenRequest
    from polydraft.contract.results import EndReason, RunningInfo, TokenLogprobs
    from polydraft.text._tracker import OutputTracker

__all__ = ["Call"]


class Call:
    """Implements ``polydraft.contract.Generation``.

    Args:
        request: The call in tokens.
        tracker: Gets every emitted token and decides when the output ends.
        running: Copied into the result.
        speculation_off: Why this call does not speculate; None if it does.
        spells_ids: Whether ids that are not certain are shown: see ``Session.spells_ids``.
    """

    def __init__(
        self,
        request: TokenRequest,
        tracker: OutputTracker,
        running: RunningInfo,
        speculation_off: OffReason | None = None,
        *,
        spells_ids: bool = False,
    ) -> None:
        self.request = request
        self.tracker = tracker
        self.running = running
        self.speculation_off = speculation_off
        self.spells_ids = spells_ids
        self.certain_ids = True
        """Whether all ids emitted so far are known to be the engine's."""
        # Of each round: tokens, drafted and accepted tokens (None: not reported), seconds.
        self._rounds: list[tuple[int, int | None, int | None, float]] = []
        self._reported: GenerationStats | None = None
        self.num_reused_tokens: int | None = None
        """Tokens of the prompt that the engine did not run; None: it does not report them, or has not yet."""
        self._logprobs: list[TokenLogprobs] = []
        self._unread: Round | None = None  # emitted, and not yet yielded by the engine
        self._cancelled = False
        self._wake: Callable[[], object] | None = None

    def cancelled(self) -> bool:
        """Whether the caller has cancelled or closed the stream."""
        return self._cancelled

    def cancel(self) -> None:
        """Ask the engine to stop, from any thread."""
        self._cancelled = True
        if self._wake is not None:
            self._wake()

    def on_cancel(self, wake: Callable[[], object]) -> None:
        """Have ``wake`` called once the caller cancels: see ``Generation.on_cancel``."""
        self._wake = wake
        if self._cancelled:
            wake()

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
        draft_token_ids: Sequence[int] | None = None,
        logprobs: Sequence[TokenLogprobs] | None = None,
        seconds: float | None = None,
        certain_ids: bool = True,
    ) -> Round:
        """Push a round's tokens to the tracker; return the round, cut after the token that ends the output."""
        settings = self.request.settings
        if self.finish_reason is not None:
            raise defect("The engine emitted tokens after the end of the output.")
        if self._unread is not None:
            raise defect("The engine emitted a round before it yielded the last one.")
        drafted = checked_count(num_draft_tokens, "num_draft_tokens")
        reported = checked_count(num_accepted_tokens, "num_accepted_tokens")
        accepted = reported or 0
        if drafted is not None and accepted > drafted:
            raise defect(f"The engine reported {accepted} accepted tokens of {drafted} drafted ones.")
        if draft_token_ids is not None and len(draft_token_ids) != drafted:
            raise defect(f"The engine gave {len(draft_token_ids)} drafts and reported {drafted} drafted tokens.")
        unsound = None if logprobs is None else _first_unsound(logprobs)
        # One id after the other: what follows the end of the output is dropped, whatever it is.
        kept: list[int] = []
        left = len(token_ids) if self.tracker.text_only else settings.max_new_tokens - self.tracker.num_tokens
        for token_id in checked_ids(token_ids, left, self.tracker.vocab_size, "The engine emitted"):
            if len(kept) == unsound:
                position = len(self.request.prompt_token_ids) + self.tracker.num_tokens
                raise NonFiniteLogitsError.at(None, position, self.running.dtype)
            kept.append(token_id)
            # Accepted drafts come first, so the index decides where a token comes from.
            if self.tracker.push(token_id, is_draft=len(kept) <= accepted) is not None:
                break
        if not kept:
            raise defect("The engine emitted a round without tokens.")
        if logprobs is None and settings.logprobs is not None:
            raise defect("The engine gave no log-probabilities, which the request asks for.")
        self._unread = Round(
            token_ids=tuple(kept),
            certain_ids=certain_ids,
            num_draft_tokens=drafted,
            num_accepted_tokens=None if reported is None else min(accepted, len(kept)),
            draft_token_ids=None if draft_token_ids is None else tuple(draft_token_ids),
            logprobs=None if logprobs is None else checked_logprobs(logprobs, kept),
            seconds=checked_seconds(seconds),
        )
        self.certain_ids = self.certain_ids and certain_ids
        return self._unread

    def confirm_ids(self) -> None:
        """See ``Generation.confirm_ids``."""
        self.certain_ids = True

    def report_reused(self, num_tokens: int) -> None:
        """See ``Generation.report_reused``."""
        self.num_reused_tokens = checked_count(num_tokens, "report_reused()")
        size = len(self.request.prompt_token_ids)
        if (self.num_reused_tokens or 0) >= size:
            raise defect(f"The engine reused {self.num_reused_tokens} tokens of a prompt of {size}: one must be run.")

    def report(self, stats: GenerationStats) -> None:
        """Replace the statistics counted from rounds by the engine's own."""
        if not isinstance(stats, GenerationStats):
            raise defect(f"The engine reported a {type(stats).__name__} as statistics.")
        try:
            # Again: a record that was copied with changes has not been checked.
            self._reported = GenerationStats.model_validate(vars(stats), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            raise defect(f"The engine reported wrong statistics: {first['loc'][0]}: {first['msg']}.") from error

    def finish(self, reason: EndReason) -> None:
        """End the output of an engine that gives text alone."""
        if not self.tracker.text_only:
            raise defect("The engine ended the output by `Generation.finish`, and its tokens have to show the end.")
        self.tracker.finish_reason = self.finish_reason or reason

    def stats(self) -> GenerationStats:
        """The engine's own statistics, else those of the rounds so far; the emitted tokens are counted here."""
        if self.tracker.text_only and self._reported is not None:  # its tokens are not among what it gives
            return self._reported
        prompt = None if self.tracker.text_only else len(self.request.prompt_token_ids)
        if self._reported is None:
            return _stats(self._rounds, prompt, self.num_reused_tokens)
        counted: dict[str, Any] = {"num_tokens": self.tracker.num_tokens, "num_prompt_tokens": prompt}
        if self.num_reused_tokens is not None:
            counted["num_reused_tokens"] = self.num_reused_tokens
        return self._reported.model_copy(update=counted)

    def check_yielded(self, emitted: Round | None) -> None:
        """Check that the engine yielded the round that it emitted last; None: it has no more rounds.

        Raises:
            EngineError: It yielded something else, or ended before the output has ended.
        """
        unread, self._unread = self._unread, None
        if emitted is not None:
            if emitted is not unread:
                raise defect(f"The engine yielded a {type(emitted).__name__} that `Generation.emit` has not returned.")
        # A cancelled engine may drop what it has emitted.
        elif not self.cancelled():
            if unread is not None:
                raise defect("The engine emitted a round, and did not yield it.")
            if self.finish_reason is None:
                raise defect("The engine stopped before the end of the output.")

    def count(self, emitted: Round, seconds: float) -> None:
        """Add a round that took ``seconds`` to the statistics and the log-probabilities."""
        counted = len(emitted.token_ids), emitted.num_draft_tokens, emitted.num_accepted_tokens, seconds
        self._rounds.append(counted)
        self._logprobs += emitted.logprobs or ()

    def chunk(self, emitted: Round, reason: FinishReason | None) -> Chunk:
        """The chunk of a round, with the text that became stable since the last one; all that is left if ``reason``."""
        delta = self.tracker.take() if reason is None else self.tracker.finish(reason)
        return Chunk(
            token_ids=emitted.token_ids if emitted.certain_ids or self.spells_ids else None,
            num_accepted_tokens=emitted.num_accepted_tokens,
            num_draft_tokens=emitted.num_draft_tokens,
            draft_token_ids=emitted.draft_token_ids,
            logprobs=emitted.logprobs,
            finish_reason=reason,
            **delta._asdict(),
        )

    def stable_text(self) -> str:
        """The answer so far, without what may become part of a stop string or a character."""
        self.tracker.take()
        return self.tracker.text

    def end(self) -> None:
        """Release the text that was held back; without a reason until now, the output ends as ``cancelled``."""
        self.tracker.finish("cancelled")

    def result(self) -> GenerationResult:
        """The result of the tokens generated so far."""
        tracker = self.tracker
        return GenerationResult(
            text=tracker.text,
            raw_text=tracker.raw_text,
            token_ids=tracker.token_ids if self.certain_ids or self.spells_ids else None,
            certain_ids=self.certain_ids,
            prompt_token_ids=self.request.prompt_token_ids,
            segments=tracker.segments,
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


def _stats(
    rounds: Sequence[tuple[int, int | None, int | None, float]], prompt: int | None, reused: int | None
) -> GenerationStats:
    """Statistics of rounds, given as (tokens, drafted, accepted, seconds) of each; the first one is the prefill's."""
    measured: dict[str, Any] = {
        "num_prompt_tokens": prompt,
        "num_reused_tokens": reused,
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
        drafted_per_position=tuple(sum(drafted > index for drafted, _ in drafts) for index in range(longest)),
        **measured,
    )


def _first_unsound(logprobs: Any) -> int | None:
    """Index of the first log-probability that is NaN or +Inf, as NaN or +Inf in the logits make it; None without one.

    -Inf is the log-probability of a forced token. What is no log-probability at all is found by ``checked_logprobs``.
    """
    if not isinstance(logprobs, Sequence):
        return None
    values = (getattr(entry, "logprob", 0.0) for entry in logprobs)
    return next((at for at, value in enumerate(values) if isinstance(value, float) and not value < math.inf), None)
