"""Rows of tokens for training, and their attention masks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from .architectures import SLIDING_WINDOW, F, S
from .tokenizer import BOS

Masks = dict[str, torch.Tensor | None]


@dataclass
class Stream:
    """A sequence of tokens from which rows are cut at random; every row starts with `<bos>`."""

    tokens: torch.Tensor
    generator: torch.Generator

    @classmethod
    def of(cls, array: np.ndarray, device: str, seed: int) -> Stream:
        """The stream of a token array, on the device."""
        generator = torch.Generator().manual_seed(seed)
        return cls(torch.from_numpy(array.astype(np.int64)).to(device), generator)

    def rows(self, count: int, length: int) -> torch.Tensor:
        """Token ids (int64) of shape (count, length)."""
        starts = torch.randint(0, self.tokens.numel() - length, (count,), generator=self.generator)
        index = starts.to(self.tokens.device)[:, None] + torch.arange(length, device=self.tokens.device)
        rows = self.tokens[index]
        rows[:, 0] = BOS
        return rows


@lru_cache(maxsize=8)
def target_masks(length: int, device: str) -> Masks:
    """Masks per layer type, True where attended; None: causal."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    sliding = (distance >= 0) & (distance < SLIDING_WINDOW)
    return {F: None, S: sliding[None, None]}


@lru_cache(maxsize=8)
def drafter_masks(length: int, rows: int, device: str) -> dict[str, torch.Tensor]:
    """Masks per layer type for a drafter at positions p = 1..rows: True for the target's states before p."""
    query = torch.arange(1, rows + 1, device=device)[:, None]
    key = torch.arange(length, device=device)[None, :]
    full = key < query
    # Transformers counts the window from the last key, both ends included: one key more than in a causal layer.
    sliding = full & (query - 1 - key <= SLIDING_WINDOW)
    return {F: full[None, None], S: sliding[None, None]}
