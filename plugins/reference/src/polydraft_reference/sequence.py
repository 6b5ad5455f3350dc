"""One sequence: the primitives that the core's speculative loop is built on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from polydraft.contract import EngineSequence, Proposal, RunningInfo, Sampler, Step
from polydraft.errors import EngineError
from polydraft.sampling.numpy_ops import NumpyLogits

from polydraft_reference.drafters.mtp import AssistantDrafter
from polydraft_reference.model import ReferenceModel

__all__ = ["Pair", "ReferenceSequence"]

Array = npt.NDArray[Any]


class Pair(Protocol):
    """The attributes that a sequence needs of the engine that opens it."""

    target: ReferenceModel
    drafter: AssistantDrafter | ReferenceModel | None
    running: RunningInfo


class ReferenceSequence(EngineSequence):
    """A KV cache of one model, and the tokens in it.

    Args:
        engine: The loaded pair; its assistant, if it has one, drafts.
        model: What is run: the target, unless a draft model is given.
    """

    def __init__(self, engine: Pair, model: ReferenceModel | None = None) -> None:
        self.engine = engine
        self.model = model or engine.target
        self.cache = self.model.new_cache(slack=engine.running.max_draft_tokens + 1)  # a whole step
        self.token_ids: list[int] = []
        self.closed = False

    @property
    def length(self) -> int:
        """Tokens stored."""
        return len(self.token_ids)

    def prefill(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        """Run the prompt, or the rest of it, row by row, as ``verify`` does."""
        if not token_ids:
            raise EngineError("Prefill takes at least one token.", "Give the prompt's.")
        return self.choose(self.run(token_ids)[-1:], token_ids[-1:], sampler, keep_logits)

    def verify(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        """Run the newest token and the drafts, and choose after each of them."""
        if not 1 <= len(token_ids) <= self.engine.running.max_draft_tokens + 1:
            raise EngineError(f"A step of {len(token_ids)} tokens was asked for.", "Give 1 to max_draft_tokens + 1.")
        return self.choose(self.run(token_ids), token_ids, sampler, keep_logits)

    def rollback(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        self.check_open()
        self.cache.truncate(length)
        del self.token_ids[length:]

    def propose(self, newest: int, k: int, sampler: Sampler, *, keep_logits: bool = False) -> Proposal:
        """Draft with the assistant. Drafts that would not fit into the context are left out."""
        self.check_open()
        running = self.engine.running
        k = min(k, running.max_draft_tokens, running.context_length - self.length)
        if not isinstance(self.engine.drafter, AssistantDrafter) or k < 1:
            return Proposal([])
        drafts, rows = self.engine.drafter.propose(self.cache, newest, k, sampler)
        return Proposal(drafts, NumpyLogits(np.stack(rows)) if keep_logits else None)

    def reusable(self, length: int) -> int:
        """All of it, unless a sliding layer cannot go back so far. Rows are run one by one, so bits are equal, too."""
        return length if self.cache.reaches(length) else 0

    @property
    def held_bytes(self) -> int:
        """Size of the KV cache."""
        return sum(layer.num_bytes for layer in self.cache.layers)

    def close(self) -> None:
        """Free the KV cache; a closed sequence can only be closed again."""
        self.closed = True
        self.cache.layers.clear()

    def run(self, token_ids: Sequence[int]) -> Array:
        """Run tokens after the stored ones, row by row; returns their logits, shape (rows, vocab)."""
        self.check_open()
        if self.length + len(token_ids) > self.engine.running.context_length:
            raise EngineError("The context is full.", f"It holds {self.engine.running.context_length} tokens.")
        if not all(0 <= token_id < self.model.config.vocab_size for token_id in token_ids):
            raise EngineError("A token id is not in the vocabulary.", "Use ids of this model's tokenizer.")
        rows = [self.run_row(token_id) for token_id in token_ids]
        self.token_ids += token_ids
        return np.stack(rows)

    def run_row(self, token_id: int) -> Array:
        """Run one token; returns its logits, shape (vocab,)."""
        return self.model.logits(self.model.run(token_id, self.cache), token_id)

    def choose(self, logits: Array, token_ids: Sequence[int], sampler: Sampler, keep_logits: bool) -> Step:
        """Choose the tokens after ``token_ids``, which have just been run, one per row of ``logits``."""
        chosen, logprobs = sampler.choose(logits, self.length - len(token_ids) + 1, token_ids)
        return Step(chosen, NumpyLogits(logits) if keep_logits else None, logprobs)

    def check_open(self) -> None:
        """Raise EngineError after ``close``."""
        if self.closed:
            raise EngineError("The sequence is closed.", "Open a new one.")
