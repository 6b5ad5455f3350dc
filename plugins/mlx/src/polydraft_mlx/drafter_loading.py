"""Loading a Gemma 4 assistant, as it was saved by Transformers or converted and quantized for MLX."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.utils import infer_quant_config
from polydraft.checkpoints.safetensors import weight_files
from polydraft.contract import ModelSource
from polydraft.errors import ModelFormatError, PolydraftError

from polydraft_mlx.assistant import Assistant

__all__ = ["in_one_line", "load_assistant"]


def load_assistant(source: ModelSource, path: Path, dtype: mx.Dtype | None) -> Assistant:
    """The drafter, its weights not read yet.

    Raises:
        ModelFormatError: It is quantized in a way that MLX does not read, or its weights are not those of its config.
    """
    config = source.config
    _check_quantization(config, source.id)
    files = weight_files(path)
    try:
        weights: dict[str, Any] = {}
        for file in files:
            stored: Any = mx.load(str(file))
            weights.update(stored)
        if config.get("tie_word_embeddings", True):
            weights.pop("lm_head.weight", None)
        if (ordering := weights.get("masked_embedding.token_ordering")) is not None:
            weights["masked_embedding.token_ordering"] = ordering.astype(mx.int32)
        assistant = Assistant(config, source.id)
        if any(name.endswith(".scales") for name in weights):
            nn.quantize(assistant, class_predicate=lambda name, module: _packed(name, module, weights))
        assistant.eval()
        assistant.load_weights(list(weights.items()), strict=True)
        assistant.check_ordering()
    except PolydraftError:
        raise
    except Exception as error:  # of any kind, where config and weights do not fit
        raise ModelFormatError(
            f"{source.id} is not an assistant as its config says: {in_one_line(error)}",
            "Download it again, or convert it again from the original.",
        ) from error
    if dtype is not None:
        assistant.set_dtype(dtype)
    return assistant


def _packed(name: str, module: Any, weights: Mapping[str, Any]) -> bool | dict[str, Any]:
    """How a layer was packed, read off its arrays: a config may name one way for all, and layers differ from it."""
    if f"{name}.scales" not in weights or not hasattr(module, "to_quantized"):
        return False
    found: dict[str, Any] = infer_quant_config(name, module, weights)
    return found


def in_one_line(error: Exception) -> str:
    """What an error of a loader says, which may list hundreds of names, in a line that can be read."""
    text = " ".join(str(error).split()).rstrip(".")
    return f"{text[:300]}{' ...' if len(text) > 300 else '.'}" if text else f"{error!r}."


def _check_quantization(config: Mapping[str, Any], name: str) -> None:
    if isinstance(config.get("quantization"), Mapping):  # MLX's own
        return
    given = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if given:
        method = given.get("quant_method", "an unknown method") if isinstance(given, Mapping) else given
        raise ModelFormatError(
            f"The drafter {name} is quantized with {method}, which MLX cannot read.",
            "Give the original in bfloat16, or one that was converted for MLX.",
        )
