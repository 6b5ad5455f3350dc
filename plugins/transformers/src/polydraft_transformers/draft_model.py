"""A second, smaller causal language model as the drafter, with a KV cache of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from polydraft.contract import Sampler

from polydraft_transformers.decoder import Decoder

__all__ = ["DraftModel"]


class DraftModel:
    """The drafter's side of one sequence. It catches up on tokens that it has not run yet.

    The same tokens may come with embeddings of two sizes, as sizes are padded. Ids that only the drafter has are never
    drafted; for one that only the target has, the drafter runs its own last token.

    Args:
        decoder: The draft model.
        chunk: Tokens run in one forward while catching up.
        vocab_size: The target's number of tokens.
    """

    def __init__(self, decoder: Decoder, chunk: int, vocab_size: int) -> None:
        self._decoder = decoder
        self._chunk = chunk
        self._vocab_size = vocab_size
        self._last = int(decoder.lm_head.weight.shape[0]) - 1
        self._cache = decoder.open_cache()
        self._run: list[int] = []

    def propose(
        self, token_ids: Sequence[int], k: int, sampler: Sampler, *, keep_logits: bool
    ) -> tuple[list[int], torch.Tensor | None]:
        """Draft k tokens after ``token_ids``, all of the sequence with its newest token."""
        self.rollback(self._agreed(token_ids))
        pending = list(token_ids[len(self._run) :])
        rows = self._decoder.step_rows
        while len(pending) > rows:
            chunk = min(self._chunk, len(pending) - 1)
            self._decoder.prefill(self._cache, self._known(pending[:chunk]))
            self._run.extend(pending[:chunk])
            pending = pending[chunk:]
        drafts: list[int] = []
        kept: list[torch.Tensor] = []
        for step in range(k):
            _, logits = self._decoder.step(self._cache, self._known(pending))
            self._run.extend(pending)
            logits = self._as_wide_as_the_targets(logits[-1:])
            run = [token_ids[-1], *drafts] if sampler.needs_prefix else None
            token = int(sampler.choose_draft(logits, len(token_ids) + step, run))
            drafts.append(token)
            pending = [token]
            if keep_logits:
                kept.append(logits.clone())
        return drafts, torch.cat(kept) if kept else None

    def rollback(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        if length < len(self._run):
            del self._run[length:]
            self._cache.rollback(length)

    def _known(self, token_ids: Sequence[int]) -> list[int]:
        return [min(token, self._last) for token in token_ids]

    def _as_wide_as_the_targets(self, row: torch.Tensor) -> torch.Tensor:
        lacking = self._vocab_size - row.shape[1]
        return torch.nn.functional.pad(row, (0, lacking), value=-torch.inf) if lacking else row

    def _agreed(self, token_ids: Sequence[int]) -> int:
        """How many of the tokens that were run stand in the sequence; at least one token is left to run."""
        agreed = min(len(self._run), len(token_ids) - 1)
        while agreed > 0 and self._run[agreed - 1] != token_ids[agreed - 1]:
            agreed -= 1
        return agreed

    def close(self) -> None:
        """Give the cache back."""
        self._decoder.give_back(self._cache)
