"""One sequence on a loaded pair, and its logits."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from polydraft.contract import EngineSequence, Proposal, Sampler, Step

from polydraft_mlx.decoder import Decoder
from polydraft_mlx.drafters.draft_model import DraftModel
from polydraft_mlx.drafters.mtp import MtpDrafter
from polydraft_mlx.resources import Runtime

__all__ = ["MlxLogits", "MlxSequence"]


class MlxLogits:
    """Logits in MLX's memory, as a ``polydraft.contract.LogitsHandle``.

    Args:
        logits: Shape (rows, vocab); evaluated here.
    """

    def __init__(self, logits: mx.array) -> None:
        self._logits = logits.astype(mx.float32)
        mx.eval(self._logits)

    def numpy(self) -> npt.NDArray[np.float32]:
        """Copy to the host: float32, (rows, vocab)."""
        return np.array(self._logits)


class MlxSequence(EngineSequence):
    """The target's KV cache and tokens, and the drafter's side of the sequence.

    Args:
        runtime: Device and stream.
        target: The target.
        drafter: The pair's MTP drafter, or a draft model's side of this sequence, or None.
        chunk: Prompt tokens per forward.
    """

    def __init__(self, runtime: Runtime, target: Decoder, drafter: MtpDrafter | DraftModel | None, chunk: int) -> None:
        self._runtime = runtime
        self._target = target
        self._drafter = drafter
        self._chunk = chunk
        self._cache = target.new_cache()
        self._tokens: list[int] = []
        self._hidden: mx.array | None = None
        self._hidden_from = 0

    @property
    def length(self) -> int:
        """Tokens whose KV is stored."""
        return self._cache.length

    def prefill(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        """Run the prompt, or the rest of it, in chunks."""
        with self._runtime.use(f"A prompt of {len(token_ids)} tokens was run"):
            self._hidden, logits = self._target.prefill(self._cache, token_ids, self._chunk, self.check_cancelled)
            # A prefill returns the last token's hidden row only.
            self._hidden_from = self._cache.length - 1
            self._tokens += token_ids
            return self._choose(logits, self._tokens[-1:], sampler, keep_logits=keep_logits)

    def verify(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        """Run the newest token and the drafts in one forward."""
        with self._runtime.use(f"A step at position {self.length} was run"):
            self._hidden_from = self._cache.length
            self._hidden, logits = self._target.step(self._cache, mx.array([list(token_ids)]))
            self._tokens.extend(token_ids)
            return self._choose(logits, token_ids, sampler, keep_logits=keep_logits)

    def rollback(self, length: int) -> None:
        """Forget all but the first ``length`` tokens; a draft model does so when it drafts next."""
        self._cache.rollback(length)
        del self._tokens[length:]
        if isinstance(self._drafter, DraftModel):
            self._drafter.rollback(length)

    def propose(self, newest: int, k: int, sampler: Sampler, *, keep_logits: bool = False) -> Proposal:
        """Draft with the pair's drafter."""
        if self._drafter is None or k < 1:
            return Proposal([])
        with self._runtime.use(f"{k} tokens were drafted at position {self.length}"):
            if isinstance(self._drafter, DraftModel):
                drafts, logits = self._drafter.propose([*self._tokens, newest], k, sampler, keep_logits=keep_logits)
            else:
                # The last accepted token's row; rows after it are those of rejected drafts.
                row = self.length - 1 - self._hidden_from
                if self._hidden is None or not 0 <= row < self._hidden.shape[1]:
                    return Proposal([])
                drafts, logits = self._drafter.propose(
                    self._cache, self._hidden[:, row : row + 1], newest, k, sampler, keep_logits=keep_logits
                )
            return Proposal(drafts, None if logits is None else MlxLogits(logits))

    def reusable(self, length: int) -> int:
        """All of it, where sliding layers can go back so far; with fixed steps, as many as were run in full chunks."""
        if self._target.fixed:
            # Not the last token of a prompt, which may have run alone.
            length = (length - 1) // self._chunk * self._chunk
        return length if self._cache.reaches(length) else 0

    @property
    def held_bytes(self) -> int:
        """Size of the buffers, a draft model's included."""
        caches = [self._cache, self._drafter.cache] if isinstance(self._drafter, DraftModel) else [self._cache]
        return sum(buffer.nbytes for cache in caches for buffer in cache.state)

    def close(self) -> None:
        """Free the buffers."""
        self._cache = self._target.new_cache()
        self._tokens = []
        self._hidden = None
        self._drafter = None

    def _choose(self, logits: mx.array, run: Sequence[int], sampler: Sampler, *, keep_logits: bool) -> Step:
        chosen, logprobs = sampler.choose(logits, self._cache.length - len(run) + 1, run)
        # Most of it has been evaluated; not the rows of the KV on which no chosen token depends.
        mx.eval(self._cache.state)
        return Step(chosen, MlxLogits(logits) if keep_logits else None, logprobs)
