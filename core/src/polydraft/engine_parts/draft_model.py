"""A draft model as a second sequence: an engine that can run a target can run its draft model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from polydraft.contract.stepping import EngineSequence, LogitsHandle, Proposal, Sampler, Step

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from polydraft.contract.results import TokenLogprobs

__all__ = ["DraftModelSequence"]


class DraftModelSequence(EngineSequence):
    """The target's sequence, and a draft model's sequence of the same tokens that drafts for it.

    The draft model runs the prompt when it drafts for the first time. When it drafts again, it first rolls back to the
    tokens that it shares with the target, and runs those that it has not run: the newest one, and before it the last
    draft if all drafts were accepted. Each draft costs one step of the draft model, and one wait for its choice.

    Args:
        target: Verifies.
        draft: Drafts; its logits have as many columns as the target's. Both are closed with this sequence.
        step_rows: Maximum number of tokens per ``draft.verify``, at least 2.
    """

    def __init__(self, target: EngineSequence, draft: EngineSequence, step_rows: int) -> None:
        self.target = target
        self.draft = draft
        self._step_rows = step_rows
        self._tokens: list[int] = []  # stored by the target
        self._drafted: list[int] = []  # stored by the draft model
        self._shared = 0  # leading tokens that both have stored
        self._continued = False  # whether the draft model goes on with a kept sequence when it drafts next

    @property
    def length(self) -> int:
        """Number of tokens whose KV the target stores."""
        return self.target.length

    def prefill(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        """Run the prompt, or the rest of it, on the target only."""
        self.target.cancelled = self.cancelled
        step = self.target.prefill(token_ids, sampler, keep_logits=keep_logits)
        if self._tokens and self._drafted:
            # The draft model goes back now, while it can; where it cannot go far enough, it starts anew.
            self._shared = self.draft.reusable(self._shared)
            self.draft.rollback(self._shared)
            del self._drafted[self._shared :]
            self._continued = True
        self._tokens += token_ids
        return step

    def verify(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        """Run the newest token and the drafts on the target only."""
        step = self.target.verify(token_ids, sampler, keep_logits=keep_logits)
        for token_id in token_ids:
            position = len(self._tokens)
            # A draft that the target runs now is stored by the draft model already.
            if self._shared == position < len(self._drafted) and self._drafted[position] == token_id:
                self._shared += 1
            self._tokens.append(token_id)
        return step

    def rollback(self, length: int) -> None:
        """Forget all but the first ``length`` tokens; the draft model does so when it drafts next."""
        self.target.rollback(length)
        del self._tokens[length:]
        self._shared = min(self._shared, length)

    def propose(self, newest: int, k: int, sampler: Sampler, *, keep_logits: bool = False) -> Proposal:
        """Draft k tokens, one step of the draft model each."""
        if k < 1:
            return Proposal([])
        # Rejected drafts are still stored by the draft model; they go only now that it runs again.
        if self._shared < len(self._drafted):
            self.draft.rollback(self._shared)
            del self._drafted[self._shared :]
        drafting = _DraftSampler(sampler, newest)
        pending = [*self._tokens[self._shared :], newest]
        logits: list[LogitsHandle] = []
        while len(drafting.drafts) < k:
            prefills = self._continued or not self._drafted
            self._continued = False
            # Plain steps leave more than one step's tokens behind: nothing is drafted until all of them are run.
            run = pending if prefills else pending[: self._step_rows]
            pending = pending[len(run) :]
            # Only the step that ends with the newest token, or with a draft, is followed by a draft.
            drafting.chooses = not pending
            step = (self.draft.prefill if prefills else self.draft.verify)(
                run, drafting, keep_logits=keep_logits and drafting.chooses
            )
            self._drafted += run
            if drafting.chooses:
                pending = drafting.drafts[-1:]
            if step.logits is not None:
                logits.append(step.logits)
        # The newest token and the drafts are shared only once the target has run them.
        self._shared = len(self._tokens)
        return Proposal(drafting.drafts, _LastRows(logits) if keep_logits else None)

    def reusable(self, length: int) -> int:
        """As many tokens as the target's sequence can reuse; the draft model catches up."""
        reuses = not self._drafted or type(self.draft).reusable is not EngineSequence.reusable
        return self.target.reusable(length) if reuses else 0

    @property
    def held_bytes(self) -> int:
        """Of both sequences."""
        return self.target.held_bytes + self.draft.held_bytes

    def park(self) -> None:
        """Park both sequences; one that has never run goes on as it is."""
        self.target.park()
        if self._drafted:
            self.draft.park()

    def close(self) -> None:
        """Close both sequences; the draft model's even if the target's fails to close."""
        try:
            self.target.close()
        finally:
            self.draft.close()


class _DraftSampler:
    """Chooses the draft model's tokens as drafts: with the noise of the target's choice at that position."""

    def __init__(self, sampler: Sampler, newest: int) -> None:
        self._sampler = sampler
        self._newest = newest
        self.drafts: list[int] = []
        """The drafts of this round so far."""
        self.chooses = True
        """Whether the last row of the step is followed by a draft."""

    @property
    def needs_prefix(self) -> bool:
        """Whether a draft depends on the tokens before it."""
        return self._sampler.needs_prefix

    def choose(
        self, logits: Any, first_position: int, run_token_ids: Sequence[int], *, keep_logprobs: bool = True
    ) -> tuple[list[int], tuple[TokenLogprobs, ...] | None]:
        """A draft from the last row of ``logits`` (rows, vocab); other rows give 0, which is never read."""
        rows = logits.shape[0]
        chosen = [0] * rows
        if self.chooses:
            prefix = [self._newest, *self.drafts] if self.needs_prefix else None
            draft = self._sampler.choose_draft(logits[rows - 1 :], first_position + rows - 1, prefix)
            # Waits for the device: the next step needs the id on the host.
            chosen[-1] = int(draft[0])
            self.drafts.append(chosen[-1])
        return chosen, None

    def choose_draft(self, logits: Any, position: int, run_token_ids: Sequence[int] | None = None) -> Any:
        """As the sampler that it wraps, for a draft model that has a drafter itself."""
        return self._sampler.choose_draft(logits, position, run_token_ids)


class _LastRows:
    """The last row of each step, as one handle."""

    def __init__(self, steps: Sequence[LogitsHandle]) -> None:
        self._steps = steps

    def numpy(self) -> npt.NDArray[np.float32]:
        """Copy to the host: float32, shape (drafts, vocab)."""
        return np.concatenate([step.numpy()[-1:] for step in self._steps])
