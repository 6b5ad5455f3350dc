"""The entry point: cheap records. polydraft imports this module for every user, so mlx is not imported here."""

from __future__ import annotations

import platform
import sys
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
        install_hint=_no_packages_here() or "pip install 'polydraft[mlx]'",
    )


def _no_packages_here() -> str:
    """Why MLX cannot be installed on this system, and what to do instead; empty if it can."""
    if sys.platform == "darwin" and platform.machine() != "arm64":
        return (
            "MLX has no packages for Macs with Intel processors, nor for a Python that runs as one: use the "
            "transformers or llama_cpp backend; on Apple silicon install Python for arm64."
        )
    if sys.platform not in {"darwin", "linux"}:
        return f"MLX has no packages for {sys.platform}: use the transformers or llama_cpp backend."
    name, version = platform.libc_ver()
    if sys.platform == "linux" and (name != "glibc" or tuple(map(int, version.split(".")[:2])) < (2, 35)):
        return (
            f"MLX's Linux packages need glibc 2.35 or later, and this system has {f'{name} {version}'.strip()}: use a "
            "newer system (Ubuntu 22.04, Debian 12 or later), a container of one, or another backend."
        )
    return ""
