"""llama-cpp-python's low-level API: imported on first use, its log kept for error messages.

MTP needs ``llama_cpp_ext``, which llama-cpp-python marks unstable; every other use is the stable API.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections import deque
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from polydraft.checkpoints.contents import libraries_digest

__all__ = [
    "TESTED_FOR_MTP",
    "build",
    "extension",
    "library",
    "missing_for_mtp",
    "recent_errors",
    "system_info",
    "version_of",
]

TESTED_FOR_MTP = ("0.3.36",)
"""Versions of llama-cpp-python that MTP has been tested with."""

_log = logging.getLogger("polydraft.llama_cpp")
_log.addHandler(logging.NullHandler())  # silent unless the app asks: errors carry llama.cpp's own words
_LEVELS = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.WARNING, 4: logging.ERROR}
_CONTINUED = 5  # GGML_LOG_LEVEL_CONT: the rest of the line before
_errors: deque[str] = deque(maxlen=8)
_lock = threading.Lock()
_kept: list[Any] = []
"""Callbacks that native code holds: they must not be garbage-collected."""


def version_of() -> str:
    """Version of llama-cpp-python."""
    return version("llama-cpp-python")


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
    """The module ``llama_cpp.llama_cpp``, with its backends initialised.

    Raises:
        ImportError: It is not installed, or its shared libraries cannot be loaded.
    """
    try:
        import llama_cpp.llama_cpp as bindings
    except (OSError, RuntimeError, FileNotFoundError) as error:  # what its loader raises for a broken build
        raise ImportError(str(error)) from error
    # Before llama_backend_init, which already logs.
    callback = bindings.llama_log_callback(_logged)
    _kept.append(callback)
    bindings.llama_log_set(callback, ctypes.c_void_p(0))
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
    """The module ``llama_cpp.llama_cpp_ext``; None if this version does not have MTP."""
    bindings = library()
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
    installed = version_of()
    if extension() is None:
        return f"llama-cpp-python {installed} does not export what MTP needs (nextn embeddings, ctx_other)."
    if installed not in TESTED_FOR_MTP and not allow_untested:
        return (
            f"MTP uses an unstable interface of llama.cpp, tested with llama-cpp-python {', '.join(TESTED_FOR_MTP)}; "
            f"{installed} is installed."
        )
    return ""
