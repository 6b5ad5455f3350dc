"""Workarounds for slow or missing kernels in MLX's CPU builds."""

from __future__ import annotations

import sys
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import SwitchLinear

__all__ = ["lay_by_columns", "widen_experts"]


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
