"""How much memory a context takes, by the GGUF header: known before llama.cpp is asked, which may end the process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from polydraft.checkpoints.gguf import GgufHeader

__all__ = ["available_bytes", "context_bytes"]

_BYTES = {
    "f32": 4.0,
    "f16": 2.0,
    "bf16": 2.0,
    "q8_0": 34 / 32,
    "q5_1": 24 / 32,
    "q5_0": 22 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
    "iq4_nl": 18 / 32,
}
"""Bytes of one cached number: a block of 32 with its scale (``ggml/src/ggml-common.h``)."""


_CGROUP = Path("/sys/fs/cgroup")
"""Where a container sees the limits that it runs under (cgroup v2); more than that ends the process."""


def available_bytes() -> int:
    """Memory that can be had without swapping, and within the container's limit."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    return min(free, _left_in_container(free))


def _left_in_container(otherwise: int) -> int:
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit == "max":
            return otherwise
        statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        used = int((_CGROUP / "memory.current").read_text()) - int(statistics.get("inactive_file", 0))
        return max(0, int(limit) - used)
    except (OSError, ValueError):  # no such limit here
        return otherwise


def context_bytes(
    header: GgufHeader, length: int, n_batch: int, types: tuple[str, str], *, flash_attn: bool, swa_full: bool
) -> int:
    """Bytes of the cache and of the largest buffer of a forward, the attention scores.

    Args:
        header: The model's.
        length: Tokens of the cache.
        n_batch: Tokens of a forward.
        types: Of cached keys and values.
        flash_attn: Then scores are never held whole.
        swa_full: Whether sliding-window layers are cached in full length.
    """
    get = header.of_architecture
    layers = int(get("block_count", 0))
    heads = _by_layer(get("attention.head_count", 1), layers)
    kv_heads = _by_layer(get("attention.head_count_kv", get("attention.head_count", 1)), layers)
    dim = int(get("attention.key_length") or get("embedding_length", 0) // max(1, max(heads, default=1)))
    pattern = get("attention.sliding_window_pattern")
    sliding = [*(pattern if isinstance(pattern, tuple) else ()), *[False] * layers]
    window = int(get("attention.sliding_window") or 0) + n_batch
    total = 0.0
    for layer in range(layers - int(get("attention.shared_kv_layers") or 0)):
        width = int(get("attention.key_length_swa", dim)) if sliding[layer] else dim
        tokens = min(length, window) if sliding[layer] and not swa_full else length
        total += tokens * kv_heads[layer] * width * (_BYTES[types[0]] + _BYTES[types[1]])
    scores = 0 if flash_attn else 4 * n_batch * length * max(heads, default=1)
    return int(total) + scores


def _by_layer(value: Any, layers: int) -> list[int]:
    return [int(item) for item in value] if isinstance(value, tuple) else [int(value)] * layers
