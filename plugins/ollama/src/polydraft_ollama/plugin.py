"""The entry point: the backend's record and its known faults. It imports no engine."""

from __future__ import annotations

from collections.abc import Iterable

from polydraft.contract import BackendRecord, FaultRecord, hookimpl

__all__ = ["FIRST_VERSION", "polydraft_backends", "polydraft_faults"]

FIRST_VERSION = "0.30.0"
"""The first server that has ``draft_num_predict``, and ``DRAFT`` for GGUF files."""


@hookimpl
def polydraft_backends() -> Iterable[BackendRecord]:
    """The backend ``ollama``."""
    yield BackendRecord(
        name="ollama",
        factory="polydraft_ollama.backend:OllamaBackend",
        summary="The models of an Ollama server, by their names there",
        formats=frozenset({"gguf", "safetensors"}),
        converts={"safetensors": ("none", "q8_0")},
        drafter_kinds=frozenset({"mtp"}),
        engine="ollama",
        requires={"ollama": ">=0.6"},
        install_hint="pip install 'polydraft[ollama]'",
        own_names=True,
        create_option="create_as",
    )


@hookimpl
def polydraft_faults() -> Iterable[FaultRecord]:
    """Known faults. The versions are those of the client: the server's are known only once it is asked."""
    yield FaultRecord(
        id="ollama-no-draft-statistics",
        distribution="ollama",
        versions=">=0.6",
        affects="statistics",
        severity="warn",
        summary="Ollama does not report drafted and accepted tokens, so acceptance is not known.",
        remedy="Its server's log has them.",
    )
    yield FaultRecord(
        id="ollama-equal-pieces",
        distribution="ollama",
        versions=">=0.6",
        affects="sampling",
        severity="warn",
        summary="After 30 equal pieces of text in a row Ollama gives up an answer, with and without drafts.",
        remedy="Give a `repetition_penalty`, or a stop string.",
        link="https://github.com/ollama/ollama/blob/main/llm/llama_server.go",
    )
