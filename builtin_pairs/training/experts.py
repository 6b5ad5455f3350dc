"""Training of mixtures of experts: dense experts, and a load-balancing loss."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def dense_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The forward of the experts layer as two large products: faster than routing for 8 small experts."""
    count, width = hidden_states.shape[0], self.intermediate_dim
    gates = torch.zeros(count, self.num_experts, device=hidden_states.device, dtype=hidden_states.dtype)
    gates = gates.scatter(1, top_k_index, top_k_weights.to(hidden_states.dtype))
    both = nn.functional.linear(hidden_states, self.gate_up_proj.flatten(0, 1)).view(count, self.num_experts, 2 * width)
    inner = self.act_fn(both[..., :width]) * both[..., width:] * gates[..., None]
    return nn.functional.linear(inner.flatten(1), self.down_proj.transpose(1, 2).flatten(0, 1).T)


class Balance:
    """Collects the routers' choices during a forward; `loss()` is least if all experts are used equally."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.layers = 0
        for module in model.modules():
            if type(module).__name__ == "Gemma4TextRouter":
                module.register_forward_hook(self._collect)
                self.layers += 1

    def _collect(self, module: nn.Module, inputs: Any, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        if torch.is_grad_enabled():
            self._seen.append((output[0], output[2]))

    def loss(self) -> torch.Tensor | float:
        """Load-balancing loss as in Switch Transformers, summed over the layers."""
        total: torch.Tensor | float = 0.0
        for probabilities, chosen in self._seen:
            experts = probabilities.shape[-1]
            used = torch.zeros(experts, device=chosen.device).index_add_(
                0, chosen.flatten(), torch.ones(chosen.numel(), device=chosen.device)
            )
            total = total + experts * (used / chosen.numel() * probabilities.mean(0)).sum()
        self._seen.clear()
        return total


def use_dense_experts(model: PreTrainedModel) -> None:
    """Replace the experts' forward in this model only."""
    for module in model.modules():
        if type(module).__name__ == "Gemma4TextExperts":
            module.forward = MethodType(dense_forward, module)
