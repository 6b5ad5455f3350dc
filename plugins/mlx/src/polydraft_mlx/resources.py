"""The device, its free memory, a stream that any thread may use, and MLX's errors as polydraft's."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from polydraft import hardware
from polydraft.errors import DeviceError, EngineError, OutOfMemoryError, PolydraftError

if TYPE_CHECKING:
    from polydraft.contract import MatmulPrecision

__all__ = [
    "Runtime",
    "ask_for_full_float32",
    "devices",
    "find_device",
    "free_memory",
    "in_one_line",
    "matmul_precision",
    "start",
]

_LOCK = threading.Lock()
"""One for all sessions: a stream that any thread may use must not be used by two at a time."""

_NO_MEMORY = re.compile(
    r"^\[[^\]]*malloc\]|^\[METAL\].*Insufficient Memory|^cuda.*out of memory", re.IGNORECASE | re.DOTALL
)


_GPU_NAMES = {"gpu", "metal", "mps", "cuda"}


class Runtime:
    """The device and stream of one engine.

    An ordinary stream of MLX belongs to the thread that made it (since 0.31.2), and a lazy array to its stream. Several
    threads use an engine, one at a time, so its stream is a thread-unsafe one.

    Args:
        device: From ``find_device``.
    """

    def __init__(self, device: mx.Device) -> None:
        self.device = device
        self.name = device_name(device)
        self._stream: Any = mx.new_thread_unsafe_stream(device)

    @contextmanager
    def use(self, what: str) -> Iterator[None]:
        """A context for all work with MLX. Evaluate what is needed before leaving it.

        Args:
            what: What is being done, for error messages: "A prompt was run".

        Raises:
            OutOfMemoryError: MLX could not allocate memory.
            EngineError: MLX failed otherwise.
        """
        with _LOCK, mx.stream(self._stream):
            try:
                yield
            except PolydraftError:
                raise
            except (RuntimeError, MemoryError) as error:
                # MLX's own errors start with "[operation]"; others, such as a logits processor's, pass.
                text = str(error)
                if isinstance(error, MemoryError) or _NO_MEMORY.search(text):
                    raise OutOfMemoryError(
                        f"{what}, but memory ran out: {text or error!r}",
                        "Give a smaller `context_length`, a shorter prompt, or a quantized model.",
                    ) from error
                if text.startswith("["):
                    raise EngineError(f"{what}, but MLX failed: {text}", "Report it with this message.") from error
                raise


def start(array: mx.array) -> None:
    """Let a GPU compute an array while the next step's graph is built. On the CPU this costs more than it saves."""
    if mx.default_device().type == mx.gpu:
        mx.async_eval(array)


def find_device(name: str) -> mx.Device:
    """Resolve a device name: ``auto``, ``cpu``, ``gpu`` (Metal or CUDA), ``gpu:1``.

    Raises:
        DeviceError: It does not exist here, or the name is unknown.
    """
    if name == "auto":
        return mx.default_device()
    kind, _, index = name.partition(":")
    if kind == "cpu" and index in {"", "0"}:
        return mx.Device(mx.cpu, 0)
    here = ", ".join(devices())
    if kind not in _GPU_NAMES or not (index or "0").isdigit():
        raise DeviceError(f"MLX has no device {name!r}; available: {here}.", "Use auto, cpu or gpu.")
    count = gpu_count()
    wrong_kind = (kind in {"metal", "mps"} and not mx.metal.is_available()) or (
        kind == "cuda" and not mx.cuda.is_available()
    )
    if wrong_kind or int(index or 0) >= count:
        raise DeviceError(
            f"The device {name} does not exist here; MLX {version('mlx')} has: {here}.",
            "Use `device='cpu'`, or a Mac with Apple silicon, or on Linux with an NVIDIA GPU: "
            "pip install 'mlx[cuda13]'.",
        )
    return mx.Device(mx.gpu, int(index or 0))


def ask_for_full_float32() -> None:
    """Have MLX multiply float32 in float32; what the user has set stays.

    By default it multiplies in TF32 on NVIDIA GPUs, and in a like precision on an M5 and later (MLX's issue 3860). It
    looks once, at its first product on a GPU.
    """
    os.environ.setdefault("MLX_ENABLE_TF32", "0")


def matmul_precision(dtype: str) -> MatmulPrecision | None:
    """What MLX rounds the factors of float32 products to on the default device; None: nothing, or another dtype."""
    if dtype != "float32":
        return None
    fine = mx.full((128, 128), 1 + 2.0**-12, mx.float32)  # TF32 has 10 bits after the point
    return None if float((fine @ mx.eye(128))[0, 0]) > 1 else "tf32"


def gpu_count() -> int:
    """Number of GPUs that the installed build of MLX can use."""
    if not (mx.metal.is_available() or mx.cuda.is_available()):
        return 0
    return int(mx.device_count(mx.gpu))


def devices() -> list[str]:
    """Names of the devices, best first."""
    return [*(f"gpu:{index}" if index else "gpu" for index in range(gpu_count())), "cpu"]


def device_name(device: mx.Device) -> str:
    """The device's name, as accepted by ``find_device``."""
    if device.type == mx.cpu:
        return "cpu"
    # The text is ``Device(gpu, 1)``.
    index = int(str(device).rpartition(",")[2].strip(" )"))
    return f"gpu:{index}" if index else "gpu"


def free_memory(device: mx.Device) -> int:
    """Bytes that can still be allocated; on Apple silicon CPU and GPU share them."""
    info: dict[str, Any] = mx.device_info(device)
    if device.type == mx.gpu:
        if "free_memory" in info:  # CUDA
            return int(info["free_memory"])
        limit = int(info.get("max_recommended_working_set_size") or info["memory_size"])
        return limit - int(mx.get_active_memory())
    return hardware.free_memory()


def in_one_line(error: Exception) -> str:
    """The message of a loader's error, which may list hundreds of names, as one readable line."""
    text = " ".join(str(error).split()).rstrip(".")
    return f"{text[:300]}{' ...' if len(text) > 300 else '.'}" if text else f"{error!r}."
