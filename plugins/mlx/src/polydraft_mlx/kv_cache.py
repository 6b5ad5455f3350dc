"""KV caches that can be rolled back, in place of mlx-lm's own: one buffer per layer.

mlx-lm's ``RotatingKVCache`` overwrites rows that a rollback past the window needs. Here the token at position p is
always in slot ``p % capacity``, where ``capacity = window + spare``: the window, and the tokens that may be rolled
back. A step of at most ``rows`` tokens attends to the whole buffer under a mask computed from positions. So the shape
is constant, and a token's slot does not depend on how the tokens were divided into steps.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np
from polydraft.errors import EngineError

__all__ = ["BLOCK", "FullCache", "KvCache", "LayerCache", "SlidingCache", "block_end"]

BLOCK = 256
"""Slots by which a full-attention buffer grows."""


class _Buffers:
    """Keys and values of one layer, (1, heads, slots, head_dim).

    Its subclasses have the interface that mlx-lm's models expect, and ``visible`` for drafters.

    Args:
        rows: The most tokens that one step runs.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.offset = 0
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.launches = False
        """Whether MLX is to compute a step up to this layer as soon as the layer has stored its rows."""

    @property
    def state(self) -> list[mx.array]:
        """The buffers, to be evaluated."""
        return [buffer for buffer in (self.keys, self.values) if buffer is not None]

    def _launch(self, count: int) -> None:
        """Have MLX's thread compute while the next layer is built: it would wait for the last one otherwise."""
        if self.launches and count <= self.rows:
            mx.async_eval(self.keys, self.values)


