"""Two drafters: an assistant of adjustable quality, and a second model with a KV cache of its own."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polydraft.contract import Sampler

    from polydraft_reference.kv_cache import KVCache
    from polydraft_reference.model import ReferenceModel

__all__ = ["AssistantDrafter", "Drafter", "ModelDrafter"]

Array = npt.NDArray[Any]


class Drafter(ABC):
    """Drafts for one sequence: runs a model on its own choices, from the newest token on."""

    def __init__(self, model: ReferenceModel) -> None:
        self.model = model

    def draft(
        self, target_cache: KVCache, token_ids: Sequence[int], k: int, sampler: Sampler
    ) -> tuple[list[int], list[Array]]:
        """Draft k tokens.

        Args:
            target_cache: The target's KV cache, of all of ``token_ids`` but the last. It is not changed.
            token_ids: All tokens so far, the newest (chosen, not yet run) as the last.
            k: Number of drafts.
            sampler: Chooses the drafts, with the noise that the target's choices will have.

        Returns:
            The k drafts, and for each the logits it was chosen from, of shape (vocab,).
        """
        cache = self.cache_for(target_cache, token_ids)
        run_token_ids = [token_ids[-1]]
        rows = []
        for _ in range(k):
            newest = run_token_ids[-1]
            logits = self.model.logits(self.model.run(newest, cache), newest)
            token_id, logits = self.choose(logits, cache.length, run_token_ids, sampler)
            run_token_ids.append(token_id)
            rows.append(logits)
        self.rollback(target_cache.length)
        return run_token_ids[1:], rows

    def choose(self, logits: Array, position: int, run_token_ids: Sequence[int], sampler: Sampler) -> tuple[int, Array]:
        """The draft for ``position``, and the logits it was chosen from."""
        prefix = run_token_ids if sampler.needs_prefix else None
        return int(sampler.choose_draft(logits[None], position, prefix)[0]), logits

    @abstractmethod
    def cache_for(self, target_cache: KVCache, token_ids: Sequence[int]) -> KVCache:
        """A KV cache of all of ``token_ids`` but the last, which ``draft`` may write to."""

    @abstractmethod
    def rollback(self, length: int) -> None:
        """Forget what is stored of all but the first ``length`` tokens."""


class AssistantDrafter(Drafter):
    """Knows the target's choices, and is wrong on purpose at a set share of positions.

    Like a Gemma 4 assistant it has no KV cache and reads the target's: it runs the target on a scratch copy.

    Args:
        target: The target itself.
        agreement: Share of positions, 0 to 1, at which the draft is the target's choice.
        seed: Which positions these are.
    """

    def __init__(self, target: ReferenceModel, agreement: float, seed: int) -> None:
        super().__init__(target)
        self.agreement, self.seed = agreement, seed

    def choose(self, logits: Array, position: int, run_token_ids: Sequence[int], sampler: Sampler) -> tuple[int, Array]:
        """The target's choice; where it shall be wrong, what is chosen once that one is ruled out.

        So it is wrong under sampling as under greedy decoding.
        """
        choice, logits = super().choose(logits, position, run_token_ids, sampler)
        if self.agrees(position):
            return choice, logits
        others = logits.copy()
        others[choice] = -np.inf
        return super().choose(others, position, run_token_ids, sampler)

    def agrees(self, position: int) -> bool:
        """Whether the draft for an absolute position is the target's choice: a hash of seed and position decides."""
        digest = hashlib.blake2b(f"{self.seed}:{position}".encode(), digest_size=8).digest()
        return int.from_bytes(digest) < self.agreement * 2**64

    def cache_for(self, target_cache: KVCache, token_ids: Sequence[int]) -> KVCache:
        """A scratch copy of the target's."""
        return target_cache.copy()

    def rollback(self, length: int) -> None:
        """Nothing is stored."""


class ModelDrafter(Drafter):
    """A second, smaller model. Between drafts its KV cache holds nothing but tokens that the target has stored.

    Args:
        model: The draft model.
        slack: Rows that its cache must be able to roll back: at least k + 1.
    """

    def __init__(self, model: ReferenceModel, slack: int) -> None:
        super().__init__(model)
        self.cache = model.new_cache(slack)

    def cache_for(self, target_cache: KVCache, token_ids: Sequence[int]) -> KVCache:
        """Its own, once it has run what the target has stored since the last draft (at first the whole prompt)."""
        for token_id in token_ids[self.cache.length : target_cache.length]:
            self.model.run(token_id, self.cache)
        return self.cache

    def rollback(self, length: int) -> None:
        """Forget all but the first ``length`` tokens, if there are more."""
        self.cache.truncate(min(self.cache.length, length))
