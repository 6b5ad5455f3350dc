"""Norms as one kernel: unfused elementwise operations take most of a small model's training step."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def rms_forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """The norm, computed in fp32; under autocast rounded to the dtype that the next product uses anyway."""
    weight = getattr(self, "weight", None)
    eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
    normed = nn.functional.rms_norm(hidden_states.float(), hidden_states.shape[-1:], weight, eps)
    device = hidden_states.device.type
    return normed.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype)


def use_fused_norms(model: PreTrainedModel) -> None:
    """Replace the norms' forward in this model only."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(rms_forward, module)
