"""The target's KV in preallocated buffers that can be rolled back, past a sliding window too.

Stands where Transformers expects a ``Cache``: attention layers call ``update`` and attend to what it returns. A full
layer's buffer grows by doubling. A sliding layer's buffer is linear and bounded: when it is full, the rows that may
still be needed move to its front. Nothing is overwritten that a rollback of ``slack`` tokens could need, which is what
``DynamicSlidingWindowLayer`` of Transformers lacks without recording its past.
"""

from __future__ import annotations

import torch

__all__ = ["KvCache"]

_FIRST_CAPACITY = 256


class _Buffer:
    """Keys and values of one layer, shape (1, heads, slots, head_dim); slot 0 holds position ``base``."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, capacity: int) -> None:
        self.keys = self._empty(keys, capacity)
        self.values = self._empty(values, capacity)
        self.base = 0

    @staticmethod
    def _empty(like: torch.Tensor, capacity: int) -> torch.Tensor:
        return like.new_empty((*like.shape[:2], capacity, like.shape[3]))

    @property
    def capacity(self) -> int:
        return int(self.keys.shape[2])

    def move(self, first: int, end: int, capacity: int) -> None:
        """Keep the positions ``first`` to ``end`` in a buffer of ``capacity`` slots."""
        kept = slice(first - self.base, end - self.base)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = self._empty(old, capacity)
            new[:, :, : end - first] = old[:, :, kept]
            setattr(self, name, new)
        self.base = first


class KvCache:
    """KV of one sequence.

    Args:
        windows: Sliding window of each layer in tokens; None for a layer with full attention.
        slack: Tokens that a rollback may take back at any time.
    """

    is_compileable = False

    def __init__(self, windows: list[int | None], slack: int) -> None:
        self._windows = windows
        self._slack = slack
        self._buffers: dict[int, _Buffer] = {}
        self.length = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens stored; part of Transformers' interface."""
        return self.length

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new rows after ``length`` and return what the new queries attend to.

        Full layers: all rows. Sliding layers: the new rows and the ``window - 1`` before them.
        """
        count = int(keys.shape[2])
        window = self._windows[layer_idx]
        buffer = self._buffers.get(layer_idx)
        if buffer is None:
            buffer = self._buffers[layer_idx] = _Buffer(keys, values, max(_FIRST_CAPACITY, count))
        end = self.length + count
        if end - buffer.base > buffer.capacity:
            first = 0 if window is None else max(self.length - window - self._slack, buffer.base)
            needed = end - first
            wanted = max(2 * buffer.capacity, 2 * needed) if window is None else needed + window + _FIRST_CAPACITY
            buffer.move(first, self.length, wanted)
        start = self.length - buffer.base
        buffer.keys[:, :, start : start + count] = keys
        buffer.values[:, :, start : start + count] = values
        first = 0 if window is None else max(self.length - window + 1, 0)
        return self.view(layer_idx, first, end)

    def advance(self, count: int) -> None:
        """The forward that stored ``count`` rows in every layer is done."""
        self.length += count

    def rollback(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        self.length = length

    def view(self, layer_idx: int, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the positions ``first`` to ``end``, without a copy."""
        buffer = self._buffers[layer_idx]
        slots = slice(first - buffer.base, end - buffer.base)
        return buffer.keys[:, :, slots], buffer.values[:, :, slots]
