"""The sequence in one llama.cpp context: a target's, or a draft model's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from polydraft.contract import EngineSequence, Proposal, Sampler, Step
from polydraft.errors import SessionClosedError
from polydraft.sampling.numpy_ops import NumpyLogits

from polydraft_llama_cpp.context import Context
from polydraft_llama_cpp.drafters.mtp import MtpDrafter

__all__ = ["LlamaCppSequence"]


class LlamaCppSequence(EngineSequence):
    """The one sequence that a context holds.

    Args:
        context: An empty context.
        mtp: The MTP drafter that shares its memory, or None.
        fixed_rows: For bitwise steps: the rows of every step, padded where fewer tokens are run; 0: no padding.
        on_close: Called once, by ``close``, with whether the cache may hold NaN.
    """

    def __init__(
        self,
        context: Context,
        mtp: MtpDrafter | None = None,
        fixed_rows: int = 0,
        on_close: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self._open_context: Context | None = context
        self._mtp = mtp
        self._fixed_rows = fixed_rows
        self._on_close = on_close
        self._length = 0
        self._spoilt = False
        # The rows that the last forward gave, and the position of the token that the first of them ran.
        self._outputs = 0
        self._outputs_from = 0

    @property
    def length(self) -> int:
        """Number of tokens whose KV is stored."""
        return self._length

    @property
    def _context(self) -> Context:
        if self._open_context is None:
            raise SessionClosedError("This sequence is closed.", "Open a new one.")
        return self._open_context

    def prefill(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        """Run the prompt, or the rest of it, in chunks of ``n_batch`` tokens; only the last token gives logits."""
        context, tokens = self._context, list(token_ids)
        for start in range(0, len(tokens), context.n_batch):
            self.check_cancelled()
            part = tokens[start : start + context.n_batch]
            context.decode(part, self._length, all_rows=False)
            self._length += len(part)
        # Only the last token of the last chunk has a row.
        self._outputs, self._outputs_from = 1, self._length - 1
        return self._choose(tokens[-1:], 1, sampler, keep_logits=keep_logits)

    def verify(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        """Run the newest token and the drafts in one forward."""
        context, first, rows = self._context, self._length, max(len(token_ids), self._fixed_rows)
        # Padding repeats a real token: in a mixture of experts it needs the same experts as that token.
        padding = [token_ids[-1]] * (rows - len(token_ids))
        context.decode([*token_ids, *padding], first, all_rows=True)
        self._length += len(token_ids)
        # The padding's KV was stored, too.
        if padding:
            context.forget(self._length)
        self._outputs, self._outputs_from = rows, first
        return self._choose(token_ids, rows, sampler, keep_logits=keep_logits)

    def rollback(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        if length < self._length:
            self._context.forget(length)
            self._length = length

    def reusable(self, length: int) -> int:
        """All of it, where the cache can go back so far; with fixed steps, as many as were run in full chunks."""
        if self._spoilt:
            return 0
        if self._fixed_rows:
            length -= length % self._context.n_batch
            # In cells that have been used again the order of the tokens is another one, and so is that of the sums.
            return length if self._context.first_position == 0 else 0
        if length == self._length:
            return length
        return length if self._context.reaches(length) and not self._context.model.is_recurrent else 0

    def propose(self, newest: int, k: int, sampler: Sampler, *, keep_logits: bool = False) -> Proposal:
        """Draft k tokens with the MTP drafter; none without one, or if the last forward gave no row to draft from."""
        context = self._context
        row = self._length - 1 - self._outputs_from
        if self._mtp is None or k < 1 or not 0 <= row < self._outputs:
            return Proposal([])
        # Shape (hidden_size,): the row of the token before ``newest``.
        hidden = context.hidden(self._outputs)[row]
        drafts, kept = self._mtp.propose(hidden, newest, self._length, k, sampler, keep_logits=keep_logits)
        return Proposal(drafts, NumpyLogits(np.stack(kept)) if kept else None)

    def close(self) -> None:
        """Give the context back."""
        if self._open_context is not None:
            self._open_context = None
            self._on_close(self._spoilt)

    def _choose(self, run: Sequence[int], rows: int, sampler: Sampler, *, keep_logits: bool) -> Step:
        logits = self._context.logits(rows)[: len(run)]  # without the rows of the padding
        spoilt, self._spoilt = self._spoilt, True  # if this raises
        # Row i chooses the token at the position after ``run[i]``.
        chosen, logprobs = sampler.choose(logits, self._length - len(run) + 1, run)
        # -1: a row from which no token can be chosen.
        self._spoilt = spoilt or min(chosen) < 0
        # A copy: llama.cpp overwrites its own at the next forward.
        return Step(chosen, NumpyLogits(logits.copy()) if keep_logits else None, logprobs)
