"""The entry point: the cache of converted checkpoints, which all engines that read GGUF share."""

from __future__ import annotations

from collections.abc import Iterable

from polydraft.caches import CacheFolder
from polydraft.contract import CacheRecord, hookimpl

__all__ = ["CONVERSIONS", "polydraft_caches"]

CONVERSIONS = ("llama_cpp", "POLYDRAFT_LLAMA_CPP_CACHE")
"""The cache of converted checkpoints, and the environment variable that names another folder for it."""


@hookimpl
def polydraft_caches() -> Iterable[CacheRecord]:
    """The converted checkpoints."""
    folder = CacheFolder(*CONVERSIONS)
    yield CacheRecord(name=folder.name, summary="checkpoints converted to GGUF", path=str(folder.path))
