"""Boolean attention masks for blocks of new tokens after stored ones. True: may attend."""

from __future__ import annotations

import torch

__all__ = ["block_mask"]


def block_mask(stored: int, count: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """The mask of ``count`` new tokens after ``stored`` ones, for the rows that ``KvCache.update`` returns.

    A token attends to itself and to those before it; with a window, to ``window`` of them, itself included
    (``sliding_window_overlay`` in Transformers' masking_utils.py).

    Returns:
        Shape (1, 1, count, rows), or None where a single token attends to all rows.
    """
    if count == 1:
        return None
    rows = count + (stored if window is None else min(stored, window - 1))
    query = torch.arange(rows - count, rows, device=device)[:, None]
    key = torch.arange(rows, device=device)[None, :]
    mask = key <= query
    if window is not None:
        mask = mask & (key > query - window)
    return mask[None, None]
