"""Conformance checks that vLLM does not pass, each with its reason."""

from __future__ import annotations

from collections.abc import Iterable

from polydraft.contract import Exclusion

__all__ = ["in_process_exclusions", "server_exclusions"]

_MIXED = "tiny-[!l]*"
"""The built-in targets with sliding and full attention: all but tiny-llama."""
_DRAFT_MODEL = (
    "vLLM's draft_model proposer reads the block table of the first KV group only: with sliding and full attention its "
    "greedy output is wrong. The core refuses the pair (faults.toml), the backend too. vllm#33133."
)
_PROBE = "polydraft_vllm.probes:draft_model_reads_one_kv_group"


def in_process_exclusions() -> Iterable[Exclusion]:
    """Those of the backend ``vllm``."""
    yield Exclusion(
        check="*",
        pair=_MIXED,
        drafter_kind="draft-model",
        status="notyet",
        reason=_DRAFT_MODEL,
        probe=_PROBE,
        run=False,
    )
    yield Exclusion(
        check="test_target_drafts_for_itself", pair=_MIXED, status="notyet", reason=_DRAFT_MODEL, probe=_PROBE
    )


def server_exclusions() -> Iterable[Exclusion]:
    """Those of the backend ``vllm-server``."""
    return in_process_exclusions()
