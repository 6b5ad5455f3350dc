"""The entry point: records of the two backends. It imports no engine."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from polydraft.contract import BackendRecord, hookimpl

__all__ = ["COMPILE", "CUDA_FLAGS", "polydraft_backends"]

# The linker's flag keeps the C++ library, where it is linked statically, from being each library's own to export: with
# several copies in a process, loading a model ends in a segmentation fault.
CUDA_FLAGS = "-DGGML_CUDA=on" + " -DCMAKE_SHARED_LINKER_FLAGS=-Wl,--exclude-libs,ALL" * (sys.platform == "linux")
COMPILE = (
    "pip install llama-cpp-python  # compiles llama.cpp for some minutes, with a C++ compiler (apt install g++; "
    f"xcode-select --install); for a GPU, set CMAKE_ARGS='{CUDA_FLAGS}' first (Metal: -DGGML_METAL=on, Vulkan: "
    "-DGGML_VULKAN=on)"
)
_CONVERTS: dict[str, tuple[str, ...]] = {"safetensors": ("none", "q8_0")}
_INSTALL = "pip install 'polydraft[llama-cpp]'"
_REQUIRES = {"llama-cpp-python|xllamacpp": ">=0.3.36"}


@hookimpl
def polydraft_backends() -> Iterable[BackendRecord]:
    """The backends ``llama_cpp`` and ``llama-server``."""
    yield BackendRecord(
        name="llama_cpp",
        factory="polydraft_llama_cpp.backend:LlamaCppBackend",
        summary="llama.cpp in this process: GGUF files on CPU, CUDA, Metal and Vulkan",
        formats=frozenset({"gguf", "safetensors"}),
        converts=_CONVERTS,
        drafter_kinds=frozenset({"mtp", "draft-model", "ngram"}),
        engine="llama-cpp-python",
        requires=_REQUIRES,
        install_hint=_INSTALL,
    )
    yield BackendRecord(
        name="llama-server",
        factory="polydraft_llama_cpp.server.backend:LlamaServerBackend",
        summary="the user's own llama-server: llama.cpp in a process of its own",
        formats=frozenset({"gguf", "safetensors"}),
        converts=_CONVERTS,
        drafter_kinds=frozenset({"mtp", "draft-model"}),
        engine="llama-server",
        requires=_REQUIRES,
        install_hint=_INSTALL,
    )
