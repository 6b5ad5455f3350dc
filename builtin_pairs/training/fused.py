"""Norms as one kernel: most of the time of a small model's training step goes into unfused elementwise work."""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def rms_forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """What the norm computes in fp32; under autocast the result is rounded to what the next product takes anyway."""
    weight = getattr(self, "weight", None)
    eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
    normed = nn.functional.rms_norm(hidden_states.float(), hidden_states.shape[-1:], weight, eps)
    device = hidden_states.device.type
    return normed.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype)


def use_fused_norms(model: PreTrainedModel) -> None:
    """Replaces the norms' forward on this model only."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(rms_forward, module)
