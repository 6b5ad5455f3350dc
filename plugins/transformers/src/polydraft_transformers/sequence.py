"""One sequence on a loaded pair."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from polydraft.contract import EngineSequence, Proposal, Sampler, Step

from polydraft_transformers.decoder import Decoder
from polydraft_transformers.draft_model import DraftModel
from polydraft_transformers.kv_cache import KvCache
from polydraft_transformers.mtp import MtpDrafter
from polydraft_transformers.resources import memory_errors

__all__ = ["TorchLogits", "TransformersSequence"]


class TorchLogits:
    """Logits where torch keeps them."""

    def __init__(self, logits: torch.Tensor) -> None:
        self._logits = logits

    def numpy(self) -> npt.NDArray[np.float32]:
        """Copy to the host: float32, (rows, vocab)."""
        copied: npt.NDArray[np.float32] = self._logits.detach().float().cpu().numpy().copy()
        return copied


class TransformersSequence(EngineSequence):
    """See ``EngineSequence``.

    Args:
        target: The target.
        drafter: The pair's MTP drafter, or the draft model's side of this sequence, or None.
        chunk: Prompt tokens run in one forward.
        lock: Held during forwards.
    """

    def __init__(
        self, target: Decoder, drafter: MtpDrafter | DraftModel | None, chunk: int, lock: threading.Lock
    ) -> None:
        self._target = target
        self._drafter = drafter
        self._chunk = chunk
        self._lock = lock
        self._cache: KvCache | None = target.open_cache()
        self._tokens: list[int] = []
        self._hidden: torch.Tensor | None = None
        self._hidden_from = 0
        self._sound = True

    @property
    def cache(self) -> KvCache:
        """The target's KV; not after ``close``."""
        assert self._cache is not None
        return self._cache

    @property
    def length(self) -> int:
        """Tokens whose KV is stored."""
        return self.cache.length

    def prefill(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        """Run the prompt in chunks."""
        tokens = list(token_ids)
        for start in range(0, len(tokens), self._chunk):
            self.check_cancelled()
            with self._running(f"a prompt of {len(tokens)} tokens was run"):
                self._hidden_from = self.length
                self._hidden = self._target.prefill(self.cache, tokens[start : start + self._chunk])
        self._tokens.extend(tokens)
        with self._running("the first token was chosen"):
            assert self._hidden is not None
            logits = self._target.logits(self._hidden[-1:])
            return self._choose([logits], len(tokens), tokens[-1:], sampler, keep_logits=keep_logits)

    def verify(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        """Run the newest token and the drafts in one forward (two where a fixed step may not cross a border)."""
        tokens = list(token_ids)
        with self._running("drafts were verified"):
            first = self._hidden_from = self.length
            hidden: list[torch.Tensor] = []
            logits: list[torch.Tensor] = []
            for part in self._target.parts(first, tokens):
                rows, scores = self._target.step(self.cache, part, self._target.rows_for(len(tokens)))
                hidden.append(rows)
                logits.append(scores)
                if len(part) < len(tokens):  # the next part may overwrite them
                    hidden[-1], logits[-1] = rows.clone(), scores.clone()
            self._hidden = torch.cat(hidden) if len(hidden) > 1 else hidden[0]
            self._tokens.extend(tokens)
            return self._choose(logits, first + 1, tokens, sampler, keep_logits=keep_logits)

    def rollback(self, length: int) -> None:
        """Forget all but the first ``length`` tokens; a draft model does so when it drafts next."""
        self.cache.rollback(length)
        del self._tokens[length:]

    def propose(self, newest: int, k: int, sampler: Sampler, *, keep_logits: bool = False) -> Proposal:
        """Draft with the pair's drafter."""
        if self._drafter is None or k < 1:
            return Proposal([])
        with self._running("tokens were drafted"):
            if isinstance(self._drafter, DraftModel):
                drafts, logits = self._drafter.propose([*self._tokens, newest], k, sampler, keep_logits=keep_logits)
            else:
                row = self.length - 1 - self._hidden_from
                if self._hidden is None or not 0 <= row < self._hidden.shape[0]:
                    return Proposal([])
                drafts, logits = self._drafter.propose(
                    self.cache, self._hidden[row : row + 1], newest, k, sampler, keep_logits=keep_logits
                )
        return Proposal(drafts, None if logits is None else TorchLogits(logits))

    def close(self) -> None:
        """Give the buffers back."""
        cache, self._cache = self._cache, None
        if cache is None:
            return
        if self._sound:
            self._target.give_back(cache)
            if isinstance(self._drafter, DraftModel):
                self._drafter.close()
        self._tokens = []
        self._hidden = None
        self._drafter = None

    @contextmanager
    def _running(self, what: str) -> Iterator[None]:
        """Run the models: one at a time, and never again with a cache in which one failed."""
        try:
            with self._lock, torch.inference_mode(), memory_errors(what, "Give a smaller context_length or prompt."):
                yield
        except BaseException:
            self._sound = False
            raise

    @staticmethod
    def _choose(logits: list[torch.Tensor], first: int, run: list[int], sampler: Sampler, *, keep_logits: bool) -> Step:
        joined = torch.cat(logits) if len(logits) > 1 else logits[0]
        chosen, logprobs = sampler.choose(joined, first, run)
        return Step(chosen, TorchLogits(joined.clone()) if keep_logits else None, logprobs)
