"""The memory that a pair will take, counted before its weights are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from polydraft.checkpoints.config import family, text_config
from polydraft.checkpoints.safetensors import count_numbers
from polydraft.contract import LoadRequest
from polydraft.engine_parts.memory import MemoryEstimate, expected_tokens, kv_bytes
from transformers import CONFIG_MAPPING

from polydraft_transformers.decoder import CHUNK, LONG_CHUNK
from polydraft_transformers.prompt_attention import can_attend_prompt
from polydraft_transformers.resources import available_memory

__all__ = ["check_memory", "work_bytes"]


def check_memory(request: LoadRequest, folders: Iterable[Path], dtype: torch.dtype, device: torch.device) -> None:
    """Say what the pair in these folders will need, and compare it with the free memory.

    Raises:
        OutOfMemoryError: The weights, or a context that is asked for, do not fit.
        ModelFormatError: A file is missing or cut short.
    """
    plan, tokens = request.plan, expected_tokens(request)
    configs = [request.target.config]
    if plan.kind == "draft-model" and plan.drafter is not None:
        configs.append(plan.drafter.config)
    estimate = MemoryEstimate(
        weights=count_numbers(folders) * dtype.itemsize,
        kv=sum(kv_bytes(config, tokens, dtype.itemsize) or 0 for config in configs),
        tokens=tokens,
        work=work_bytes(request.target.config, tokens, request.engine_options.prefill_chunk_size, dtype, device),
    )
    free = available_memory(device)
    estimate.announce(request, str(device), free)
    estimate.check_fits(request, str(device), free)


def work_bytes(
    config: Mapping[str, Any], tokens: int, chunk: int | None, dtype: torch.dtype, device: torch.device
) -> int:
    """Bytes that a prompt of so many tokens takes beside weights and KV, run in chunks (None: of the usual size).

    That is the chunk's rows through the widest part of a layer. The factors fit what torch allocated for Gemma 4's four
    sizes on an H200, within 0.15 GiB.
    """
    text = text_config(config)
    kind = str(text.get("model_type"))
    # config.json leaves out what is the default of its kind.
    sizes = {**(CONFIG_MAPPING[kind]().to_dict() if kind in CONFIG_MAPPING else {}), **text}

    def size(name: str) -> int:
        value = sizes.get(name)
        return value if isinstance(value, int) else 0

    if chunk is None:
        head_dims = {size("head_dim"), size("global_head_dim") or size("head_dim")}
        long = family(text).startswith("gemma4") and can_attend_prompt(device, dtype, head_dims)
        chunk = LONG_CHUNK if long else CHUNK
    hidden, per_layer = size("hidden_size"), size("num_hidden_layers") * size("hidden_size_per_layer_input")
    row = 8 * hidden + 2 * size("num_attention_heads") * max(size("head_dim"), size("global_head_dim"))
    row += max(5 * per_layer, per_layer + 3 * size("intermediate_size"))
    experts = size("top_k_experts") or size("num_experts_per_tok")
    row += experts * (6 * hidden + 3 * size("moe_intermediate_size"))
    return min(chunk, tokens) * row * dtype.itemsize
