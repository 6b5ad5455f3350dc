"""The entry point: the backend's record and its known faults. It imports no engine."""

from __future__ import annotations

from collections.abc import Iterable

from polydraft.contract import BackendRecord, DrafterKind, FaultRecord, hookimpl

__all__ = ["DRAFTER_KINDS", "SUPPORTED_VERSIONS", "polydraft_backends", "polydraft_faults"]

SUPPORTED_VERSIONS = ">=2026.10"
"""2026.10.11549, llama.cpp b11549, is tested. Earlier ones lack kinds of drafts, or do not report them."""

DRAFTER_KINDS: frozenset[DrafterKind] = frozenset({"mtp", "draft-model", "ngram"})


@hookimpl
def polydraft_backends() -> Iterable[BackendRecord]:
    """The backend ``xllamacpp``."""
    yield BackendRecord(
        name="xllamacpp",
        factory="polydraft_xllamacpp.backend:XllamacppBackend",
        summary="llama.cpp's own server in this process, from a wheel: no compiler, continuous batching",
        formats=frozenset({"gguf", "safetensors"}),
        converts={"safetensors": ("none", "q8_0")},
        drafter_kinds=DRAFTER_KINDS,
        engine="xllamacpp",
        requires={"xllamacpp": SUPPORTED_VERSIONS},
        install_hint="pip install 'polydraft[xllamacpp]'",
    )


@hookimpl
def polydraft_faults() -> Iterable[FaultRecord]:
    """Known faults of xllamacpp's versions. ``polydraft_llama_cpp.probes``, on the same library, sees this one."""
    yield FaultRecord(
        id="xllamacpp-drafter-window",
        distribution="xllamacpp",
        versions=SUPPORTED_VERSIONS,
        affects="mtp",
        architectures=("gemma4_assistant",),
        severity="warn",
        summary="In sliding-window layers an MTP drafter sees two tokens fewer than in Transformers: past the window "
        "drafts may differ, the output does not.",
        remedy="Nothing to do: acceptance hardly changes.",
    )
