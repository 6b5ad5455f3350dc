"""KV caches that can be rolled back: one buffer a layer, in place of mlx-lm's own.

mlx-lm's ``RotatingKVCache`` overwrites what a rollback past the window needs. Here the token at position p always lies
in slot ``p % capacity``, with ``capacity = window + spare``: the window's memory plus what may be taken back.
A step of at most ``rows`` tokens attends to the whole buffer, with a mask made of positions, so its shape is constant
and a token's place in it does not depend on how the tokens were cut into steps.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from polydraft.errors import EngineError

__all__ = ["BLOCK", "FullCache", "KvCache", "LayerCache", "SlidingCache", "block_end"]

BLOCK = 256
"""Slots by which a full-attention buffer grows."""


class LayerCache:
    """Keys and values of one layer, (1, heads, slots, head_dim), with the interface that mlx-lm's models expect.

    Args:
        rows: Tokens that one step runs at most.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.offset = 0
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(int(buffer.nbytes) for buffer in (self.keys, self.values) if buffer is not None)

    @property
    def state(self) -> list[mx.array]:
        """The buffers, to be evaluated."""
        return [buffer for buffer in (self.keys, self.values) if buffer is not None]

    def make_mask(self, count: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """The mask of the ``count`` tokens that are about to be stored."""
        raise NotImplementedError

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Store new rows; return what they attend to."""
        raise NotImplementedError

    def visible(self, first: int) -> tuple[mx.array, mx.array, mx.array | None]:
        """Stored keys and values from position ``first`` on, for a drafter: with a mask (1, slots), or None."""
        raise NotImplementedError


class FullCache(LayerCache):
    """A layer with full attention.

    Args:
        rows: See ``LayerCache``.
        whole: Steps attend to all slots up to the next multiple of ``BLOCK`` after the last one that ``rows`` more
            tokens could take, so that the shape depends on the position alone.
    """

    def __init__(self, rows: int, *, whole: bool) -> None:
        super().__init__(rows)
        self._whole = whole

    def make_mask(self, count: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """Causal; with ``window_size`` for models that keep a window's layer in a full cache."""
        if not self._step(count) and window_size is None:
            return None if count == 1 else "causal"
        slots = self._slots(count)
        positions = np.arange(self.offset, self.offset + count)[:, None]
        mask = np.arange(slots)[None, :] <= positions
        if window_size is not None:
            mask &= np.arange(slots)[None, :] > positions - window_size
        return mx.array(mask)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Store new rows; return all up to them."""
        count = int(keys.shape[2])
        slots, end = self._slots(count), self.offset + count
        self._grow(keys, values, max(slots, end))
        assert self.keys is not None
        assert self.values is not None
        self.keys[..., self.offset : end, :] = keys
        self.values[..., self.offset : end, :] = values
        self.offset = end
        return self.keys[..., :slots, :], self.values[..., :slots, :]

    def visible(self, first: int) -> tuple[mx.array, mx.array, mx.array | None]:
        """See ``LayerCache``."""
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
        added = -(-needed // BLOCK) * BLOCK - held
        more = [mx.zeros((*new.shape[:2], added, new.shape[3]), new.dtype) for new in (keys, values)]
        if self.keys is None or self.values is None:
            self.keys, self.values = more
        else:
            self.keys = mx.concatenate([self.keys, more[0]], axis=2)
            self.values = mx.concatenate([self.values, more[1]], axis=2)


def block_end(position: int, rows: int) -> int:
    """Slots of a ``whole`` cache that a step of ``rows`` tokens beginning at ``position`` attends to."""
    return -(-(position + rows) // BLOCK) * BLOCK


class SlidingCache(LayerCache):
    """A layer whose tokens attend to the last ``window`` tokens, themselves included.

    After any step and any rollback of it the ``window + 1`` tokens before the next one are still there: one more than
    the target's layers need, as Gemma 4's drafters see one more.

    Args:
        window: Tokens.
        rows: See ``LayerCache``.
        spare: Tokens that may be stored and rolled back; at least ``rows``.
    """

    def __init__(self, window: int, rows: int, spare: int) -> None:
        super().__init__(rows)
        self.window = window
        self.spare = spare
        self.capacity = window + spare

    def make_mask(self, count: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """By positions; a slot's stale row is always outside the window."""
        positions = np.arange(self.offset, self.offset + count)[:, None]
        if count <= self.rows:
            held = self._held(self.offset + count)
        else:
            held = np.arange(max(self.offset - self.window + 1, 0), self.offset + count)
        return mx.array((held >= 0) & (held <= positions) & (held > positions - self.window))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Store new rows. A step gets the whole buffer, a longer block the window before it and itself, in order."""
        count = int(keys.shape[2])
        if self.keys is None or self.values is None:
            self.keys = mx.zeros((*keys.shape[:2], self.capacity, keys.shape[3]), keys.dtype)
            self.values = mx.zeros((*values.shape[:2], self.capacity, values.shape[3]), values.dtype)
        if count <= self.rows:
            self._write(self.keys, keys, self.offset)
            self._write(self.values, values, self.offset)
            self.offset += count
            return self.keys, self.values
        first = max(self.offset - self.window + 1, 0)
        all_keys = mx.concatenate([*self._read(self.keys, first), keys], axis=2)
        all_values = mx.concatenate([*self._read(self.values, first), values], axis=2)
        kept = min(count, self.capacity)
        self._write(self.keys, keys[..., count - kept :, :], self.offset + count - kept)
        self._write(self.values, values[..., count - kept :, :], self.offset + count - kept)
        self.offset += count
        return all_keys, all_values

    def visible(self, first: int) -> tuple[mx.array, mx.array, mx.array | None]:
        """See ``LayerCache``; ``first`` is at least ``offset - window - 1``."""
        assert self.keys is not None
        assert self.values is not None
        held = self._held(self.offset)
        return self.keys, self.values, mx.array(held >= first)[None]

    def _held(self, end: int) -> Any:
        """The position whose row each slot holds once ``end`` tokens are stored; negative: none."""
        slots = np.arange(self.capacity)
        return end - 1 - (end - 1 - slots) % self.capacity

    def _write(self, buffer: mx.array, rows: mx.array, position: int) -> None:
        start, count = position % self.capacity, int(rows.shape[2])
        fits = min(count, self.capacity - start)
        buffer[..., start : start + fits, :] = rows[..., :fits, :]
        if fits < count:
            buffer[..., : count - fits, :] = rows[..., fits:, :]

    def _read(self, buffer: mx.array, first: int) -> list[mx.array]:
        """The rows of the positions ``first`` to ``offset``, in order."""
        if first == self.offset:
            return []
        start, end = first % self.capacity, (self.offset - 1) % self.capacity + 1
        if start < end:
            return [buffer[..., start:end, :]]
        return [buffer[..., start:, :], buffer[..., :end, :]]


class KvCache:
    """All layers of one sequence.

    Args:
        layers: Those that store keys and values of their own, in order.
    """

    def __init__(self, layers: list[LayerCache]) -> None:
        self.layers = layers
        self._written = 0

    @property
    def length(self) -> int:
        """Tokens stored."""
        return self.layers[0].offset

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def state(self) -> list[mx.array]:
        """All buffers, to be evaluated."""
        return [buffer for layer in self.layers for buffer in layer.state]

    def rollback(self, length: int) -> None:
        """Forget all but the first ``length`` tokens.

        Raises:
            EngineError: A sliding layer has overwritten what it would need.
        """
        self._written = max(self._written, self.length)
        for layer in self.layers:
            if isinstance(layer, SlidingCache) and self._written > max(layer.capacity, length + layer.spare):
                raise EngineError(
                    f"{self._written - length} tokens were to be rolled back past a sliding window, and at most "
                    f"{layer.spare} can be.",
                    "This is a defect of the caller; report it.",
                )
        for layer in self.layers:
            layer.offset = length