class FullCache(_Buffers):
    """A layer with full attention.

    Args:
        rows: The most tokens that one step runs.
        whole: Steps attend to all slots up to ``block_end``, so that their shape depends on the position alone.
    """

    def __init__(self, rows: int, *, whole: bool) -> None:
        super().__init__(rows)
        self._whole = whole

    def make_mask(self, count: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """A causal mask; ``window_size`` is set by models that use a full cache for a sliding layer."""
        if not self._step(count) and window_size is None:
            return None if count == 1 else "causal"
        slots = self._slots(count)
        positions = np.arange(self.offset, self.offset + count)[:, None]
        # (count, slots), True: visible. Slot = position here, so stale rows are in the future.
        mask = np.arange(slots)[None, :] <= positions
        if window_size is not None:
            mask &= np.arange(slots)[None, :] > positions - window_size
        return mx.array(mask)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Store new rows; return all rows up to them (with ``whole``, up to ``block_end``)."""
        count = int(keys.shape[2])
        slots, end = self._slots(count), self.offset + count
        self._grow(keys, values, max(slots, end))
        assert self.keys is not None
        assert self.values is not None
        self.keys[..., self.offset : end, :] = keys
        self.values[..., self.offset : end, :] = values
        self.offset = end
        self._launch(count)
        return self.keys[..., :slots, :], self.values[..., :slots, :]

    def visible(self, first: int) -> tuple[mx.array, mx.array, mx.array | None]:
        """Stored keys and values from position ``first`` on, for a drafter; no mask."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys[..., first : self.offset, :], self.values[..., first : self.offset, :], None

    def _step(self, count: int) -> bool:
        return self._whole and count <= self.rows

    def _slots(self, count: int) -> int:
        if self._step(count):
            return block_end(self.offset, self.rows)
        return self.offset + count

    def _grow(self, keys: mx.array, values: mx.array, needed: int) -> None:
        held = 0 if self.keys is None else int(self.keys.shape[2])
        if needed <= held:
            return
        # Whole blocks: the buffer is copied once per BLOCK tokens, not in every step.
        added = -(-needed // BLOCK) * BLOCK - held
        more = [mx.zeros((*new.shape[:2], added, new.shape[3]), new.dtype) for new in (keys, values)]
        if held:
            more = [mx.concatenate(pair, axis=2) for pair in zip(self.state, more, strict=True)]
        self.keys, self.values = more


def block_end(position: int, rows: int) -> int:
    """Slots of a ``whole`` cache that a step of ``rows`` tokens at ``position`` attends to: a multiple of ``BLOCK``."""
    return -(-(position + rows) // BLOCK) * BLOCK


class SlidingCache(_Buffers):
    """A layer whose tokens attend to the last ``window`` tokens, themselves included.

    After any step, and any rollback of it, the ``window + 1`` tokens before the next one are still stored: one more
    than the target's layers need, because Gemma 4's drafters see one more.

    Args:
        window: Number of these tokens.
        rows: The most tokens that one step runs.
        spare: The most tokens that may be stored and rolled back; at least ``rows``.
    """

    def __init__(self, window: int, rows: int, spare: int) -> None:
        super().__init__(rows)
        self.window = window
        self.spare = spare
        self.capacity = window + spare

    def make_mask(self, count: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """A mask computed from positions; a stale row is always outside the window."""
        if count <= self.rows and self.offset >= self.window - 1:
            return self._full_mask(self.offset, count, self.window)
        positions = np.arange(self.offset, self.offset + count)[:, None]
        if count <= self.rows:
            # The model makes its mask before the layers store the step's rows, and attends after it.
            held = self._held(self.offset + count)
        else:
            # The positions of the rows that ``update_and_fetch`` returns for a long chunk.
            held = np.arange(max(self.offset - self.window + 1, 0), self.offset + count)
        return mx.array((held >= 0) & (held <= positions) & (held > positions - self.window))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Store new rows. A step gets the whole buffer, a longer chunk the window before it and itself, in order."""
        count = int(keys.shape[2])
        if self.keys is None or self.values is None:
            self.keys = mx.zeros((*keys.shape[:2], self.capacity, keys.shape[3]), keys.dtype)
            self.values = mx.zeros((*values.shape[:2], self.capacity, values.shape[3]), values.dtype)
        if count <= self.rows:
            self._write(self.keys, keys, self.offset)
            self._write(self.values, values, self.offset)
            self.offset += count
            self._launch(count)
            return self.keys, self.values
        first = max(self.offset - self.window + 1, 0)
        all_keys = mx.concatenate([*self._read(self.keys, first), keys], axis=2)
        all_values = mx.concatenate([*self._read(self.values, first), values], axis=2)
        # Of a chunk longer than the ring only the last rows stay.
        kept = min(count, self.capacity)
        self._write(self.keys, keys[..., count - kept :, :], self.offset + count - kept)
        self._write(self.values, values[..., count - kept :, :], self.offset + count - kept)
        self.offset += count
        return all_keys, all_values

    def visible(self, first: int) -> tuple[mx.array, mx.array, mx.array | None]:
        """The whole buffer, with a mask (1, slots) of positions from ``first`` on: at least ``offset - window - 1``."""
        assert self.keys is not None
        assert self.values is not None
        seen = self.offset - first
        if seen <= self.capacity and first > 0:
            return self.keys, self.values, self._full_mask(self.offset - 1, 1, seen)
        held = self._held(self.offset)
        return self.keys, self.values, mx.array(held >= first)[None]

    def _full_mask(self, position: int, count: int, window: int) -> mx.array:
        """Which slots the rows from ``position`` on see, once ``window`` positions are stored: (count, slots)."""
        start = -position % self.capacity
        return _turning_mask(window, self.capacity, self.rows)[:count, start : start + self.capacity]

    def _held(self, end: int) -> Any:
        """The position of the row in each slot once ``end`` tokens are stored; negative: empty."""
        slots = np.arange(self.capacity)
        # The largest position p < end with p % capacity == slot.
        return end - 1 - (end - 1 - slots) % self.capacity

    def _write(self, buffer: mx.array, rows: mx.array, position: int) -> None:
        start, count = position % self.capacity, int(rows.shape[2])
        fits = min(count, self.capacity - start)
        buffer[..., start : start + fits, :] = rows[..., :fits, :]
        if fits < count:
            buffer[..., : count - fits, :] = rows[..., fits:, :]

    def _read(self, buffer: mx.array, first: int) -> list[mx.array]:
        """The rows of the positions from ``first`` to before ``offset``, in order, in one or two parts."""
        if first == self.offset:
            return []
        # ``end`` is 1 to capacity, so that rows up to the last slot are one part.
        start, end = first % self.capacity, (self.offset - 1) % self.capacity + 1
        if start < end:
            return [buffer[..., start:end, :]]
        return [buffer[..., start:, :], buffer[..., :end, :]]


LayerCache = FullCache | SlidingCache


@lru_cache
def _turning_mask(window: int, capacity: int, rows: int) -> mx.array:
    """Of a ring of slots, twice in a row, those that row i sees whose newest slot is i; shape (rows, 2 * capacity)."""
    return mx.array((np.arange(rows)[:, None] - np.arange(2 * capacity)) % capacity < window)


class KvCache:
    """All layers of one sequence.

    Args:
        layers: The layers that store their own keys and values, in order.
    """

    def __init__(self, layers: list[LayerCache]) -> None:
        self.layers = layers
        self._written = 0

    @property
    def length(self) -> int:
        """Tokens stored."""
        return self.layers[0].offset

    @property
    def state(self) -> list[mx.array]:
        """All buffers, to be evaluated."""
        return [buffer for layer in self.layers for buffer in layer.state]

    def rollback(self, length: int) -> None:
        """Forget all but the first ``length`` tokens.

        Raises:
            EngineError: A sliding layer has overwritten rows that it would need.
        """
        if not self.reaches(length):
            raise EngineError(
                f"Cannot roll back {self._written - length} tokens past a sliding window.",
                "This is a bug in the caller; report it.",
            )
        for layer in self.layers:
            layer.offset = length
        if length == 0:
            self._written = 0

    def reaches(self, length: int) -> bool:
        """Whether it can go back to the first ``length`` tokens."""
        # The furthest that was ever written: a rollback does not bring overwritten rows back.
        self._written = max(self._written, self.length)
        sliding = (layer for layer in self.layers if isinstance(layer, SlidingCache))
        return length == 0 or all(self._written <= max(one.capacity, length + one.spare) for one in sliding)
