"""The options that all engines on llama.cpp share, by its names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from polydraft.checkpoints.gguf import GgufHeader
from polydraft.contract import EngineOptions
from polydraft.errors import InvalidRequestError
from pydantic import Field

from polydraft_gguf.resources import head_sizes

__all__ = ["CacheType", "CommonOptions"]

CacheType = Literal["auto", "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]
_NOT_QUANTIZED = {"f32", "f16", "bf16"}
_FLASH_HEADS = {40, 64, 72, 80, 96, 112, 128, 192, 256, 320, 512, 576}
"""Of keys, in numbers (``ggml_cuda_get_best_fattn_kernel``). With others each layer's cache would be copied to the CPU,
and attention run there."""


class CommonOptions(EngineOptions):
    """Options of llama.cpp, in this process or in a server."""

    n_batch: int = Field(default=512, ge=1, description="Prompt tokens run in one forward; at least k + 1.")
    n_gpu_layers: int | None = Field(
        default=None, ge=-1, description="Layers on the GPU, -1 for all; None: all on a GPU, none on the CPU."
    )
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads; None: OMP_NUM_THREADS if set, else all cores that may be used."
    )
    type_k: CacheType = Field(
        default="auto", description="Type of the cached keys; auto: f32 for weights in f32, else f16."
    )
    type_v: CacheType = Field(
        default="auto", description="Type of the cached values; a quantized one needs flash attention."
    )
    flash_attn: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Flash attention, in target and drafter alike; auto: on with quantized values, and on a GPU that "
        "has it for the model's heads.",
    )

    def check_batch(self, rows: int) -> None:
        """Refuse batches that do not hold a step of ``rows`` tokens.

        Raises:
            InvalidRequestError: ``n_batch`` is smaller.
        """
        if self.n_batch < rows:
            raise InvalidRequestError(
                f"n_batch is {self.n_batch}, and a step runs {rows} tokens.", f"Give at least `n_batch={rows}`."
            )

    def cache_types(self, weights: str) -> tuple[str, str]:
        """Types of the cached keys and values for weights of a type such as ``f32`` or ``q4_k_m``."""
        auto = "f32" if weights == "f32" else "f16"
        type_k, type_v = (auto if given == "auto" else given for given in (self.type_k, self.type_v))
        return type_k, type_v

    def uses_flash_attn(self, type_v: str, headers: Iterable[GgufHeader], *, on_gpu: bool) -> bool:
        """Whether flash attention is used. Never llama.cpp's own "auto", which may differ between target and drafter.

        Args:
            type_v: Type of the cached values.
            headers: Of the files of target and drafter.
            on_gpu: Whether layers run on a GPU.

        Raises:
            InvalidRequestError: It is off, and the values are quantized.
        """
        quantized = type_v not in _NOT_QUANTIZED
        if quantized and self.flash_attn == "off":
            raise InvalidRequestError(
                f"type_v is {type_v}, and flash_attn off: llama.cpp needs flash attention for quantized values.",
                "Give `flash_attn='auto'`, or `type_v='f16'`.",
            )
        on_gpu = on_gpu and all(size in _FLASH_HEADS for header in headers for size in head_sizes(header))
        return self.flash_attn == "on" or (self.flash_attn == "auto" and (on_gpu or quantized))
