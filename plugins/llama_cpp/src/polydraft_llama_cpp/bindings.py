"""llama-cpp-python's low-level API: imported on first use, its log kept for error messages, its devices.

MTP needs ``llama_cpp_ext``, which llama-cpp-python marks unstable; every other use is the stable API.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections import deque
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

__all__ = [
    "TESTED_FOR_MTP",
    "Device",
    "device_name",
    "devices",
    "extension",
    "library",
    "missing_for_mtp",
    "recent_errors",
    "version_of",
]

TESTED_FOR_MTP = ("0.3.36",)
"""Versions of llama-cpp-python that MTP has been tested with."""

_log = logging.getLogger("polydraft.llama_cpp")
_log.addHandler(logging.NullHandler())  # silent unless the app asks: what fails is raised with llama.cpp's words
_LEVELS = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.WARNING, 4: logging.ERROR}
_CONTINUED = 5
_errors: deque[str] = deque(maxlen=8)
_lock = threading.Lock()
_kept: list[Any] = []
"""Callbacks that native code holds: they must not be collected."""


@dataclass(frozen=True, slots=True)
class Device:
    """A device that llama.cpp was built for and sees."""

    name: str
    """As polydraft writes it: ``cpu``, ``cuda:0``, ``mps`` (Metal), ``vulkan:0``."""
    description: str
    handle: int
    free_bytes: int
    total_bytes: int
    is_cpu: bool


def version_of() -> str:
    """Version of llama-cpp-python."""
    return version("llama-cpp-python")


@cache
def library() -> Any:
    """The module ``llama_cpp.llama_cpp``, its backends made ready.

    Raises:
        ImportError: It is not installed, or its shared libraries cannot be loaded.
    """
    try:
        import llama_cpp.llama_cpp as bindings
    except (OSError, RuntimeError, FileNotFoundError) as error:  # what its loader raises for a broken build
        raise ImportError(str(error)) from error
    callback = bindings.llama_log_callback(_logged)
    _kept.append(callback)
    bindings.llama_log_set(callback, ctypes.c_void_p(0))
    bindings.llama_backend_init()
    return bindings


def _logged(level: int, text: bytes, _user: Any) -> None:
    line = text.decode("utf-8", "replace").rstrip()
    if not line or level == _CONTINUED:
        return
    if level >= 3:
        _errors.append(line)
    _log.log(_LEVELS.get(level, logging.DEBUG), "%s", line)


def recent_errors(*, forget: bool = False) -> str:
    """The last warnings and errors that llama.cpp logged, as one line; empty if there are none."""
    with _lock:
        lines = list(dict.fromkeys(_errors))
        if forget:
            _errors.clear()
    return "; ".join(lines[-3:])


@cache
def extension() -> Any:
    """The module ``llama_cpp.llama_cpp_ext``; None where this version has no MTP."""
    bindings = library()
    try:
        from llama_cpp import llama_cpp_ext
    except (ImportError, AttributeError):
        return None
    fields = dict(bindings.llama_context_params._fields_)
    if "ctx_other" not in fields or not hasattr(bindings, "LLAMA_CONTEXT_TYPE_MTP"):
        return None
    return llama_cpp_ext


def missing_for_mtp(*, allow_untested: bool = False) -> str:
    """Why MTP cannot be run with the installed version, one sentence; empty if it can."""
    installed = version_of()
    if extension() is None:
        return f"llama-cpp-python {installed} does not export what MTP needs (nextn embeddings, ctx_other)."
    if installed not in TESTED_FOR_MTP and not allow_untested:
        return (
            f"MTP uses an unstable interface of llama.cpp, tested with llama-cpp-python {', '.join(TESTED_FOR_MTP)}; "
            f"{installed} is installed."
        )
    return ""


@cache
def devices() -> tuple[Device, ...]:
    """The devices of this build, the CPU first. What has no memory of its own (BLAS, say) is left out."""
    lib = library()._lib
    try:
        count, get = lib.ggml_backend_dev_count, lib.ggml_backend_dev_get
        name, describe = lib.ggml_backend_dev_name, lib.ggml_backend_dev_description
        memory, kind = lib.ggml_backend_dev_memory, lib.ggml_backend_dev_type
    except AttributeError:  # a build that hides them: then only the CPU is known
        return (Device("cpu", "CPU", 0, 0, 0, True),)
    count.restype, get.restype, get.argtypes = ctypes.c_size_t, ctypes.c_void_p, [ctypes.c_size_t]
    for text in (name, describe):
        text.restype, text.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    memory.restype, memory.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    kind.restype, kind.argtypes = ctypes.c_int, [ctypes.c_void_p]
    found = []
    for index in range(count()):
        handle = get(index)
        is_cpu, is_gpu = kind(handle) == 0, kind(handle) in {1, 2}
        if not is_cpu and not is_gpu:
            continue
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        memory(handle, ctypes.byref(free), ctypes.byref(total))
        found.append(
            Device(
                "cpu" if is_cpu else device_name(name(handle).decode()),
                describe(handle).decode(),
                int(handle),
                free.value,
                total.value,
                is_cpu,
            )
        )
    return tuple(sorted(found, key=lambda device: not device.is_cpu))


def device_name(name: str) -> str:
    """``CUDA0`` becomes ``cuda:0``; Metal's ``MTL0`` and ``Metal`` become ``mps``."""
    kind = name.rstrip("0123456789")
    if kind.lower() in {"mtl", "metal"}:
        return "mps"
    return f"{kind.lower()}:{name[len(kind) :] or '0'}"
