"""A second, smaller model as the drafter, with a context of its own that catches up with the sequence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from polydraft.contract import Sampler

from polydraft_llama_cpp.context import Context

__all__ = ["DraftModel"]


class DraftModel:
    """The drafter's side of the one sequence.

    Args:
        context: The draft model's; its sliding-window layers have caches of full length, as drafts go in one by one.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._run: list[int] = []

    def propose(
        self, token_ids: Sequence[int], k: int, sampler: Sampler, *, keep_logits: bool
    ) -> tuple[list[int], list[npt.NDArray[np.float32]]]:
        """Draft k tokens after ``token_ids``, all of the sequence with its newest token.

        Returns:
            The drafts, and with ``keep_logits`` their logits, k rows of shape (vocab,).
        """
        agreed = self._agreed(token_ids)
        if agreed < len(self._run):
            self._context.forget(agreed)
            del self._run[agreed:]
        pending = list(token_ids[agreed:])
        drafts: list[int] = []
        kept = []
        for step in range(k):
            self._forward(pending)
            logits = self._context.logits(1)
            if keep_logits:
                kept.append(logits[0].copy())
            known = [token_ids[-1], *drafts] if sampler.needs_prefix else None
            token = int(sampler.choose_draft(logits, len(token_ids) + step, known)[0])
            drafts.append(token)
            pending = [token]
        return drafts, kept

    def clear(self) -> None:
        """Begin a new sequence."""
        self._context.clear()
        self._run = []

    def free(self) -> None:
        """Free the context."""
        self._context.free()

    def _agreed(self, token_ids: Sequence[int]) -> int:
        """How many of the tokens that were run stand in the sequence; at least one token is left to run."""
        agreed = min(len(self._run), len(token_ids) - 1)
        while agreed > 0 and self._run[agreed - 1] != token_ids[agreed - 1]:
            agreed -= 1
        return agreed

    def _forward(self, token_ids: list[int]) -> None:
        for start in range(0, len(token_ids), self._context.n_batch):
            part = token_ids[start : start + self._context.n_batch]
            self._context.decode(part, len(self._run), all_rows=False)
            self._run.extend(part)
