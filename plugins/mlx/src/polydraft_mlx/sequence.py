"""One sequence on a loaded pair, and its logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from polydraft.contract import EngineSequence, Proposal, Sampler, Step

from polydraft_mlx.decoder import Decoder
from polydraft_mlx.drafters.draft_model import DraftModel
from polydraft_mlx.drafters.mtp import MtpDrafter
from polydraft_mlx.greedy import greedy_choice
from polydraft_mlx.resources import Runtime

__all__ = ["MlxLogits", "MlxSequence"]

_PLAIN_FIRST = 2
"""Steps of plain decoding in a row before one runs ahead: a round without drafts may be one among others."""


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


@dataclass(slots=True)
class _Running:
    """A step that MLX computes."""

    sampler: Sampler
    hidden: mx.array | None
    logits: mx.array
    largest: mx.array
    """Of each row the largest logit, (rows,)."""
    chosen: mx.array | None
    """What each row chooses, (rows,); None if the host has to choose."""
    token_ids: list[int] = field(default_factory=list)
    """What it runs, once the host knows."""

    def is_of(self, token_ids: list[int], sampler: Sampler) -> bool:
        """Whether it runs these tokens for this generation."""
        return self.sampler is sampler and self.token_ids == token_ids


class MlxSequence(EngineSequence):
    """The target's KV cache and tokens, and the drafter's side of the sequence.

    In plain decoding at temperature 0, MLX has the next step before the host reads what the last one chooses. If that
    step is then not asked for, it is forgotten: rows of the cache beyond ``length`` hold nothing. Rounds with drafts do
    not run ahead: MLX takes a step only as fast as it computes it, so that drafting would seem to take the whole round.

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
        self._ahead: _Running | None = None
        self._plain = 0  # steps of plain decoding in a row
        self._sound = True  # no step that was forgotten may have left NaN

    @property
    def length(self) -> int:
        """Tokens whose KV is stored."""
        return len(self._tokens)

    def prefill(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        """Run the prompt, or the rest of it, in chunks."""
        with self._runtime.use(f"A prompt of {len(token_ids)} tokens was run"):
            self._forget()
            self._hidden, logits = self._target.prefill(self._cache, token_ids, self._chunk, self.check_cancelled)
            # A prefill returns the last token's hidden row only.
            self._hidden_from = self._cache.length - 1
            self._tokens += token_ids
            chosen, logprobs = sampler.choose(logits, self.length, self._tokens[-1:])
            # Most of it has been evaluated; not the rows of the KV on which no chosen token depends.
            mx.eval(self._cache.state)
            return Step(chosen, MlxLogits(logits) if keep_logits else None, logprobs)

    def verify(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        """Run the newest token and the drafts in one forward."""
        run = list(token_ids)
        with self._runtime.use(f"A step at position {self.length} was run"):
            running = self._ahead
            if running is None or not running.is_of(run, sampler):
                self._forget()
                running = self._launched(mx.array([run]), sampler)
            self._ahead = None
            self._hidden, self._hidden_from = running.hidden, self.length
            self._tokens += run
            self._plain = self._plain + 1 if len(run) == 1 else 0
            if self._plain > _PLAIN_FIRST and running.chosen is not None:
                self._ahead = self._launched(running.chosen[None], sampler)
            chosen, logprobs = self._choose(running, run)
            if self._ahead is not None:
                self._ahead.token_ids = chosen
            return Step(chosen, MlxLogits(running.logits) if keep_logits else None, logprobs)

    def rollback(self, length: int) -> None:
        """Forget all but the first ``length`` tokens; a draft model does so when it drafts next."""
        if length < self.length:
            self._forget()
            self._cache.rollback(length)
            del self._tokens[length:]
        if length == 0 and not self._sound:
            self._cache, self._sound = self._target.new_cache(), True
        if isinstance(self._drafter, DraftModel):
            self._drafter.rollback(length)

    def propose(self, newest: int, k: int, sampler: Sampler, *, keep_logits: bool = False) -> Proposal:
        """Draft with the pair's drafter."""
        self._plain = 0
        if self._drafter is None or k < 1:
            return Proposal([])
        with self._runtime.use(f"{k} tokens were drafted at position {self.length}"):
            self._forget()
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
        self._forget()
        if self._target.fixed:
            # Not the last token of a prompt, which may have run alone.
            length = (length - 1) // self._chunk * self._chunk
        return length if self._sound and self._cache.reaches(length) else 0

    @property
    def held_bytes(self) -> int:
        """Size of the buffers, a draft model's included."""
        caches = [self._cache, self._drafter.cache] if isinstance(self._drafter, DraftModel) else [self._cache]
        return sum(buffer.nbytes for cache in caches for buffer in cache.state)

    def close(self) -> None:
        """Free the buffers."""
        self._forget()
        self._cache = self._target.new_cache()
        self._tokens = []
        self._hidden = None
        self._drafter = None

    def _launched(self, tokens: mx.array, sampler: Sampler) -> _Running:
        """A step of tokens (1, count) after all that the cache stores, which MLX begins to compute."""
        greedy = greedy_choice(sampler, self._cache.length + 1) is not None
        hidden, logits = self._target.step(self._cache, tokens)
        chosen = mx.argmax(logits, axis=-1) if greedy else None
        running = _Running(sampler, hidden, logits, logits.max(axis=-1), chosen)
        # The cache, too: no choice depends on the last layers' KV of all rows.
        mx.async_eval(logits if chosen is None else chosen, running.largest, *self._cache.state)
        return running

    def _choose(self, running: _Running, run: list[int]) -> tuple[list[int], Any]:
        """Wait for what a step chooses."""
        position = self.length - len(run) + 1
        choice = greedy_choice(running.sampler, position)
        if choice is not None and running.chosen is not None:
            both: Any = zip(running.chosen.tolist(), running.largest.tolist(), strict=True)
            token_ids = [token_id if math.isfinite(value) else -1 for token_id, value in both]
            # The sampler refuses a single row that is not sound.
            if token_ids != [-1]:
                return choice.chosen(token_ids, position, run), None
        return running.sampler.choose(running.logits, position, run)

    def _forget(self) -> None:
        """Wait for a step that has run ahead, and go back before it."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return
        self._cache.rollback(len(self._tokens))
        # Without the lock, for which closing must not wait: of what has been launched, reading only waits for it.
        largest: Any = ahead.largest.tolist()
        self._sound = self._sound and all(map(math.isfinite, largest))
