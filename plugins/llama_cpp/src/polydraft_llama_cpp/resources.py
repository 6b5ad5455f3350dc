"""The devices that llama.cpp sees in this process."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

from polydraft.contract import DeviceRecord
from polydraft.errors import DeviceError
from polydraft_gguf.resources import device_name

from polydraft_llama_cpp.bindings import library
from polydraft_llama_cpp.plugin import CUDA_FLAGS

__all__ = ["Device", "devices", "find_device"]

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
        f"The device {name} was asked for, and this build of llama.cpp sees: "
        f"{', '.join(device.name for device in found)}.",
        f"For a GPU, install llama-cpp-python, built with CMAKE_ARGS='{CUDA_FLAGS}' (Metal: -DGGML_METAL=on, Vulkan: "
        "-DGGML_VULKAN=on).",
    )
