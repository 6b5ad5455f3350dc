"""The sampler's array operations in MLX, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from polydraft.contract import Indices
from polydraft.sampling.noise import gumbel

__all__ = ["MlxOps"]


class MlxOps:
    """``polydraft.contract.ArrayOps`` in MLX. No operation is compiled, so that none is fused with another."""

    def float32(self, array: Any) -> mx.array:
        return mx.array(array) if not isinstance(array, mx.array) else array.astype(mx.float32)

    def int64(self, array: mx.array) -> mx.array:
        return array.astype(mx.int64)

    def bits(self, array: mx.array) -> mx.array:
        return array.view(mx.int32).astype(mx.int64)

    def from_bits(self, array: mx.array) -> mx.array:
        return array.astype(mx.int32).view(mx.float32)

    def column(self, values: Sequence[int], like: mx.array) -> mx.array:
        return mx.array(np.asarray(values, dtype=np.int64)[:, None])

    def where(self, condition: mx.array, yes: Any, no: Any) -> mx.array:
        return mx.where(condition, yes, no)

    def floor(self, array: mx.array) -> mx.array:
        return mx.floor(array)

    def host_view(self, array: mx.array) -> Any:
        if mx.default_device().type != mx.cpu:
            return None
        return np.asarray(array if array.dtype == mx.float32 else array.astype(mx.float32))

    def noise_bits(self, token_ids: mx.array, low: mx.array, high: mx.array) -> mx.array:
        # 23 bits h: (2h + 1) / 2**24 is exact in float32, and neither 0 nor 1.
        values = _lowbias32(token_ids.astype(mx.uint32) ^ low.astype(mx.uint32))
        return _lowbias32(values + high.astype(mx.uint32)) >> 9

    def gumbel(self, token_ids: mx.array, low: mx.array, high: mx.array) -> mx.array:
        noise: mx.array = gumbel(self, token_ids, (low, high))
        return noise

    def row_max(self, array: mx.array) -> mx.array:
        return array.max(axis=-1, keepdims=True)

    def row_min(self, array: mx.array) -> mx.array:
        return array.min(axis=-1, keepdims=True)

    def row_sum(self, array: mx.array) -> mx.array:
        return array.sum(axis=-1, keepdims=True)

    def row_cumsum(self, array: mx.array) -> mx.array:
        return mx.cumsum(array, axis=-1)

    def argmax(self, array: mx.array) -> mx.array:
        return mx.argmax(array, axis=-1).astype(mx.int64)

    def argsort_descending(self, keys: mx.array) -> mx.array:
        return mx.argsort(-keys, axis=-1).astype(mx.int64)

    def take(self, array: mx.array, indices: mx.array) -> mx.array:
        return mx.take_along_axis(array, indices, axis=-1)

    def candidates(self, values: mx.array, floor: mx.array) -> tuple[mx.array, mx.array]:
        # All columns: compacting them would wait for the device. (On the CPU the rule runs in numpy, by host_view.)
        columns = mx.broadcast_to(mx.arange(values.shape[-1], dtype=mx.int64), values.shape)
        return mx.where(values >= floor, values, -mx.inf), columns

    def best(self, array: mx.array, count: int) -> tuple[mx.array, mx.array]:
        count = min(count, array.shape[-1])
        # A partition first, so that only ``count`` columns are sorted and not the vocabulary.
        columns = mx.argpartition(-array, count - 1, axis=-1)[..., :count] if count < array.shape[-1] else None
        chosen = array if columns is None else mx.take_along_axis(array, columns, axis=-1)
        order = mx.argsort(-chosen, axis=-1)
        found = order if columns is None else mx.take_along_axis(columns, order, axis=-1)
        return mx.take_along_axis(array, found, axis=-1), found.astype(mx.int64)

    def first_column(self, array: mx.array) -> mx.array:
        return array[:, 0]

    def columns(self, array: mx.array) -> mx.array:
        return mx.broadcast_to(mx.arange(array.shape[-1], dtype=mx.int64), array.shape)

    def entries(self, array: mx.array, rows: Indices, columns: Indices) -> mx.array:
        return array[_index(rows), _index(columns)]

    def with_entries(self, array: mx.array, rows: Indices, columns: Indices, values: mx.array | float) -> mx.array:
        changed = mx.array(array)
        changed[_index(rows), _index(columns)] = values
        return changed

    def tolist(self, array: mx.array) -> list[Any]:
        values: Any = array.tolist()
        return list(values)

    def numpy(self, array: Any) -> Any:
        if mx.issubdtype(array.dtype, mx.floating):
            return np.array(array.astype(mx.float32))
        return np.array(array.astype(mx.int64))

    def from_numpy(self, array: Any, like: mx.array) -> mx.array:
        return mx.array(array)


def _index(values: Indices) -> mx.array:
    return mx.array(np.asarray(values, dtype=np.int64))


def _lowbias32(values: mx.array) -> mx.array:
    """The finaliser of ``polydraft.sampling.noise`` in uint32, whose products wrap as the definition's do."""
    values = (values ^ (values >> 16)) * 0x7FEB352D
    # An array, because a Python int of this size does not fit into int32, MLX's default.
    values = (values ^ (values >> 15)) * mx.array(0x846CA68B, dtype=mx.uint32)
    return values ^ (values >> 16)
