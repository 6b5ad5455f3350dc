"""Workarounds for slow or missing kernels in MLX's CPU builds."""

from __future__ import annotations

import sys
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_unflatten
from mlx_lm.models.rope_utils import Llama3RoPE, ProportionalRoPE
from mlx_lm.models.switch_layers import SwitchLinear

__all__ = ["lay_by_columns", "share_rotations", "widen_experts"]

_POSITIONS = 256
"""Of a table of rotations, or a multiple of it."""


class _WideLinear(SwitchLinear):  # type: ignore[misc]
    """A ``SwitchLinear`` in float32 between activations of another dtype."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        product: mx.array = super().__call__(x.astype(mx.float32), indices, sorted_indices=sorted_indices)
        return product.astype(x.dtype)


def widen_experts(model: Any) -> bool:
    """Convert unquantized expert weights to float32: on the CPU, MLX multiplies chosen experts in no other dtype.

    Otherwise the first forward fails with "[GatherMM::eval] Currently only supports float32" (mlx 0.32.4). Results
    differ from the narrow dtype's only in that these products are more precise.

    Returns:
        Whether there were any.
    """
    replaced = []
    for name, module in model.named_modules():
        if type(module) is SwitchLinear and module.weight.dtype != mx.float32:
            wide = _WideLinear(1, 1, 1, bias="bias" in module)
            wide.update({key: value.astype(mx.float32) for key, value in module.parameters().items()})
            replaced.append((name, wide))
    model.update_modules(tree_unflatten(replaced))
    return bool(replaced)


def lay_by_columns(model: Any) -> None:
    """Store float32 weights column by column on Linux CPUs, where this makes their products about twice as fast.

    MLX's CPU build multiplies float32 with the reference BLAS. Its product with a transposed matrix sums along each
    row, which compilers do not vectorize. With a matrix that is not transposed it adds columns in the same order, 2 to
    2.4 times as fast and with the same bits (mlx-cpu 0.32.4; 1 to 64 rows, 160 to 2048 columns). So weights keep their
    shape, but not their order in memory. Other dtypes and devices have their own kernels.

    Args:
        model: A model on the CPU. Its ``embed_tokens`` is its head as well, unless it is an assistant with a centroid
            head, which looks up single rows.
    """
    if sys.platform != "linux":
        return
    looked_up = getattr(model, "masked_embedding", None) is not None
    for name, module in model.named_modules():
        is_head = isinstance(module, nn.Embedding) and name.rpartition(".")[2] == "embed_tokens" and not looked_up
        if (is_head or isinstance(module, nn.Linear | SwitchLinear)) and module.weight.dtype == mx.float32:
            module.weight = mx.contiguous(module.weight.swapaxes(-1, -2)).swapaxes(-1, -2)
            mx.eval(module.weight)  # one weight at a time, so that at most one is held twice


class _Rotations:
    """Cosines and sines of a block of positions, as MLX's own rotation computes them.

    Args:
        rope: The rotation, of all of a head or of its first ``dims`` numbers.
    """

    def __init__(self, rope: Any) -> None:
        self.dims = int(rope.dims)
        self._rope = rope
        self._first = self._end = 0
        self._tables: list[mx.array] = []

    def at(self, first: int, count: int, dtype: mx.Dtype) -> list[mx.array]:
        """What heads are multiplied with, and what their swapped halves are: both (1, 1, count, dims)."""
        if first < self._first or first + count > self._end or self._tables[0].dtype != dtype:
            self._first = first // _POSITIONS * _POSITIONS
            self._end = -(-(first + count) // _POSITIONS) * _POSITIONS
            shape = (1, 1, self._end - self._first, self.dims // 2)
            # (1, 0) rotated is (cos, sin).
            unit = mx.concatenate([mx.ones(shape, dtype), mx.zeros(shape, dtype)], axis=-1)
            cos, sin = self._rope(unit, offset=self._first).split(2, axis=-1)
            self._tables = [mx.concatenate([cos, cos], axis=-1), mx.concatenate([-sin, sin], axis=-1)]
        start = first - self._first
        return [table[:, :, start : start + count] for table in self._tables]


class _SharedRope(nn.Module):  # type: ignore[misc]
    """A rotation by a table that layers share."""

    def __init__(self, rotations: _Rotations) -> None:
        super().__init__()
        self._rotations = rotations

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        dims = self._rotations.dims
        first = offset if isinstance(offset, int) else int(offset.item())
        straight, crossed = self._rotations.at(first, x.shape[2], x.dtype)
        rest = [] if x.shape[3] == dims else [x[..., dims:]]
        halves = [x[..., dims // 2 : dims], x[..., : dims // 2]]
        rotated: mx.array = (x[..., :dims] if rest else x) * straight + mx.concatenate(halves, axis=-1) * crossed
        return mx.concatenate([rotated, *rest], axis=-1) if rest else rotated


def share_rotations(model: Any) -> None:
    """Rotate by tables that all layers share: on the CPU, MLX computes cosines and sines in each layer.

    There a rotation is 31 operations, most of which find the same cosines and sines again; for a step of one token that
    takes 50 of its 70 microseconds (mlx-cpu 0.32.4). The bits are the same.

    Args:
        model: A model on the CPU, whose layers call ``rope(x, offset)`` with the same offset for the whole batch.
    """
    shared: dict[Any, _Rotations] = {}
    replaced = []
    for name, module in model.named_modules():
        if type(module) in {nn.RoPE, Llama3RoPE, ProportionalRoPE} and not module.traditional:
            freqs = tuple(module._freqs.tolist()) if "_freqs" in module else (module.base, module.scale)
            key = (module.dims, freqs)
            replaced.append((name, _SharedRope(shared.setdefault(key, _Rotations(module)))))
    model.update_modules(tree_unflatten(replaced))
