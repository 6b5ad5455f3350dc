"""Conformance checks that vLLM does not pass, each with its reason."""

from __future__ import annotations

from collections.abc import Iterable

from polydraft.contract import Exclusion

__all__ = ["in_process_exclusions"]


def in_process_exclusions() -> Iterable[Exclusion]:
    """Those of the backend ``vllm``."""
    return ()
