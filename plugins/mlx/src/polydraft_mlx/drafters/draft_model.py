"""Drafting with a second, smaller model that has its own KV cache.

``polydraft.engine_parts.draft_model`` would wait for the device after each draft; here one wait ends a round of k
drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from polydraft.contract import Sampler

from polydraft_mlx.decoder import Decoder, widened
from polydraft_mlx.greedy import GreedyDrafts
from polydraft_mlx.resources import start

__all__ = ["DraftModel"]


class DraftModel:
    """The drafter's side of one sequence. Before it drafts, it runs the tokens that it has not run yet.

    Target and drafter with the same tokens may pad their embeddings to different sizes. Ids that only the drafter has
    are never drafted; in place of an id that only the target has, the drafter runs its own last one.

    Args:
        decoder: The draft model.
        chunk: Tokens per forward while it catches up.
        vocab_size: Number of the target's tokens.
    """

    def __init__(self, decoder: Decoder, chunk: int, vocab_size: int) -> None:
        self._decoder = decoder
        self._chunk = chunk
        self._vocab_size = vocab_size
        self.cache = decoder.new_cache()
        """The draft model's own."""
        self._run: list[int] = []
        self._shared = 0  # leading tokens that are known to be the sequence's, too

    def propose(
        self, token_ids: Sequence[int], k: int, sampler: Sampler, *, keep_logits: bool
    ) -> tuple[list[int], mx.array | None]:
        """Draft k tokens after ``token_ids``: all tokens of the sequence, the newest included."""
        agreed = self._agreed(token_ids)
        # KV of drafts that the target rejected, or of an earlier output that the prompt does not go on with.
        if agreed < self.cache.length:
            if not self.cache.reaches(agreed):
                agreed = 0
            self.cache.rollback(agreed)
        del self._run[agreed:]
        pending = list(token_ids[agreed:])
        last = self._decoder.vocab_size - 1
        runnable = [min(token, last) for token in pending]
        if len(pending) <= self._decoder.rows:
            _, logits = self._decoder.step(self.cache, mx.array([runnable]))
        else:
            _, logits = self._decoder.prefill(self.cache, runnable, self._chunk)
        self._run.extend(pending)
        drafts: list[mx.array] = []
        kept: list[mx.array] = []
        known = [token_ids[-1]]
        greedy = GreedyDrafts.of(sampler, len(token_ids))
        for step in range(k):
            if step:
                # The draft stays on the device. It exceeds ``last`` only if forced_token_ids demand it.
                token = drafts[-1] if last + 1 >= self._vocab_size else mx.minimum(drafts[-1], last)
                _, logits = self._decoder.step(self.cache, token[None])
            row = widened(logits[-1:], self._vocab_size)
            prefix = known if sampler.needs_prefix else None
            drafts.append(greedy.choose(row) if greedy else sampler.choose_draft(row, len(token_ids) + step, prefix))
            start(drafts[-1])
            if sampler.needs_prefix:
                known.append(int(drafts[-1]))
            if keep_logits:
                kept.append(row)
        found: Any = greedy.found(drafts) if greedy else mx.concatenate(drafts).tolist()
        self._shared = len(token_ids)
        # The last draft was chosen, but has not been run.
        self._run.extend(found[:-1])
        return found, mx.concatenate(kept) if kept else None

    def rollback(self, length: int) -> None:
        """The sequence keeps its first ``length`` tokens only."""
        self._shared = min(self._shared, length)

    def _agreed(self, token_ids: Sequence[int]) -> int:
        """How many of the tokens run are a prefix of the sequence; at least one token is left to run."""
        most = min(len(self._run), len(token_ids) - 1)
        # From the front: after plain rounds, a draft behind a wrong one may equal the token there by chance.
        agreed = min(self._shared, most)
        while agreed < most and self._run[agreed] == token_ids[agreed]:
            agreed += 1
        return agreed
