"""The entry point: cheap records, no engine."""

from __future__ import annotations

from collections.abc import Iterable

from polydraft.contract import BackendRecord, hookimpl

__all__ = ["polydraft_backends"]


@hookimpl
def polydraft_backends() -> Iterable[BackendRecord]:
    """The backends ``llama_cpp`` and ``llama-server``."""
    yield BackendRecord(
        name="llama_cpp",
        factory="polydraft_llama_cpp.backend:LlamaCppBackend",
        summary="llama.cpp in this process: GGUF files on CPU, CUDA, Metal and Vulkan",
        formats=frozenset({"gguf", "safetensors"}),
        drafter_kinds=frozenset({"mtp", "draft-model", "ngram"}),
        engine="llama-cpp-python",
        requires={"llama-cpp-python": ">=0.3.36"},
        install_hint="pip install 'polydraft[llama_cpp]'",
    )
    yield BackendRecord(
        name="llama-server",
        factory="polydraft_llama_cpp.server.backend:LlamaServerBackend",
        summary="the user's own llama-server: llama.cpp in a process of its own",
        formats=frozenset({"gguf", "safetensors"}),
        drafter_kinds=frozenset({"mtp", "draft-model"}),
        engine="llama-server",
        requires={"llama-cpp-python": ">=0.3.36"},
        install_hint="pip install 'polydraft[llama_cpp]'",
    )
