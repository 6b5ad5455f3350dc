"""Where a weight's numbers lie, for the matrix products of MLX on Linux CPUs.

MLX's CPU build multiplies float32 by the reference BLAS. Its product with a transposed matrix is a sum along each row,
which compilers do not vectorize; with one that is not transposed, 2 to 2.4 times as fast, it adds columns in the same
order: the results have the same bits (mlx-cpu 0.32.4; 1 to 64 rows, 160 to 2048 columns). So weights keep their shape,
and their numbers are laid down column by column. Other dtypes, and other devices, have kernels of their own.
"""

from __future__ import annotations

import sys
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models.switch_layers import SwitchLinear

__all__ = ["lay_by_columns"]


def lay_by_columns(model: Any) -> None:
    """Lay the float32 weights that activations are multiplied by out anew, one after the other, where it helps.

    Args:
        model: A model on the CPU; of its embeddings, ``embed_tokens`` is taken for its head, too, unless it is an
            assistant with a centroid head.
    """
    if sys.platform != "linux":
        return
    looked_up = getattr(model, "masked_embedding", None) is not None  # row by row: see Assistant
    for name, module in model.named_modules():
        is_head = isinstance(module, nn.Embedding) and name.rpartition(".")[2] == "embed_tokens" and not looked_up
        if (is_head or isinstance(module, nn.Linear | SwitchLinear)) and module.weight.dtype == mx.float32:
            module.weight = mx.contiguous(module.weight.swapaxes(-1, -2)).swapaxes(-1, -2)
            mx.eval(module.weight)
