"""llama.cpp's low-level API: loaded on first use, its log kept for error messages.

It is llama-cpp-python's, compiled for this machine, where that is installed; else that of xllamacpp's wheel. MTP needs
``llama_cpp_ext``, which llama-cpp-python marks unstable; every other use is the stable API.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections import deque
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from polydraft.checkpoints.contents import libraries_digest
from polydraft_gguf.environment import set_needed_environment

from polydraft_llama_cpp import wheel

__all__ = [
    "COMPILED",
    "TESTED_FOR_MTP",
    "WHEEL",
    "build",
    "engine_name",
    "extension",
    "library",
    "missing_for_mtp",
    "recent_errors",
    "system_info",
    "version_of",
]

COMPILED, WHEEL = "llama-cpp-python", "xllamacpp"
"""The distributions that bring llama.cpp: the first that is installed is used."""
TESTED_FOR_MTP = {COMPILED: ("0.3.36",), WHEEL: wheel.TESTED}
"""Versions that MTP has been tested with."""

_log = logging.getLogger("polydraft.llama_cpp")
_log.addHandler(logging.NullHandler())  # silent unless the app asks: errors carry llama.cpp's own words
_LEVELS = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.WARNING, 4: logging.ERROR}
_CONTINUED = 5  # GGML_LOG_LEVEL_CONT: the rest of the line before
_errors: deque[str] = deque(maxlen=8)
_lock = threading.Lock()
_kept: list[Any] = []
"""Callbacks that native code holds: they must not be garbage-collected."""


def engine_name() -> str:
    """The distribution that is used."""
    try:
        version(COMPILED)
    except PackageNotFoundError:
        return WHEEL
    return COMPILED


def version_of() -> str:
    """Its version."""
    return version(engine_name())


def system_info() -> str:
    """The instruction sets and devices that GGML was built for and uses here."""
    text: bytes = library().llama_print_system_info()
    return text.decode(errors="replace").strip(" |\n")


def build() -> dict[str, str]:
    """What decides how llama.cpp computes: its shared libraries, byte for byte, and the instruction sets in use.

    Raises:
        ImportError: As for ``library``.
    """
    # Where the loaded library lies: LLAMA_CPP_LIB_PATH names another folder than the distribution's own.
    folder = Path(library()._lib._name).resolve().parent
    return {"llama.cpp's libraries": libraries_digest(folder), "GGML": system_info()}


@cache
def library() -> Any:
    """The module ``llama_cpp.llama_cpp``, or the same of the wheel, with its backends initialised.

    Raises:
        ImportError: It is not installed, or its shared libraries cannot be loaded.
    """
    set_needed_environment()
    try:
        bindings = wheel.library() if engine_name() == WHEEL else import_module("llama_cpp.llama_cpp")
    except (OSError, RuntimeError, FileNotFoundError) as error:  # what its loader raises for a broken build
        raise ImportError(str(error)) from error
    # Before llama_backend_init, which already logs.
    callback = bindings.llama_log_callback(_logged)
    _kept.append(callback)
    bindings.llama_log_set(ctypes.cast(callback, ctypes.c_void_p) if engine_name() == WHEEL else callback, None)
    bindings.llama_backend_init()
    return bindings


def _logged(level: int, text: bytes, _user: Any) -> None:
    line = text.decode("utf-8", "replace").rstrip()
    if not line or level == _CONTINUED:
        return
    # GGML_LOG_LEVEL_WARN and above.
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
    """The module ``llama_cpp.llama_cpp_ext``, or the same of the wheel; None if this version does not have MTP."""
    bindings = library()
    if engine_name() == WHEEL:
        return wheel.extension()
    try:
        from llama_cpp import llama_cpp_ext
    except (ImportError, AttributeError):
        return None
    # ``ctx_other`` links a drafter's context to the target's memory; earlier structs do not have it.
    fields = dict(bindings.llama_context_params._fields_)
    if "ctx_other" not in fields or not hasattr(bindings, "LLAMA_CONTEXT_TYPE_MTP"):
        return None
    return llama_cpp_ext


def missing_for_mtp(*, allow_untested: bool = False) -> str:
    """Why MTP cannot run with the installed version, one sentence; empty if it can."""
    name, installed = engine_name(), version_of()
    if extension() is None:
        return f"{name} {installed} does not export what MTP needs (nextn embeddings, ctx_other)."
    if installed not in TESTED_FOR_MTP[name] and not allow_untested:
        return (
            f"MTP uses an unstable interface of llama.cpp, tested with {name} {', '.join(TESTED_FOR_MTP[name])}; "
            f"{installed} is installed."
        )
    return ""
