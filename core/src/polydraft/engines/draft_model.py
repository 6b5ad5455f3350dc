"""A draft model as a second sequence: what an engine has to do for it is done by the sequences it has already."""

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
    """The target's sequence, with a draft model's sequence of the same tokens that drafts for it.

    The draft model runs the prompt when it drafts for the first time. After a round it rolls back to what it shares
    with the target, and runs the tokens that it lacks: the newest one, and the last draft if all were accepted.

    Args:
        target: Verifies.
        draft: Drafts. Both are closed with this sequence.
        step_rows: The most tokens that one ``draft.verify`` takes, at least 2.
    """

    def __init__(self, target: EngineSequence, draft: EngineSequence, step_rows: int) -> None:
        self.target = target
        self.draft = draft
        self._step_rows = step_rows
        self._tokens: list[int] = []  # stored by the target
        self._drafted: list[int] = []  # stored by the draft model

    @property
    def length(self) -> int:
        """Number of tokens whose KV the target stores."""
        return self.target.length

    def prefill(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        """Run the prompt on the target."""
        self.target.cancelled = self.cancelled
        step = self.target.prefill(token_ids, sampler, keep_logits=keep_logits)
        self._tokens = list(token_ids)
        return step

    def verify(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        """Run the newest token and the drafts on the target."""
        step = self.target.verify(token_ids, sampler, keep_logits=keep_logits)
        self._tokens.extend(token_ids)
        return step

    def rollback(self, length: int) -> None:
        """Forget all but the first ``length`` tokens; the draft model does so when it drafts next."""
        self.target.rollback(length)
        del self._tokens[length:]

    def propose(self, newest: int, k: int, sampler: Sampler, *, keep_logits: bool = False) -> Proposal:
        """Draft k tokens, one step of the draft model each."""
        if k < 1:
            return Proposal([])
        pending = self._catch_up([*self._tokens, newest])
        drafting = _DraftSampler(sampler, newest)
        logits: list[LogitsHandle] = []
        for _ in range(k):
            run = self.draft.verify if self._drafted else self.draft.prefill
            step = run(pending, drafting, keep_logits=keep_logits)
            self._drafted.extend(pending)
            pending = step.token_ids[-1:]
            drafting.drafts += pending
            if step.logits is not None:
                logits.append(step.logits)
        return Proposal(drafting.drafts, _LastRows(logits) if keep_logits else None)

    def _catch_up(self, tokens: list[int]) -> list[int]:
        """Bring the draft model to a prefix of ``tokens``, and return the others: what its next step runs.

        These are all of them before the first draft, and one or two after a round.
        """
        shared = min(len(self._drafted), len(tokens) - 1)
        while shared > 0 and self._drafted[shared - 1] != tokens[shared - 1]:
            shared -= 1
        if shared < len(self._drafted):
            self.draft.rollback(shared)
            del self._drafted[shared:]
        while self._drafted and len(tokens) - len(self._drafted) > self._step_rows:
            behind = tokens[len(self._drafted) :][: self._step_rows]
            self.draft.verify(behind, _Unread())
            self._drafted.extend(behind)
        return tokens[len(self._drafted) :]

    def close(self) -> None:
        """Close both sequences."""
        self.target.close()
        self.draft.close()


class _DraftSampler:
    """Chooses the draft model's tokens as drafts: with the noise of the target's choice at that position."""

    def __init__(self, sampler: Sampler, newest: int) -> None:
        self._sampler = sampler
        self._newest = newest
        self.drafts: list[int] = []
        """The drafts of this round so far."""

    @property
    def needs_prefix(self) -> bool:
        """Whether a draft depends on the tokens before it."""
        return self._sampler.needs_prefix

    def choose(
        self, logits: Any, first_position: int, run_token_ids: Sequence[int], *, keep_logprobs: bool = True
    ) -> tuple[list[int], tuple[TokenLogprobs, ...] | None]:
        """A draft from the last row of ``logits`` (rows, vocab); the choices of other rows are never read."""
        last = logits.shape[0] - 1
        run = [self._newest, *self.drafts] if self.needs_prefix else None
        draft = self._sampler.choose_draft(logits[last:], first_position + last, run)
        return [*([0] * last), int(draft[0])], None

    def choose_draft(self, logits: Any, position: int, run_token_ids: Sequence[int] | None = None) -> Any:
        """As the sampler that it wraps."""
        return self._sampler.choose_draft(logits, position, run_token_ids)


class _Unread:
    """Stands for a sampler where nothing is drafted from the rows: plain steps came before."""

    needs_prefix = False

    def choose(
        self, logits: Any, first_position: int, run_token_ids: Sequence[int], *, keep_logprobs: bool = True
    ) -> tuple[list[int], tuple[TokenLogprobs, ...] | None]:
        """Token 0 for each row of ``logits`` (rows, vocab)."""
        return [0] * logits.shape[0], None

    def choose_draft(self, logits: Any, position: int, run_token_ids: Sequence[int] | None = None) -> Any:
        """The first column."""
        return logits[:, 0]


class _LastRows:
    """The last row of each step, as one handle."""

    def __init__(self, steps: Sequence[LogitsHandle]) -> None:
        self._steps = steps

    def numpy(self) -> npt.NDArray[np.float32]:
        """Copy to the host: float32, shape (drafts, vocab)."""
        return np.concatenate([step.numpy()[-1:] for step in self._steps])
