"""Mixtures of experts in steps of few rows: a row's result does not depend on what the other rows chose.

Transformers' implementations group the rows by expert, so that the shape of an expert's product, and with it the kernel
and the order of its sums, depends on how many rows of the step chose that expert.
"""

from __future__ import annotations

from typing import Any

import torch
from polydraft.errors import UnsupportedError
from torch.nn import functional
from transformers.integrations import moe
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from polydraft_transformers.step_experts import ACTIVATIONS, mix
from polydraft_transformers.step_products import runs_kernels

__all__ = ["FEW_ROWS", "MOST_ROWS", "WHOLE_STEP", "experts_implementation", "set_experts"]

WHOLE_STEP = "polydraft_whole_step"
"""Name of ``_whole_step`` among Transformers' experts implementations."""

FEW_ROWS = "polydraft_few_rows"
"""Name of ``_few_rows``."""

MOST_ROWS = 128
"""Most rows of a step. More are a prompt's, which runs the same with and without speculation."""


def experts_implementation(named: str | None, dtype: torch.dtype, device: torch.device, *, fixed: bool) -> str | None:
    """The experts implementation that a session loads its models with; None: Transformers' own choice.

    Args:
        named: The user's option ``experts_implementation``.
        dtype: Of the weights.
        device: Where the model runs.
        fixed: Whether steps have a fixed shape (``exactness="bitwise"``).

    Raises:
        UnsupportedError: ``named`` mixes the rows of a step, and steps are fixed.
    """
    on_gpu = device.type == "cuda"
    one_kernel = on_gpu and _has_one_kernel(dtype, device)
    independent = {None, "batched_mm", *(("grouped_mm",) if one_kernel else ())}
    if fixed and named not in independent:
        raise UnsupportedError(
            f"`experts_implementation={named!r}` groups the rows of a step by expert, and `exactness='bitwise'` needs "
            "rows that do not depend on one another.",
            "Leave the option out, give 'batched_mm', or use `exactness='standard'`.",
        )
    if named is None and runs_kernels(device):
        ALL_EXPERTS_FUNCTIONS.register(FEW_ROWS, _few_rows)
        return FEW_ROWS
    if on_gpu and named is None and (fixed or dtype == torch.float32):
        return "grouped_mm" if one_kernel else "batched_mm"
    if on_gpu or not fixed:
        return named
    ALL_EXPERTS_FUNCTIONS.register(WHOLE_STEP, _whole_step)
    return named or WHOLE_STEP


def _has_one_kernel(dtype: torch.dtype, device: torch.device) -> bool:
    # torch's grouped_mm has one kernel for all groups in bfloat16 on compute capability 9 and later. Elsewhere it
    # copies the groups' ends to the host: that cannot be captured, and the shapes of products depend on the groups.
    return dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (9, 0)


def set_experts(model: Any, implementation: str, name: str, *, mixture: bool) -> None:
    """Make sure that all experts of a model run as ``implementation`` says: loading alone does not reach all of them.

    Args:
        model: Transformers' model, loaded.
        implementation: As ``experts_implementation`` gives it for a fixed step.
        name: Of the model, for the error.
        mixture: Whether the config is that of a mixture.

    Raises:
        UnsupportedError: The model's own code runs them, which may mix the rows of a step.
    """
    # What Transformers' decorator `use_experts_implementation` sets.
    experts = [module for module in model.modules() if hasattr(module, "has_gate") and hasattr(module, "is_transposed")]
    if any(module.config._experts_implementation != implementation for module in experts):
        model.set_experts_implementation(implementation)
    own_way = any(module.config._experts_implementation != implementation for module in experts)
    if own_way or (mixture and not experts):
        raise UnsupportedError(
            f"The experts of {name} can only be run by the model's own code, which may mix the rows of a step.",
            "Use `exactness='standard'`.",
        )


def _few_rows(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Run a step's rows by the kernels of ``step_experts``; a prompt's, and experts of another form, grouped.

    Arguments and result are those of ``_whole_step``.
    """
    activation: Any = getattr(self.config, "hidden_activation", None) or getattr(self.config, "hidden_act", None)
    known = (
        (self.has_gate and getattr(self, "is_concatenated", True) and activation in ACTIVATIONS)
        and not (self.is_transposed or self.has_bias or getattr(self, "has_post_expert_norm", False))
        and type(self)._apply_gate.__module__ == moe.__name__  # the usual one: activation(gate) * up
    )
    rows = len(hidden_states)
    if rows <= MOST_ROWS and known:
        weights = top_k_weights.float()
        found = mix(hidden_states, self.gate_up_proj, self.down_proj, weights, top_k_index, activation)
        return found.sum(1).to(hidden_states.dtype)
    grouped = rows > MOST_ROWS or _has_one_kernel(hidden_states.dtype, hidden_states.device)
    other: torch.Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm" if grouped else "batched_mm"](
        self, hidden_states, top_k_index, top_k_weights
    )
    return other


def _whole_step(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Run each expert that any row chose over all rows, and keep the rows that chose it.

    Small steps are bound by reading weights, and each expert's are read once. Arguments and result are those of
    Transformers' experts implementations (integrations/moe.py).

    Args:
        self: Transformers' module of the experts.
        hidden_states: Shape (rows, hidden_size).
        top_k_index: Int64, shape (rows, top_k): the experts of each row.
        top_k_weights: Shape (rows, top_k).
    """
    rows, width = hidden_states.shape
    if rows > MOST_ROWS:
        grouped: torch.Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)
        return grouped
    name = "gate_up_proj" if self.has_gate else "up_proj"
    found = hidden_states.new_zeros(rows, top_k_index.shape[1], width)
    # tolist would wait for a GPU; this implementation is registered for CPUs only.
    chosen: list[int] = sorted(set(top_k_index.flatten().tolist()))
    for expert in chosen:
        inner = _linear(self, name, expert, hidden_states)
        inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
        outer = _linear(self, "down_proj", expert, inner)
        if getattr(self, "has_post_expert_norm", False):  # since Transformers 5.22
            outer = self.post_expert_norm(outer)
        row, place = (top_k_index == expert).nonzero(as_tuple=True)
        found[row, place] = outer[row]
    # Summed in the order of the row's own choices.
    return (found * top_k_weights.unsqueeze(-1)).sum(dim=1).to(hidden_states.dtype)


def _linear(self: Any, name: str, expert: int, inputs: torch.Tensor) -> torch.Tensor:
    """One expert's projection ``name`` of all rows."""
    weight = getattr(self, name)[expert]
    bias = getattr(self, f"{name}_bias")[expert] if self.has_bias else None
    # Transposed weights are stored as (in, out).
    return functional.linear(inputs, weight.T if self.is_transposed else weight, bias)
