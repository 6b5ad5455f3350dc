"""Mixtures of experts on the CPU, whose matrix products of chosen experts MLX has in float32 only."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import SwitchLinear

__all__ = ["widen_experts"]


class _WideLinear(SwitchLinear):  # type: ignore[misc]
    """A ``SwitchLinear`` in float32 between activations of another dtype."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        product: mx.array = super().__call__(x.astype(mx.float32), indices, sorted_indices=sorted_indices)
        return product.astype(x.dtype)


def widen_experts(model: Any) -> bool:
    """Keep unquantized expert weights in float32, where they are in another dtype.

    Without it mlx fails in the first forward: "[GatherMM::eval] Currently only supports float32" (mlx 0.32.4). Results
    are those of the narrow dtype but for products that are more precise.

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
