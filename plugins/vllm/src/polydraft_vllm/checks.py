"""What the CPU build and vLLM's drafters cannot run, read off the configs before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polydraft.contract import ModelSource, SpeculationPlan

__all__ = ["CPU_HEAD_SIZES", "refusal"]

CPU_HEAD_SIZES = frozenset({32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512})
"""Head sizes of vLLM's CPU attention (0.32, measured: others fail at the first forward)."""


def refusal(target: ModelSource, plan: SpeculationPlan, *, cpu: bool) -> str | None:
    """Why vLLM cannot run this target or pair, one sentence; None if it can.

    Args:
        target: The target.
        plan: The drafter.
        cpu: Whether the CPU build is installed.
    """
    if target.model_type.endswith("_assistant"):
        return f"{target.id} is an assistant (a drafter); it cannot generate by itself."
    if plan.kind == "draft-model" and _mixes_attention(target.config):
        return (
            f"{target.id} has sliding and full attention, and vLLM's draft-model proposer reads the block table of the "
            "first KV group only: its output would be wrong. Use the target's assistant (mtp) or drafter='ngram'."
        )
    if cpu:
        for source in (target, plan.drafter):
            sizes = _head_sizes(source.config) if source is not None else set()
            if odd := sorted(sizes - CPU_HEAD_SIZES):
                assert source is not None
                return (
                    f"{source.id} has attention heads of size {odd[0]}, and vLLM's CPU attention knows "
                    f"{', '.join(map(str, sorted(CPU_HEAD_SIZES)))}."
                )
    return None


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def _mixes_attention(config: Mapping[str, Any]) -> bool:
    layers = _text(config).get("layer_types")
    return isinstance(layers, list) and {"sliding_attention", "full_attention"} <= set(layers)


def _head_sizes(config: Mapping[str, Any]) -> set[int]:
    text = _text(config)
    own = {size for name in ("head_dim", "global_head_dim") if isinstance(size := text.get(name), int)}
    hidden, heads = text.get("hidden_size"), text.get("num_attention_heads")
    if not own and isinstance(hidden, int) and isinstance(heads, int) and heads:
        own = {hidden // heads}
    return own
