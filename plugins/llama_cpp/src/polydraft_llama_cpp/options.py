"""The backend's own options, by llama.cpp's names."""

from __future__ import annotations

from typing import Literal

from polydraft.contract import EngineOptions
from pydantic import Field

__all__ = ["CacheType", "LlamaCppOptions"]

CacheType = Literal["auto", "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]


class LlamaCppOptions(EngineOptions):
    """``load(..., engine_options={"n_gpu_layers": 20, "threads": 8})``."""

    n_ctx: int | None = Field(default=None, ge=1, description="The same as context_length of load; give one of them.")
    n_batch: int = Field(default=512, ge=1, description="Prompt tokens run in one forward; at least k + 1.")
    n_gpu_layers: int | None = Field(
        default=None, ge=-1, description="Layers on the GPU, -1 for all; None: all on a GPU, none on the CPU."
    )
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads; None: OMP_NUM_THREADS if set, else all cores that may be used."
    )
    threads_batch: int | None = Field(default=None, ge=1, description="CPU threads for prompts; None: as threads.")
    type_k: CacheType = Field(
        default="auto", description="Type of the cached keys; auto: f32 for weights in f32, else f16."
    )
    type_v: CacheType = Field(
        default="auto", description="Type of the cached values; a quantized one needs flash attention."
    )
    flash_attn: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Flash attention, in target and drafter alike; auto: on with a GPU or quantized values, else off.",
    )
    mmap: bool = Field(default=True, description="Map the file instead of reading it.")
    mlock: bool = Field(default=False, description="Keep the weights in memory.")
    swa_full: bool = Field(
        default=False, description="A cache of full length for sliding-window layers; exactness='bitwise' implies it."
    )
    n_gpu_layers_draft: int | None = Field(
        default=None, ge=-1, description="The drafter's layers on the GPU; None: as n_gpu_layers."
    )
    device_draft: str | None = Field(default=None, description="The drafter's device; None: the target's.")
    allow_untested: bool = Field(
        default=False, description="Run MTP with a version of llama-cpp-python that it was not tested with."
    )
