"""The entry point: records only, so that listing backends does not import torch."""

from __future__ import annotations

from collections.abc import Iterable

from polydraft.contract import BackendRecord, hookimpl

__all__ = ["polydraft_backends"]


@hookimpl
def polydraft_backends() -> Iterable[BackendRecord]:
    """The backend ``transformers``."""
    yield BackendRecord(
        name="transformers",
        factory="polydraft_transformers.backend:TransformersBackend",
        summary="Hugging Face Transformers on CPU and CUDA",
        formats=frozenset({"safetensors"}),
        drafter_kinds=frozenset({"mtp", "draft-model", "ngram"}),
        engine="transformers",
        requires={"transformers": ">=5.17", "torch": ">=2.6"},
        install_hint="pip install 'polydraft[transformers]'",
    )
