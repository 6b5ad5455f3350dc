"""The one sequence on a loaded pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from polydraft.contract import EngineSequence, Proposal, Sampler, Step
from polydraft.errors import SessionClosedError

from polydraft_llama_cpp.context import Context
from polydraft_llama_cpp.draft_model import DraftModel
from polydraft_llama_cpp.mtp import MtpDrafter

__all__ = ["KeptLogits", "LlamaCppSequence"]


class KeptLogits:
    """Logits that were copied, as llama.cpp writes over its own at the next forward."""

    def __init__(self, rows: npt.NDArray[np.float32]) -> None:
        self._rows = rows

    def numpy(self) -> npt.NDArray[np.float32]:
        """The rows: float32, (rows, vocab)."""
        return self._rows


class LlamaCppSequence(EngineSequence):
    """See ``EngineSequence``.

    Args:
        target: The target's context, empty.
        drafter: The pair's drafter, or None.
        fixed_rows: For bitwise steps: the rows of every step, padded where fewer tokens are run; 0: no padding.
        closed: Called once, by ``close``.
    """

    def __init__(
        self, target: Context, drafter: MtpDrafter | DraftModel | None, fixed_rows: int, closed: Callable[[], None]
    ) -> None:
        self._target: Context | None = target
        self._drafter = drafter
        self._fixed_rows = fixed_rows
        self._closed = closed
        self._tokens: list[int] = []
        self._outputs = 0
        self._outputs_from = 0

    @property
    def length(self) -> int:
        """Tokens whose KV is stored."""
        return len(self._tokens)

    @property
    def _context(self) -> Context:
        if self._target is None:
            raise SessionClosedError("This sequence is closed.", "Open a new one.")
        return self._target

    def prefill(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        """Run the prompt in chunks of ``n_batch``."""
        context, tokens = self._context, list(token_ids)
        for start in range(0, len(tokens), context.n_batch):
            self.check_cancelled()
            part = tokens[start : start + context.n_batch]
            context.decode(part, start, all_rows=False)
            self._tokens.extend(part)
        self._outputs, self._outputs_from = 1, self.length - 1
        return self._choose(tokens[-1:], 1, sampler, keep_logits=keep_logits)

    def verify(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        """Run the newest token and the drafts in one forward."""
        context, tokens = self._context, list(token_ids)
        padding = max(0, self._fixed_rows - len(tokens))
        first = self.length
        # Copies of a real token: in a mixture of experts they need no others than it does.
        context.decode(tokens + tokens[-1:] * padding, first, all_rows=True)
        if padding:
            context.forget(first + len(tokens))
        self._tokens.extend(tokens)
        self._outputs, self._outputs_from = len(tokens) + padding, first
        return self._choose(tokens, len(tokens) + padding, sampler, keep_logits=keep_logits)

    def rollback(self, length: int) -> None:
        """Forget all but the first ``length`` tokens; a draft model does so when it drafts next."""
        if length < self.length:
            self._context.forget(length)
            del self._tokens[length:]

    def propose(self, newest: int, k: int, sampler: Sampler, *, keep_logits: bool = False) -> Proposal:
        """Draft with the pair's drafter."""
        context = self._context
        if self._drafter is None or k < 1:
            return Proposal([])
        if isinstance(self._drafter, DraftModel):
            drafts, kept = self._drafter.propose([*self._tokens, newest], k, sampler, keep_logits=keep_logits)
        else:
            row = self.length - 1 - self._outputs_from
            if not 0 <= row < self._outputs:
                return Proposal([])
            hidden = context.hidden(self._outputs)[row]
            drafts, kept = self._drafter.propose(hidden, newest, self.length, k, sampler, keep_logits=keep_logits)
        return Proposal(drafts, KeptLogits(np.stack(kept)) if kept else None)

    def close(self) -> None:
        """Give the context back."""
        if self._target is not None:
            self._target = None
            self._closed()

    def _choose(self, run: list[int], rows: int, sampler: Sampler, *, keep_logits: bool) -> Step:
        logits = self._context.logits(rows)[: len(run)]
        chosen, logprobs = sampler.choose(logits, self.length - len(run) + 1, run)
        return Step(chosen, KeptLogits(logits.copy()) if keep_logits else None, logprobs)
