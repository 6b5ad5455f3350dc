"""The backend's own options."""

from __future__ import annotations

from typing import Literal

from polydraft.contract import EngineOptions
from pydantic import Field

__all__ = ["TransformersOptions"]


class TransformersOptions(EngineOptions):
    """``load(..., engine_options={"num_threads": 2})``."""

    num_threads: int | None = Field(
        default=None, ge=1, le=4096, description="torch.set_num_threads, for the whole process."
    )
    prefill_chunk_size: int | None = Field(
        default=None, ge=1, description="Prompt tokens run in one forward; None: 512, and 4096 by our kernels on GPUs."
    )
    experts_implementation: Literal["eager", "batched_mm", "grouped_mm"] | None = Field(
        default=None,
        description="How Transformers runs mixtures of experts; None: by kernels of ours on GPUs, small ones on CPUs "
        "all at once, else its own choice.",
    )
