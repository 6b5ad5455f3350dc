"""``ArrayOps`` and ``LogitsHandle`` on numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from polydraft.sampling.noise import gumbel

if TYPE_CHECKING:
    from polydraft.contract.arrays import ArrayOps, Indices
    from polydraft.contract.stepping import SteppingEngine

__all__ = ["NumpyLogits", "NumpyOps", "array_ops_of"]

Array = npt.NDArray[Any]


class NumpyOps:
    """Implements ``polydraft.contract.ArrayOps``; used for engines that define no array operations."""

    def float32(self, array: Any) -> Array:
        return np.asarray(array, dtype=np.float32)

    def int64(self, array: Array) -> Array:
        return array.astype(np.int64)

    def bits(self, array: Array) -> Array:
        # Through int32, so that the sign bit is extended.
        return np.ascontiguousarray(array, dtype=np.float32).view(np.int32).astype(np.int64)

    def from_bits(self, array: Array) -> Array:
        return array.astype(np.int32).view(np.float32)

    def column(self, values: Sequence[int], like: Array) -> Array:
        return np.array(values, dtype=np.int64)[:, None]

    def where(self, condition: Array, yes: Array | float, no: Array | float) -> Array:
        return np.where(condition, yes, no)

    def floor(self, array: Array) -> Array:
        return np.asarray(np.floor(array))

    def host_view(self, array: Any) -> npt.NDArray[np.float32]:
        return np.asarray(array, dtype=np.float32)

    def noise_bits(self, token_ids: Array, low: Array, high: Array) -> Array:
        # uint32 wraps around by itself: half the memory of the generic int64 version, and no masks.
        values = token_ids.astype(np.uint32)
        values ^= low.astype(np.uint32)
        shifted = np.empty_like(values)
        _lowbias32(values, shifted)
        values += high.astype(np.uint32)
        _lowbias32(values, shifted)
        # 23 bits are left, so that 2 * bits + 1 is exact in float32.
        values >>= 9
        return values

    def gumbel(self, token_ids: Array, low: Array, high: Array) -> Array:
        return np.asarray(gumbel(self, token_ids, (low, high)))

    def row_max(self, array: Array) -> Array:
        return np.asarray(array.max(axis=-1, keepdims=True))

    def row_min(self, array: Array) -> Array:
        return np.asarray(array.min(axis=-1, keepdims=True))

    def row_sum(self, array: Array) -> Array:
        return np.asarray(array.sum(axis=-1, keepdims=True))

    def row_cumsum(self, array: Array) -> Array:
        return np.cumsum(array, axis=-1)

    def argmax(self, array: Array) -> Array:
        return np.asarray(array.argmax(axis=-1))

    def argsort_descending(self, keys: Array) -> Array:
        return np.argsort(-keys, axis=-1)

    def take(self, array: Array, indices: Array) -> Array:
        return np.take_along_axis(array, indices, axis=-1)

    def candidates(self, values: Array, floor: Array) -> tuple[Array, Array]:
        mask = values >= floor
        found = [np.flatnonzero(row) for row in mask]
        # Rows keep different numbers of values: shorter ones are padded with -inf to (rows, width).
        width = max(1, *map(len, found))
        kept = np.full((values.shape[0], width), -np.inf, dtype=np.float32)
        columns = np.zeros((values.shape[0], width), dtype=np.int64)
        for row, indices in enumerate(found):
            kept[row, : len(indices)] = values[row, indices]
            columns[row, : len(indices)] = indices
        return kept, columns

    def best(self, array: Array, count: int) -> tuple[Array, Array]:
        count = min(count, array.shape[-1])
        # A partition is linear in the vocabulary; only the few that it leaves are sorted.
        chosen = np.argpartition(-array, count - 1, axis=-1)[:, :count]
        order = np.argsort(-np.take_along_axis(array, chosen, axis=-1), axis=-1)
        columns = np.take_along_axis(chosen, order, axis=-1)
        return np.take_along_axis(array, columns, axis=-1), columns

    def first_column(self, array: Array) -> Array:
        return np.asarray(array[:, 0])

    def columns(self, array: Array) -> Array:
        # A view with stride 0 along the rows: no array of shape (rows, n) is made.
        return np.broadcast_to(np.arange(array.shape[-1]), array.shape)

    def entries(self, array: Array, rows: Indices, columns: Indices) -> Array:
        return np.asarray(array[np.asarray(rows), np.asarray(columns)])

    def with_entries(self, array: Array, rows: Indices, columns: Indices, values: Array | float) -> Array:
        changed = array.copy()
        changed[np.asarray(rows, dtype=np.int64), np.asarray(columns, dtype=np.int64)] = values
        return changed

    def tolist(self, array: Array) -> list[Any]:
        result: list[Any] = array.tolist()
        return result

    def numpy(self, array: Any) -> Array:
        given = np.asarray(array)
        return given.astype(np.float32 if np.issubdtype(given.dtype, np.floating) else np.int64)

    def from_numpy(self, array: Any, like: Any) -> Array:
        return np.asarray(array)


@dataclass(frozen=True, slots=True)
class NumpyLogits:
    """Logits in host memory, as a ``polydraft.contract.LogitsHandle``.

    Args:
        array: Shape (rows, vocab), any float dtype. Not copied until ``numpy`` is called.
    """

    array: Array

    def numpy(self) -> npt.NDArray[np.float32]:
        """A float32 copy of shape (rows, vocab)."""
        return self.array.astype(np.float32)


def _lowbias32(values: Array, shifted: Array) -> None:
    """The finaliser of ``polydraft.sampling.noise``, in place on uint32 arrays; ``shifted`` is a buffer."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, None)):
        np.right_shift(values, shift, out=shifted)
        values ^= shifted
        # The last of the three steps has no multiplication.
        if factor is not None:
            values *= np.uint32(factor)


def array_ops_of(engine: SteppingEngine) -> ArrayOps[Any]:
    """An engine's own array operations, or numpy's if it has none."""
    return engine.array_ops or NumpyOps()
