"""The toy assistant: a drafter without a KV cache, as good or bad as its config says."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from polydraft.contract import Sampler

from polydraft_reference.kv_cache import KVCache
from polydraft_reference.model import ReferenceModel

__all__ = ["AssistantDrafter"]

Array = npt.NDArray[Any]


class AssistantDrafter:
    """Knows the target's choices, and is deliberately wrong at a given share of positions.

    Like a Gemma 4 assistant it reads the target's KV cache: it runs the target on a scratch copy. It has no state, so
    all sequences share it.

    Args:
        target: The target itself.
        agreement: Share of positions, 0 to 1, at which the draft is the target's choice.
        seed: Decides which positions these are.
    """

    def __init__(self, target: ReferenceModel, agreement: float, seed: int) -> None:
        self.target, self.agreement, self.seed = target, agreement, seed

    def propose(self, cache: KVCache, newest: int, k: int, sampler: Sampler) -> tuple[list[int], list[Array]]:
        """Draft k tokens.

        Args:
            cache: The target's KV cache, of all tokens before ``newest``. It is not changed.
            newest: The token at position ``cache.length``: chosen, not yet run.
            k: Number of drafts.
            sampler: Chooses the drafts, with the noise that the target's choices will use.

        Returns:
            The k drafts, and for each the logits it was chosen from, shape (vocab,).
        """
        # Drafts must not appear in the target's cache: the copy takes their rows.
        scratch = cache.copy()
        run, rows = [newest], []
        for _ in range(k):
            logits = self.target.logits(self.target.run(run[-1], scratch), run[-1])
            draft = self._choose(logits, scratch.length, run, sampler)
            if not self._agrees(scratch.length):
                # Ruling out the target's choice is wrong when sampling, too: the noise stays the same.
                logits[draft] = -np.inf
                draft = self._choose(logits, scratch.length, run, sampler)
            run.append(draft)
            rows.append(logits)
        return run[1:], rows

    @staticmethod
    def _choose(logits: Array, position: int, run: Sequence[int], sampler: Sampler) -> int:
        return int(sampler.choose_draft(logits[None], position, run if sampler.needs_prefix else None)[0])

    def _agrees(self, position: int) -> bool:
        """Whether the draft for an absolute position is the target's choice: a hash of seed and position decides."""
        digest = hashlib.blake2b(f"{self.seed}:{position}".encode(), digest_size=8).digest()
        return int.from_bytes(digest) < self.agreement * 2**64
