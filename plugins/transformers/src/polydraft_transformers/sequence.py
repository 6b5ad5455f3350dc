"""One sequence on a loaded pair."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from polydraft.contract import Chooser, EngineSequence, Proposal, Step
from polydraft.errors import OutOfMemoryError

from polydraft_transformers.decoder import Decoder
from polydraft_transformers.draft_model import DraftModel
from polydraft_transformers.mtp import MtpDrafter

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
        self._cache = target.new_cache()
        self._tokens: list[int] = []
        self._hidden: torch.Tensor | None = None
        self._hidden_from = 0

    @property
    def length(self) -> int:
        """Tokens whose KV is stored."""
        return self._cache.length

    def prefill(self, token_ids: Sequence[int], chooser: Chooser, *, keep_logits: bool = False) -> Step:
        """Run the prompt in chunks."""
        tokens = list(token_ids)
        try:
            with self._lock, torch.inference_mode():
                for start in range(0, len(tokens), self._chunk):
                    self._forward(tokens[start : start + self._chunk])
                assert self._hidden is not None
                return self._choose(self._hidden[0, -1:], tokens[-1:], chooser, keep_logits=keep_logits)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"Memory ran out while a prompt of {len(tokens)} tokens was run.",
                "Give a smaller context_length, or a shorter prompt.",
            ) from error

    def verify(self, token_ids: Sequence[int], chooser: Chooser, *, keep_logits: bool = False) -> Step:
        """Run the newest token and the drafts in one forward."""
        tokens = list(token_ids)
        with self._lock, torch.inference_mode():
            self._forward(tokens)
            assert self._hidden is not None
            return self._choose(self._hidden[0], tokens, chooser, keep_logits=keep_logits)

    def rollback(self, length: int) -> None:
        """Forget all but the first ``length`` tokens; a draft model does so when it drafts next."""
        self._cache.rollback(length)
        del self._tokens[length:]

    def propose(self, newest: int, k: int, chooser: Chooser, *, keep_logits: bool = False) -> Proposal:
        """Draft with the pair's drafter."""
        if self._drafter is None or k < 1:
            return Proposal([])
        with self._lock, torch.inference_mode():
            if isinstance(self._drafter, DraftModel):
                drafts, logits = self._drafter.propose([*self._tokens, newest], k, chooser, keep_logits=keep_logits)
            else:
                row = self.length - 1 - self._hidden_from
                if self._hidden is None or not 0 <= row < self._hidden.shape[1]:
                    return Proposal([])
                drafts, logits = self._drafter.propose(
                    self._cache, self._hidden[:, row : row + 1], newest, k, chooser, keep_logits=keep_logits
                )
        return Proposal(drafts, None if logits is None else TorchLogits(logits))

    def close(self) -> None:
        """Free the buffers."""
        self._cache = self._target.new_cache()
        self._tokens = []
        self._hidden = None
        self._drafter = None

    def _forward(self, token_ids: list[int]) -> None:
        self._hidden_from = self._cache.length
        self._hidden = self._target.forward(self._cache, token_ids)
        self._tokens.extend(token_ids)

    def _choose(self, hidden: torch.Tensor, run: list[int], chooser: Chooser, *, keep_logits: bool) -> Step:
        logits: Any = self._target.logits(hidden)
        chosen, logprobs = chooser.choose(logits, self._cache.length - len(run) + 1, run)
        return Step(chosen, TorchLogits(logits) if keep_logits else None, logprobs)
