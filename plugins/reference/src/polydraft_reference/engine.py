"""The stepping engine: the few primitives that the core's speculative loop is built on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from polydraft.contract import (
    EngineSequence,
    Proposal,
    RunningInfo,
    Sampler,
    Step,
    SteppingEngine,
)
from polydraft.errors import EngineError

from polydraft_reference.config import AssistantConfig
from polydraft_reference.drafters import AssistantDrafter, Drafter, ModelDrafter
from polydraft_reference.model import ReferenceModel
from polydraft_reference.tokenizer import ByteTokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["NumpyLogits", "ReferenceEngine", "ReferenceSequence"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class NumpyLogits:
    """Logits of one step: implements ``polydraft.contract.LogitsHandle``.

    Args:
        array: Shape (rows, vocab), float32 or float64.
    """

    array: Array

    def numpy(self) -> npt.NDArray[np.float32]:
        """A float32 copy of shape (rows, vocab)."""
        return self.array.astype(np.float32)


class ReferenceEngine(SteppingEngine):
    """A toy target with its drafter.

    Args:
        target: The target.
        drafter: What drafts: an assistant's config, a draft model, or None (n-grams, plain decoding).
        running: What runs: k and the context's length are read from it.
    """

    sequence_class: type[ReferenceSequence]
    """What ``open_sequence`` makes; tests put a subclass with a defect here."""

    def __init__(
        self,
        target: ReferenceModel,
        drafter: AssistantConfig | ReferenceModel | None,
        running: RunningInfo,
    ) -> None:
        self.tokenizer = ByteTokenizer()
        self.target = target
        self.drafter = drafter
        self.running = running

    @property
    def max_draft_tokens(self) -> int:
        """k_max."""
        return self.running.num_speculative_tokens

    @property
    def rollback_slack(self) -> int:
        """Rows that every KV cache can roll back: a whole step."""
        return self.max_draft_tokens + 1

    def new_drafter(self) -> Drafter | None:
        """A drafter for one sequence."""
        if isinstance(self.drafter, AssistantConfig):
            return AssistantDrafter(self.target, self.drafter.agreement, self.drafter.seed)
        if isinstance(self.drafter, ReferenceModel):
            return ModelDrafter(self.drafter, self.rollback_slack)
        return None

    def open_sequence(self) -> ReferenceSequence:
        """A new, empty sequence. Several may be used at once, each by one thread."""
        return self.sequence_class(self)

    def close(self) -> None:
        """Nothing to free: memory goes with the last reference."""


class ReferenceSequence(EngineSequence):
    """One sequence: the target's KV cache, the tokens in it, and a drafter."""

    def __init__(self, engine: ReferenceEngine) -> None:
        self.engine = engine
        self.cache = engine.target.new_cache(engine.rollback_slack)
        self.drafter = engine.new_drafter()
        self.token_ids: list[int] = []
        self.closed = False

    @property
    def length(self) -> int:
        """Tokens stored."""
        return len(self.token_ids)

    def prefill(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        """See ``EngineSequence.prefill``."""
        if self.token_ids or not token_ids:
            raise EngineError("Prefill takes at least one token and an empty sequence.", "Open a new sequence.")
        return self.choose(self.run(token_ids)[-1:], token_ids[-1:], sampler, keep_logits)

    def verify(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        """See ``EngineSequence.verify``."""
        if not 1 <= len(token_ids) <= self.engine.max_draft_tokens + 1:
            raise EngineError(f"A step of {len(token_ids)} tokens was asked for.", "Give 1 to max_draft_tokens + 1.")
        return self.choose(self.run(token_ids), token_ids, sampler, keep_logits)

    def rollback(self, length: int) -> None:
        """See ``EngineSequence.rollback``."""
        self.check_open()
        self.cache.truncate(length)
        if self.drafter:
            self.drafter.rollback(length)
        del self.token_ids[length:]

    def propose(self, newest: int, k: int, sampler: Sampler, *, keep_logits: bool = False) -> Proposal:
        """See ``EngineSequence.propose``. Drafts that would not fit into the context are left out."""
        self.check_open()
        k = min(k, self.engine.max_draft_tokens, self.engine.running.context_length - self.length)
        if self.drafter is None or k < 1:
            return Proposal([])
        drafts, rows = self.drafter.draft(self.cache, [*self.token_ids, newest], k, sampler)
        return Proposal(drafts, NumpyLogits(np.stack(rows)) if keep_logits else None)

    def close(self) -> None:
        """Free the KV cache; a closed sequence can only be closed again."""
        self.closed = True
        self.cache.layers.clear()

    def run(self, token_ids: Sequence[int]) -> Array:
        """Run tokens after the stored ones, row by row; returns their logits, of shape (rows, vocab)."""
        self.check_open()
        if self.length + len(token_ids) > self.engine.running.context_length:
            raise EngineError("The context is full.", f"It holds {self.engine.running.context_length} tokens.")
        if not all(0 <= token_id < self.engine.target.config.vocab_size for token_id in token_ids):
            raise EngineError("A token id is not in the vocabulary.", "Use ids of this model's tokenizer.")
        rows = [self.run_row(token_id) for token_id in token_ids]
        self.token_ids += token_ids
        return np.stack(rows)

    def run_row(self, token_id: int) -> Array:
        """Run one token through the target; returns its logits, of shape (vocab,)."""
        target = self.engine.target
        return target.logits(target.run(token_id, self.cache), token_id)

    def choose(self, logits: Array, token_ids: Sequence[int], sampler: Sampler, keep_logits: bool) -> Step:
        """The target's tokens after ``token_ids``, which have just been run, one a row of ``logits``."""
        chosen, logprobs = sampler.choose(logits, self.length - len(token_ids) + 1, token_ids)
        return Step(chosen, NumpyLogits(logits) if keep_logits else None, logprobs)

    def check_open(self) -> None:
        """Raise EngineError after ``close``."""
        if self.closed:
            raise EngineError("The sequence is closed.", "Open a new one.")


ReferenceEngine.sequence_class = ReferenceSequence
