"""Device, dtype and memory of a pair."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from polydraft.checkpoints.config import checkpoint_dtype, family, text_config
from polydraft.checkpoints.safetensors import count_numbers
from polydraft.contract import LoadRequest
from polydraft.engine_parts.memory import MemoryEstimate, expected_tokens, kv_bytes
from polydraft.errors import DeviceError, InvalidRequestError, OutOfMemoryError, UnsupportedError
from polydraft.hardware import cpu_dtype, free_memory

from polydraft_transformers.decoder import CHUNK, LONG_CHUNK
from polydraft_transformers.prompt_attention import can_attend_prompt

__all__ = [
    "available_memory",
    "check_dtype",
    "check_memory",
    "choose_device",
    "choose_dtype",
    "out_of_memory",
    "work_bytes",
]

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def available_memory(device: torch.device) -> int:
    """Free bytes of a device."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    return free_memory()


def choose_device(name: str) -> torch.device:
    """The device that ``device`` names.

    Raises:
        InvalidRequestError: torch does not know the name.
        DeviceError: The device does not exist.
        UnsupportedError: This backend has not been tested on it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidRequestError(f"{name!r} is not a device.", "Give auto, cpu, cuda or cuda:0.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"The device {name} does not exist: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs.",
            "Use `device='cpu'`, or install a CUDA build of torch (`polydraft doctor` shows the devices).",
        )
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedError(
            f"The transformers backend has not been tested on {device.type}.", "Use `device='cpu'` or `device='cuda'`."
        )
    return device


def check_dtype(name: str) -> None:
    """Refuse an unknown dtype with ``InvalidRequestError``."""
    if name != "auto" and name not in _DTYPES:
        raise InvalidRequestError(f"`dtype={name!r}` is unknown.", f"Give auto, {', '.join(_DTYPES)}.")


def choose_dtype(request: LoadRequest, folders: Iterable[Path], device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype that the request asks for, and a note on it, which may be empty.

    ``auto`` is the checkpoint's own (float32 where it names none), but on CPUs by ``polydraft.hardware.cpu_dtype``.
    """
    if request.dtype != "auto":
        return _DTYPES[request.dtype], ""
    if device.type == "cpu":
        name, note = cpu_dtype(request.target.config, folders, available_memory(device))
    else:
        name, note = checkpoint_dtype(request.target.config), ""
    return _DTYPES.get(name, torch.float32), note


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

    def size(name: str) -> int:
        value = text.get(name)
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


def out_of_memory(error: BaseException, what: str, hint: str) -> OutOfMemoryError | None:
    """The error to raise where torch reports, in one of its ways, that memory ran out; None for any other error.

    Args:
        error: What torch raised.
        what: The sentence's end: "Memory ran out while ...".
        hint: What the user can do.
    """
    # torch's allocator for hosts raises a plain RuntimeError.
    plain = isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("not enough memory", "can't allocate memory")
    )
    if plain or isinstance(error, MemoryError | torch.OutOfMemoryError):
        return OutOfMemoryError(f"Memory ran out while {what}.", hint)
    return None
