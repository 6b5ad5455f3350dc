"""Which device, as the request names it, and how many threads."""

from __future__ import annotations

import os

from polydraft.errors import DeviceError, InvalidRequestError

from polydraft_llama_cpp.bindings import Device, devices

__all__ = ["check_layers", "find_device", "usual_threads"]


def find_device(name: str) -> Device | None:
    """The device of a name such as ``cpu``, ``cuda``, ``cuda:1`` or ``mps``; None for ``auto`` with a GPU.

    Raises:
        DeviceError: This build of llama.cpp sees no such device.
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
        "For a GPU build it with CMAKE_ARGS='-DGGML_CUDA=on' (Metal: -DGGML_METAL=on, Vulkan: -DGGML_VULKAN=on).",
    )


def check_layers(option: str, layers: int | None, *, on_gpu: bool) -> None:
    """Layers for a GPU where none is used would be a wish that nobody hears.

    Raises:
        InvalidRequestError: Layers were given, and the model runs on the CPU.
    """
    if layers and not on_gpu:
        raise InvalidRequestError(
            f"{option} is {layers}, and the model runs on the CPU.",
            "Leave it out; for a GPU use a build of llama.cpp for it (`polydraft doctor` tells what this one sees).",
        )


def usual_threads() -> int:
    """OMP_NUM_THREADS if it is set, else the cores that this process may use."""
    named = os.environ.get("OMP_NUM_THREADS", "")
    if named.isdigit() and int(named) > 0:
        return int(named)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
