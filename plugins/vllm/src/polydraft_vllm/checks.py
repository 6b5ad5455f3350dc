"""Pairs and options that vLLM cannot run, found in configs and options before anything is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from polydraft.checkpoints.config import is_assistant, layer_types, text_config
from polydraft.errors import InvalidRequestError, UnsupportedError

from polydraft_vllm.resources import check_device, check_dtype

if TYPE_CHECKING:
    from polydraft.contract import LoadRequest, ModelSource, SpeculationPlan

    from polydraft_vllm.options import VllmOptions

__all__ = ["CPU_HEAD_SIZES", "check_request", "refusal"]

CPU_HEAD_SIZES = frozenset({32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512})
"""Head sizes of vLLM's CPU attention (measured with 0.32: others fail in the first forward)."""


def refusal(target: ModelSource, plan: SpeculationPlan, *, cpu: bool) -> str | None:
    """Why vLLM (``cpu``: its CPU build) cannot run this target or pair, one sentence; None if it can."""
    if is_assistant(target.config):
        return f"{target.id} is an assistant (a drafter); it cannot generate by itself."
    if plan.kind == "draft-model" and {"sliding_attention", "full_attention"} <= set(layer_types(target.config)):
        return (
            f"{target.id} has sliding and full attention, and vLLM's draft-model proposer reads the block table of the "
            "first KV group only: its output would be wrong. Use the target's assistant (mtp) or `drafter='ngram'`."
        )
    if plan.kind == "draft-model" and plan.drafter is not None:
        sizes = [text_config(source.config).get("vocab_size") for source in (target, plan.drafter)]
        if None not in sizes and sizes[0] != sizes[1]:
            return (
                "vLLM runs draft models whose vocabulary has the target's size only: "
                f"{target.id} has {sizes[0]} tokens, {plan.drafter.id} {sizes[1]}."
            )
    for source in (target, plan.drafter) if cpu else ():
        unknown = sorted(_head_sizes(source.config) - CPU_HEAD_SIZES) if source is not None else []
        if source is not None and unknown:
            return (
                f"{source.id} has attention heads of size {unknown[0]}, and vLLM's CPU attention supports "
                f"{', '.join(map(str, sorted(CPU_HEAD_SIZES)))}."
            )
    return None


def check_request(request: LoadRequest) -> None:
    """Refuse a dtype or device that vLLM does not have, and workers that cannot share the attention heads or the batch.

    Raises:
        InvalidRequestError: The dtype is unknown, or the heads cannot be shared.
        DeviceError: The device is not the first GPU.
        UnsupportedError: Workers sample requests of their own.
    """
    check_dtype(request.dtype)
    check_device(request.device)
    options: VllmOptions = request.engine_options
    if options.further.get("enable_batch_sharded_sampling"):
        raise UnsupportedError(
            "With enable_batch_sharded_sampling vLLM needs counts of bad logits by row; polydraft has them by request.",
            "Leave the option out.",
        )
    size = options.tensor_parallel_size
    draft_size = options.speculative_config.get("draft_tensor_parallel_size") or size
    for source, workers in ((request.target, size), (request.plan.drafter, draft_size)):
        heads = text_config(source.config).get("num_attention_heads") if source is not None else None
        if source is not None and isinstance(heads, int) and isinstance(workers, int) and heads % workers:
            raise InvalidRequestError(
                f"{source.id} has {heads} attention heads, which {workers} workers cannot share.",
                "Give another tensor_parallel_size, or another drafter.",
            )


def _head_sizes(config: Mapping[str, Any]) -> set[int]:
    text = text_config(config)
    own = {size for name in ("head_dim", "global_head_dim") if isinstance(size := text.get(name), int)}
    hidden, heads = text.get("hidden_size"), text.get("num_attention_heads")
    if not own and isinstance(hidden, int) and isinstance(heads, int) and heads:
        own = {hidden // heads}
    return own
