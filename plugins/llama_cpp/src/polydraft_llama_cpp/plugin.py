"""The entry point: records of the two backends. It imports no engine."""

from __future__ import annotations

from collections.abc import Iterable

from polydraft.caches import CacheFolder
from polydraft.contract import BackendRecord, CacheRecord, hookimpl

__all__ = ["CONVERSIONS", "polydraft_backends", "polydraft_caches"]

CONVERSIONS = ("llama_cpp", "POLYDRAFT_LLAMA_CPP_CACHE")
"""The cache of converted checkpoints, and the environment variable that names another folder for it."""


_INSTALL = (
    "pip install 'polydraft[llama_cpp]'  # compiles llama.cpp for some minutes, with a C++ compiler (apt install g++; "
    "xcode-select --install); for a GPU, set CMAKE_ARGS='-DGGML_CUDA=on' first (Metal: -DGGML_METAL=on, Vulkan: "
    "-DGGML_VULKAN=on)"
)
_CONVERTS: dict[str, tuple[str, ...]] = {"safetensors": ("none", "q8_0")}


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
        requires={"llama-cpp-python": ">=0.3.36"},
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
        requires={"llama-cpp-python": ">=0.3.36"},
        install_hint=_INSTALL,
    )


@hookimpl
def polydraft_caches() -> Iterable[CacheRecord]:
    """The converted checkpoints."""
    folder = CacheFolder(*CONVERSIONS)
    yield CacheRecord(name=folder.name, summary="checkpoints converted to GGUF", path=str(folder.path))
