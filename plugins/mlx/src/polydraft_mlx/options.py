"""The backend's own options."""

from __future__ import annotations

from polydraft.contract import EngineOptions
from pydantic import Field

__all__ = ["MlxOptions"]


class MlxOptions(EngineOptions):
    """``load(..., engine_options={"prefill_chunk_size": 2048})``."""

    prefill_chunk_size: int = Field(default=512, ge=1, description="Prompt tokens run in one forward.")
