"""The target's KV, in buffers where a token's position decides its slot (``blocks``).

Stands where Transformers expects a ``Cache``: attention layers call ``update`` and attend to what it returns. Rolling
back, past a sliding window too, is forgetting a length: what rejected drafts wrote is never seen again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch

from polydraft_transformers.blocks import Block
from polydraft_transformers.graphs import Captured

__all__ = ["KvCache"]


class KvCache:
    """KV of one sequence.

    Args:
        windows: Sliding window of each layer in tokens; None for a layer with full attention.
        ring: Slots of a sliding layer.
        spare: Slots of a full layer beyond those asked for, which the padding rows of a step write.
    """

    is_compileable = False

    def __init__(self, windows: Sequence[int | None], ring: int, spare: int) -> None:
        self._windows = windows
        self._ring = ring
        self._spare = spare
        self._buffers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._block: Block | None = None
        self._capacity = 0
        self._seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.length = 0
        self._captured: dict[Hashable, Captured] = {}

    def begin(self, block: Block, capacity: int) -> None:
        """The forward that follows runs ``block``; full layers get room for ``capacity`` tokens."""
        self._block = block
        self.reserve(capacity)

    def reserve(self, capacity: int) -> None:
        """Give the full layers room for ``capacity`` tokens; what was captured over smaller buffers is dropped."""
        if capacity <= self._capacity:
            return
        self._captured.clear()
        for layer, old in self._buffers.items():
            if self._windows[layer] is None:
                grown = (self._empty(old[0], capacity + self._spare), self._empty(old[1], capacity + self._spare))
                for new, kept in zip(grown, old, strict=True):
                    new[:, :, : kept.shape[2]] = kept
                self._buffers[layer] = grown
        self._capacity = capacity

    def clear(self) -> None:
        """Make it as good as new: what is masked still takes part, with weight 0, and 0 times a NaN would be one."""
        self.length = 0
        self._seen.clear()
        with torch.inference_mode():
            for buffers in self._buffers.values():
                for buffer in buffers:
                    buffer.zero_()

    def captured(
        self, key: Hashable, function: Callable[..., tuple[torch.Tensor, ...]], *inputs: torch.Tensor
    ) -> Captured:
        """What was captured over these buffers under ``key``; captured now if nothing was, or the buffers moved."""
        found = self._captured.get(key)
        if found is None:
            neighbour = next(iter(self._captured.values()), None)
            found = self._captured[key] = Captured(function, inputs, neighbour)
        return found

    @staticmethod
    def _empty(like: torch.Tensor, slots: int) -> torch.Tensor:
        return like.new_zeros((*like.shape[:2], slots, like.shape[3]))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens stored; part of Transformers' interface."""
        return self.length

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the block's rows and return what its queries attend to.

        Args:
            keys: Shape (1, kv_heads, rows, head_dim).
            values: Likewise.
            layer_idx: The layer.

        Returns:
            Keys and values, shape (1, kv_heads, keys of the block's mask, head_dim).
        """
        block = self._block
        assert block is not None
        window = self._windows[layer_idx]
        stored = self._buffers.get(layer_idx)
        if stored is None:
            slots = self._capacity + self._spare if window is None else self._ring
            stored = self._buffers[layer_idx] = (self._empty(keys, slots), self._empty(values, slots))
        if window is None:
            for buffer, rows in zip(stored, (keys, values), strict=True):
                if block.first is None:
                    assert block.slots is not None
                    buffer.index_copy_(2, block.slots, rows)
                else:
                    buffer[:, :, block.first : block.first + block.rows] = rows
            return self.view(layer_idx, block.span)
        assert block.ring is not None
        if block.prefix is None:
            for buffer, rows in zip(stored, (keys, values), strict=True):
                buffer.index_copy_(2, block.ring, rows)
            return stored
        seen = [
            torch.cat([buffer.index_select(2, block.prefix), rows], dim=2)
            for buffer, rows in zip(stored, (keys, values), strict=True)
        ]
        kept = block.ring.shape[0]
        for buffer, rows in zip(stored, (keys, values), strict=True):
            buffer.index_copy_(2, block.ring, rows[:, :, -kept:])
        self._seen[layer_idx] = (seen[0], seen[1])
        return self._seen[layer_idx]

    def attended(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the block attends to in a layer that has stored its rows, for layers that share its KV."""
        block = self._block
        assert block is not None
        if layer_idx in self._seen:
            return self._seen[layer_idx]
        return self.view(layer_idx, block.span)

    def view(self, layer_idx: int, span: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first ``span`` slots of a full layer, all of a sliding one; no copy."""
        keys, values = self._buffers[layer_idx]
        if self._windows[layer_idx] is not None:
            return keys, values
        return keys[:, :, :span], values[:, :, :span]

    def kv_heads(self, layer_idx: int) -> int:
        """KV heads of a layer that has stored rows."""
        return int(self._buffers[layer_idx][0].shape[1])

    def advance(self, count: int) -> None:
        """The forward that stored ``count`` tokens in every layer is done."""
        self._seen.clear()
        self.length += count

    def rollback(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        self.length = length
