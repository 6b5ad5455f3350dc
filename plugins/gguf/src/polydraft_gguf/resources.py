"""Devices, threads and memory, as far as they do not depend on how llama.cpp is reached.

Known from the GGUF header before llama.cpp is asked, which may end the process where memory runs out.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from polydraft.checkpoints.gguf import GgufHeader
from polydraft.errors import InvalidRequestError, UnsupportedError

if TYPE_CHECKING:
    from polydraft.contract import LoadRequest, MatmulPrecision

__all__ = [
    "check_layers",
    "check_prefix_cache",
    "context_bytes",
    "default_threads",
    "device_name",
    "head_sizes",
    "matmul_precision",
    "swa_note",
]


def device_name(name: str) -> str:
    """``CUDA0`` becomes ``cuda:0``; Metal's ``MTL0`` and ``Metal`` become ``mps``."""
    kind = name.rstrip("0123456789")
    if kind.lower() in {"mtl", "metal"}:
        return "mps"
    return f"{kind.lower()}:{name[len(kind) :] or '0'}"


def matmul_precision(dtype: str, device: str) -> MatmulPrecision | None:
    """What llama.cpp rounds the factors of a matrix product to, where that is below ``dtype``; None elsewhere.

    On NVIDIA GPUs since Ampere its products of float32 are TF32 wherever a step has more than one row: its own kernels
    up to 16 rows, and cuBLAS beyond. No option turns that off. Metal, Vulkan and the CPU keep float32.

    Args:
        dtype: Of the weights.
        device: One or several names, as ``device_name`` gives them.
    """
    on_cuda = any(name.startswith("cuda") for name in device.split(","))
    return "tf32" if dtype == "float32" and on_cuda else None


def check_layers(option: str, layers: int | None, *, on_gpu: bool) -> None:
    """Refuse GPU layers when the model runs on the CPU; they would be ignored.

    Raises:
        InvalidRequestError: They were given.
    """
    if layers and not on_gpu:
        raise InvalidRequestError(
            f"{option} is {layers}, and the model runs on the CPU.",
            "Leave it out; for a GPU, use a build of llama.cpp for it (`polydraft doctor` lists what this one sees).",
        )


def check_prefix_cache(request: LoadRequest) -> None:
    """Refuse ``prefix_cache_bytes=0`` for a server of which only the command is made: its requests ask to reuse or not.

    Raises:
        UnsupportedError: It was given.
    """
    if request.prefix_cache_bytes == 0:
        raise UnsupportedError(
            "`prefix_cache_bytes=0` has no effect: llama.cpp's server reuses prompts unless a request says otherwise.",
            'Leave it out, and send `"cache_prompt": false` with the requests.',
        )


def swa_note(swa_full: bool, header: GgufHeader) -> str:
    """That ``swa_full`` was given for a model without sliding-window layers, one sentence; else empty."""
    if not swa_full or header.of_architecture("attention.sliding_window"):
        return ""
    return "swa_full has no effect: the target has no sliding-window layers."


def default_threads() -> int:
    """OMP_NUM_THREADS if it is set, else the number of cores that this process may use."""
    named = os.environ.get("OMP_NUM_THREADS", "")
    if named.isdigit() and int(named) > 0:
        return int(named)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def head_sizes(header: GgufHeader) -> tuple[int, int]:
    """Numbers in a head's key: of layers without a sliding window, and of those with one."""
    get = header.of_architecture
    most = max(_by_layer(get("attention.head_count", 1), int(get("block_count", 0))), default=1)
    dim = int(get("attention.key_length") or get("embedding_length", 0) // max(1, most))
    return dim, int(get("attention.key_length_swa", dim))


def context_bytes(
    header: GgufHeader, length: int, n_batch: int, types: tuple[str, str], *, flash_attn: bool, swa_full: bool
) -> int:
    """Bytes of the KV cache and of the largest buffer of a forward, the attention scores.

    The cache holds ``length`` tokens (in sliding-window layers only with ``swa_full``) as keys and values of two
    ``types``; a forward runs ``n_batch`` tokens, and never stores all scores with ``flash_attn``.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    get = header.of_architecture
    layers = int(get("block_count", 0))
    heads = _by_layer(get("attention.head_count", 1), layers)
    kv_heads = _by_layer(get("attention.head_count_kv", get("attention.head_count", 1)), layers)
    dim, sliding_dim = head_sizes(header)
    pattern = get("attention.sliding_window_pattern")
    sliding = [*(pattern if isinstance(pattern, tuple) else ()), *[False] * layers]
    # Besides its window, a sliding layer stores the batch that is being run.
    window = int(get("attention.sliding_window") or 0) + n_batch
    # Quantized numbers are stored in blocks with a scale.
    number_bytes = sum(
        size / block for block, size in (GGML_QUANT_SIZES[GGMLQuantizationType[name.upper()]] for name in types)
    )
    total = 0.0
    for layer in range(layers - int(get("attention.shared_kv_layers") or 0)):
        width = sliding_dim if sliding[layer] else dim
        tokens = min(length, window) if sliding[layer] and not swa_full else length
        total += tokens * kv_heads[layer] * width * number_bytes
    scores = 0 if flash_attn else 4 * n_batch * length * max(heads, default=1)  # float32
    return int(total) + scores


def _by_layer(value: Any, layers: int) -> list[int]:
    return [int(item) for item in value] if isinstance(value, tuple) else [int(value)] * layers
