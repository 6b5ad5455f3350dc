"""The backend's own options."""

from __future__ import annotations

from polydraft.contract import EngineOptions
from pydantic import Field

__all__ = ["ReferenceOptions"]


class ReferenceOptions(EngineOptions):
    """``load(..., engine_options={"agreement": 0.5})``."""

    agreement: float | None = Field(
        default=None,
        ge=0.0,
        le=1.0,
        description="Share of positions at which a toy assistant drafts the target's choice; None: as its config says.",
        json_schema_extra={"drafters": ["mtp"]},
    )
