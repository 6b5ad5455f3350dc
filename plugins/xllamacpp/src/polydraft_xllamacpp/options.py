"""``engine_options`` of the backend ``xllamacpp``, by llama.cpp's names."""

from __future__ import annotations

from typing import Literal

from polydraft_gguf.options import CommonOptions
from pydantic import Field

__all__ = ["NgramType", "XllamacppOptions"]

NgramType = Literal["simple", "map-k", "map-k4v", "mod"]


class XllamacppOptions(CommonOptions):
    """``load(..., engine_options={"n_parallel": 8, "threads": 8})``."""

    n_parallel: int | None = Field(
        default=None,
        ge=1,
        le=256,
        description="Requests that run at a time, each with a cache for the whole context; None: 4, fewer where memory "
        "is scarce.",
    )
    ngram_type: NgramType = Field(
        default="simple",
        description="How `drafter='ngram'` looks drafts up (llama.cpp's --spec-type ngram-...). All but simple keep "
        "counts over requests, so that what is drafted depends on earlier ones.",
        json_schema_extra={"drafters": ["ngram"]},
    )
    ngram_size: int = Field(
        default=2,
        ge=1,
        le=64,
        description="Tokens that are looked up, at most k (--spec-ngram-...-size-n).",
        json_schema_extra={"drafters": ["ngram"]},
    )
    swa_full: bool = Field(default=False, description="A cache of full length for sliding-window layers.")
    mmap: bool = Field(default=True, description="Map the file instead of reading it.")
