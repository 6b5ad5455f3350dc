"""The entry point: cheap records, no mlx."""

from __future__ import annotations

from collections.abc import Iterable

from polydraft.contract import BackendRecord, hookimpl

__all__ = ["polydraft_backends"]


@hookimpl
def polydraft_backends() -> Iterable[BackendRecord]:
    """The backend ``mlx``."""
    yield BackendRecord(
        name="mlx",
        factory="polydraft_mlx.backend:MlxBackend",
        summary="MLX on Apple silicon, and on Linux CPU",
        formats=frozenset({"mlx", "safetensors"}),
        drafter_kinds=frozenset({"mtp", "draft-model", "ngram"}),
        engine="mlx-lm",
        requires={"mlx-lm": ">=0.32.2,<0.33", "mlx": ">=0.32.2"},
        install_hint="pip install 'polydraft[mlx]'",
    )
