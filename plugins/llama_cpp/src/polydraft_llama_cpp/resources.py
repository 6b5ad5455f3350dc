"""Devices, threads and memory: what there is, and what a context takes.

Known from the GGUF header before llama.cpp is asked, which may end the process where memory runs out.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from typing import Any

from polydraft.checkpoints.gguf import GgufHeader
from polydraft.contract import DeviceRecord
from polydraft.errors import DeviceError, InvalidRequestError

from polydraft_llama_cpp.bindings import library

__all__ = [
    "Device",
    "check_layers",
    "context_bytes",
    "default_threads",
    "device_name",
    "devices",
    "find_device",
]

_GPU_TYPES = {1, 2}  # GGML_BACKEND_DEVICE_TYPE_GPU, _IGPU


@dataclass(frozen=True, slots=True)
class Device:
    """A device that llama.cpp was built for and sees."""

    record: DeviceRecord
    """Its name is ``cpu``, ``cuda:0``, ``mps`` (Metal) or ``vulkan:0``."""
    handle: int
    is_cpu: bool

    @property
    def name(self) -> str:
        """The device's name in polydraft's spelling."""
        return self.record.name


@cache
def devices() -> tuple[Device, ...]:
    """The devices of this build, the CPU first. Accelerators without their own memory (BLAS) are left out."""
    lib = library()._lib
    try:
        count, get = lib.ggml_backend_dev_count, lib.ggml_backend_dev_get
        name, describe = lib.ggml_backend_dev_name, lib.ggml_backend_dev_description
        memory, kind = lib.ggml_backend_dev_memory, lib.ggml_backend_dev_type
    except AttributeError:  # a build that hides them: then only the CPU is known
        return (Device(DeviceRecord(name="cpu", description="CPU"), 0, is_cpu=True),)
    count.restype, get.restype, get.argtypes = ctypes.c_size_t, ctypes.c_void_p, [ctypes.c_size_t]
    for text in (name, describe):
        text.restype, text.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    memory.restype, memory.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    kind.restype, kind.argtypes = ctypes.c_int, [ctypes.c_void_p]
    found = []
    for index in range(count()):
        handle = get(index)
        is_cpu = kind(handle) == 0
        if not is_cpu and kind(handle) not in _GPU_TYPES:
            continue
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        memory(handle, ctypes.byref(free), ctypes.byref(total))
        record = DeviceRecord(
            name="cpu" if is_cpu else device_name(name(handle).decode()),
            description=describe(handle).decode(),
            total_memory_bytes=total.value or None,
            free_memory_bytes=free.value or None,
        )
        found.append(Device(record, int(handle), is_cpu=is_cpu))
    return tuple(sorted(found, key=lambda device: not device.is_cpu))


def device_name(name: str) -> str:
    """``CUDA0`` becomes ``cuda:0``; Metal's ``MTL0`` and ``Metal`` become ``mps``."""
    kind = name.rstrip("0123456789")
    if kind.lower() in {"mtl", "metal"}:
        return "mps"
    return f"{kind.lower()}:{name[len(kind) :] or '0'}"


def find_device(name: str) -> Device | None:
    """The device called ``cpu``, ``cuda``, ``cuda:1`` or ``mps``; None for ``auto`` if there is a GPU.

    Raises:
        DeviceError: This build of llama.cpp does not see such a device.
    """
    found = devices()
    if name == "auto":
        return found[0] if len(found) == 1 else None
    for device in found:
        if name in {device.name, device.name.removesuffix(":0")}:
            return device
    raise DeviceError(
        f"The device {name} was asked for, and this build of llama-cpp-python sees: "
        f"{', '.join(device.name for device in found)}.",
        "For a GPU, build it with CMAKE_ARGS='-DGGML_CUDA=on' (Metal: -DGGML_METAL=on, Vulkan: -DGGML_VULKAN=on).",
    )


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


def default_threads() -> int:
    """OMP_NUM_THREADS if it is set, else the number of cores that this process may use."""
    named = os.environ.get("OMP_NUM_THREADS", "")
    if named.isdigit() and int(named) > 0:
        return int(named)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
    dim = int(get("attention.key_length") or get("embedding_length", 0) // max(1, max(heads, default=1)))
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
        width = int(get("attention.key_length_swa", dim)) if sliding[layer] else dim
        tokens = min(length, window) if sliding[layer] and not swa_full else length
        total += tokens * kv_heads[layer] * width * number_bytes
    scores = 0 if flash_attn else 4 * n_batch * length * max(heads, default=1)  # float32
    return int(total) + scores


def _by_layer(value: Any, layers: int) -> list[int]:
    return [int(item) for item in value] if isinstance(value, tuple) else [int(value)] * layers
