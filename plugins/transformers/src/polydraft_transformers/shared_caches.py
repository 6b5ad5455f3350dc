"""The KV caches of several sequences whose rows run in one step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polydraft_transformers.kv_cache import KvCache, StepLayout

__all__ = ["SharedCaches"]


class SharedCaches:
    """What a network's layers take for a cache where each sequence has as many rows, one sequence after the other.

    Kernels find keys and values by a table on the device: what has been recorded with it runs for other sequences, too,
    once it ``points_at`` theirs.

    Args:
        caches: Of the sequences; a cache may come several times if its rows are the same each time.
    """

    def __init__(self, caches: Sequence[KvCache]) -> None:
        first = caches[0]
        self._windows, self._ring = first.windows, first.ring
        self._table = None if first.masked else torch.stack([cache.table() for cache in caches], 1)
        self._made = [cache.made for cache in caches]
        self.each = tuple(caches) if first.masked else ()
        """The caches, where layers need them: a table does not keep closed ones alive."""
        self.layout: StepLayout

    def point_at(self, caches: Sequence[KvCache]) -> None:
        """Run for these sequences from now on: as many as there were."""
        if self._table is None:
            self.each = tuple(caches)
        elif (made := [cache.made for cache in caches]) != self._made:
            torch.stack([cache.table() for cache in caches], 1, out=self._table)
            self._made = made

    def begin_step(self, positions: Tensor, slots: Tensor | None = None) -> None:
        """Lay out the step that follows: as ``KvCache.begin_step``, for the rows of all sequences."""
        if self._table is not None:
            ring = None if slots is None else slots % self._ring
            self.layout = StepLayout(positions, 0, {}, 1 if slots is None else 0, slots, ring)
            return
        rows = len(positions) // len(self.each)
        for index, cache in enumerate(self.each):
            own = slice(index * rows, (index + 1) * rows)
            cache.begin_step(positions[own], cache.capacity, slots if slots is None else slots[own])
        parts = tuple(cache.layout for cache in self.each)
        self.layout = StepLayout(positions, 0, parts[0].masks, parts=parts)

    def places(self, layer_idx: int) -> Tensor:
        """Where the KV of a layer lies: (sequences, 3), as ``KvCache.places``."""
        assert self._table is not None
        return self._table[layer_idx]

    def slots_of(self, layer_idx: int) -> Tensor:
        """Where a step's rows of a layer are stored: int64, (rows,)."""
        slots = self.layout.slots if self.window_of(layer_idx) is None else self.layout.ring
        assert slots is not None
        return slots

    def window_of(self, layer_idx: int) -> int | None:
        """The sliding window of a layer; None with full attention."""
        return self._windows[layer_idx]
