"""Device, dtype and memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polydraft.checkpoints.config import text_config
from polydraft.contract import DeviceRecord
from polydraft.engine_parts import context_length
from polydraft.errors import DeviceError, InvalidRequestError
from polydraft.hardware import cpu_dtype, free_memory

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from polydraft.contract import LoadRequest, MatmulPrecision

    from polydraft_vllm.versions import InstalledVllm

__all__ = ["check_device", "check_dtype", "choose_dtype", "default_kv_bytes", "gpus", "matmul_precision"]

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "float": "float32", "half": "float16"}
_KNOWN_DTYPES = ("auto", "float32", "float16", "bfloat16")
_CONTEXTS = 8
_LEAST_KV_BYTES = 64 << 20
_MOST_KV_BYTES = 4 << 30


def matmul_precision(dtype: str, device: str, environment: Mapping[str, str]) -> MatmulPrecision | None:
    """What factors of float32 products are rounded to on a GPU, if the user's variables ask for it; None: they are not.

    Products of weights go by ``VLLM_FLOAT32_MATMUL_PRECISION`` (a precision of ``torch.set_float32_matmul_precision``),
    those of attention, in Triton, by ``TRITON_F32_DEFAULT``. ``environment``: variables of vLLM's process.
    """
    weights = environment.get("VLLM_FLOAT32_MATMUL_PRECISION", "highest").lower()
    rounds = weights != "highest" or environment.get("TRITON_F32_DEFAULT", "tf32") == "tf32"
    return "tf32" if dtype == "float32" and device.startswith("cuda") and rounds else None


def gpus() -> tuple[DeviceRecord, ...]:
    """The GPUs that torch sees."""
    import torch

    records = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        records.append(
            DeviceRecord(
                name=f"cuda:{index}",
                description=torch.cuda.get_device_name(index),
                total_memory_bytes=total,
                free_memory_bytes=free,
            )
        )
    return tuple(records)


def check_device(device: str) -> None:
    """Refuse any GPU but the first.

    Raises:
        DeviceError: ``device`` names another one.
    """
    if ":" in device and not device.endswith(":0"):
        raise DeviceError(
            f"vLLM starts with the first GPU that it sees; it cannot be given the device {device}.",
            "Set CUDA_VISIBLE_DEVICES before Python starts, and use `device='cuda'`.",
        )


def check_dtype(name: str) -> str:
    """vLLM's name of a dtype.

    Raises:
        InvalidRequestError: It is unknown.
    """
    known = _DTYPES.get(name, name)
    if known not in _KNOWN_DTYPES:
        raise InvalidRequestError(
            f"`dtype={name!r}` is unknown.", f"Give {', '.join(_KNOWN_DTYPES)}.", argument="dtype"
        )
    return known


def choose_dtype(request: LoadRequest, installed: InstalledVllm, target: Path, drafter: Path | None) -> tuple[str, str]:
    """The dtype for vLLM, and a note, which may be empty. On CPUs ``auto`` is ``polydraft.hardware.cpu_dtype``."""
    name = check_dtype(request.dtype)
    if name != "auto" or not installed.is_cpu_build:
        return name, ""
    folders = [folder for folder in (target, drafter) if folder is not None]
    found, note = cpu_dtype(request.target.config, folders, free_memory())
    # vLLM's own "auto" runs a float32 checkpoint in 16 bits.
    return (found if note or found == "float32" else name), note


def default_kv_bytes(request: LoadRequest) -> int:
    """Bytes of KV cache on CPU unless the user gives them: 8 full contexts, at most 4 GiB or a quarter of free memory.

    vLLM reserves 90% of memory by default and touches all of it at start.
    """
    text = text_config(request.target.config)
    attention_heads = text.get("num_attention_heads") or 1
    # Gemma 4's full-attention layers have wider heads: the wider size for all layers is an upper bound.
    head_dim = max(
        text.get("head_dim") or (text.get("hidden_size") or 0) // attention_heads, text.get("global_head_dim") or 0
    )
    kv_heads = text.get("num_key_value_heads") or attention_heads
    token = 2 * 4 * (text.get("num_hidden_layers") or 1) * kv_heads * head_dim  # keys and values, at most 4 bytes each
    wanted = _CONTEXTS * token * context_length(request)
    return int(max(_LEAST_KV_BYTES, min(wanted, _MOST_KV_BYTES, free_memory() // 4)))
