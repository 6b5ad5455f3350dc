"""``engine_options`` of the backend ``litert_lm``."""

from __future__ import annotations

from pathlib import Path

from polydraft.contract import EngineOptions
from pydantic import Field

__all__ = ["LitertLmOptions"]


class LitertLmOptions(EngineOptions):
    """``load(..., engine_options={"threads": 4})``."""

    threads: int | None = Field(
        default=None, ge=1, le=1024, description="Threads on the CPU; None: OMP_NUM_THREADS, else this process's cores."
    )
    cache_dir: Path | None = Field(
        default=None,
        description="Folder for what LiteRT-LM compiles, which is made; None: one for each file in polydraft's cache.",
    )
