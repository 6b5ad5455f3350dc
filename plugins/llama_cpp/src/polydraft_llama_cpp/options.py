"""``engine_options`` of the backend ``llama_cpp``, by llama.cpp's names."""

from __future__ import annotations

from polydraft_gguf.options import CommonOptions
from pydantic import Field

__all__ = ["LlamaCppOptions"]


class LlamaCppOptions(CommonOptions):
    """``load(..., engine_options={"n_gpu_layers": 20, "threads": 8})``."""

    n_ctx: int | None = Field(
        default=None, ge=1, description="The same as `context_length` of `load`; give one of them."
    )
    threads_batch: int | None = Field(default=None, ge=1, description="CPU threads for prompts; None: as threads.")
    mmap: bool = Field(default=True, description="Map the file instead of reading it.")
    mlock: bool = Field(default=False, description="Keep the weights in memory.")
    swa_full: bool = Field(
        default=False, description="A cache of full length for sliding-window layers; `exactness='bitwise'` implies it."
    )
    n_gpu_layers_draft: int | None = Field(
        default=None,
        ge=-1,
        description="The drafter's layers on the GPU; None: as n_gpu_layers.",
        json_schema_extra={"drafters": ["mtp", "draft-model"]},
    )
    device_draft: str | None = Field(
        default=None,
        description="The drafter's device; None: the target's.",
        json_schema_extra={"drafters": ["mtp", "draft-model"]},
    )
    allow_untested: bool = Field(
        default=False,
        description="Run MTP with a version of llama-cpp-python that it was not tested with.",
        json_schema_extra={"drafters": ["mtp"]},
    )
