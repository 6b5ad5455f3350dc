"""Checks of a file's header: where llama.cpp would end the process by an assertion, an error is raised.

Each group names the function that asserts it in llama.cpp 0c1e57098. Most other damage llama.cpp itself reports.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from polydraft.checkpoints.gguf import GgufHeader, StringArray
from polydraft.errors import ModelFormatError

__all__ = ["check_header"]

_MOST_LAYERS = 512  # LLAMA_MAX_LAYERS
_MOST_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
_LONGEST_WINDOW = 2**30
_F32 = 0
_NOT_OF_WEIGHTS = range(24, 29)  # GGML_TYPE_I8, I16, I32, I64, F64
_GEMMA4 = {"gemma4", "gemma4-assistant"}


def check_header(header: GgufHeader, name: str) -> None:
    """Check a header before llama.cpp sees the file.

    Raises:
        ModelFormatError: llama.cpp would end the process.
    """
    wrong = next(_wrong(header), None)
    if wrong is not None:
        raise ModelFormatError(
            f"{name} is damaged, or too new for this version of llama.cpp: {wrong}.", "Download or convert it again."
        )


def _wrong(header: GgufHeader) -> Iterator[str]:
    def number(key: str, default: int = 0) -> int:
        value = header.of_architecture(key, default)
        return max(value, default=default) if isinstance(value, tuple) else value

    # llama_model_base::load_hparams
    layers, experts, used = number("block_count"), number("expert_count"), number("expert_used_count")
    if not 0 < layers <= _MOST_LAYERS:
        yield f"it has {layers} layers"
    if number("nextn_predict_layers") > layers:
        yield f"{number('nextn_predict_layers')} of its {layers} layers are MTP layers"
    if header.architecture.startswith("hunyuan") and experts == 1:
        used = 1  # dense models that declare one expert: llama.cpp ignores it
    if experts > _MOST_EXPERTS or used > experts or (experts > 0) != (used > 0):
        yield f"it uses {used} of {experts} experts"
    # ggml_compute_forward_rms_norm, ggml_compute_forward_norm
    for key in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"):
        epsilon = header.of_architecture(key, 0.0)
        if not isinstance(epsilon, float) or not 0 <= epsilon < math.inf:
            yield f"its {key} is {epsilon}"
    if header.architecture in _GEMMA4:
        yield from _gemma4(header, number, layers)
        yield from _tensors_of_gemma4(header)
    # llama_vocab::impl::load: each text must be one token; it names the empty ones itself
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, StringArray):
        texts = [text for text in tokens.items() if text]
        if len(set(texts)) < len(texts):
            yield f"{len(texts) - len(set(texts))} of its tokens repeat others"


def _gemma4(header: GgufHeader, number: Callable[..., int], layers: int) -> Iterator[str]:
    shared = header.of_architecture("attention.shared_kv_layers", 0)
    if header.architecture == "gemma4" and shared:
        # llama_model::create_memory: they use those of the last two layers that store any, first sliding, then full.
        pattern = header.of_architecture("attention.sliding_window_pattern")
        last = pattern[max(0, layers - shared - 2) : layers - shared] if isinstance(pattern, tuple) else ()
        if [bool(item) for item in last] != [True, False]:
            yield f"{shared} of its {layers} layers share keys and values, not after a sliding and a full one"
    if not 0 < number("attention.sliding_window") < _LONGEST_WINDOW:  # llama_kv_cache_iswa
        yield f"its sliding window is {number('attention.sliding_window')}"
    usual = number("embedding_length") // max(1, number("attention.head_count"))
    for kind, default in (("", usual), ("_swa", 0)):
        keys, values = (number(f"attention.{what}_length{kind}", default) for what in ("key", "value"))
        if keys != values:  # llama_model_gemma4::graph
            yield f"its keys have length {keys}, its values {values}"
        rotated = number(f"rope.dimension_count{kind}", number("rope.dimension_count", keys))
        if rotated < 1 or rotated % 2 or rotated > keys:  # ggml_compute_forward_rope
            yield f"it rotates {rotated} of {keys} numbers of a key"


def _tensors_of_gemma4(header: GgufHeader) -> Iterator[str]:
    # ggml_compute_forward_mul, ggml_compute_forward_rope, ggml_compute_forward_mul_mat
    for tensor, shape in header.tensors.items():
        kind = header.types[tensor]
        if len(shape) == 1 and kind != _F32:
            yield f"its tensor {tensor} is not in float32"
        if kind in _NOT_OF_WEIGHTS and tensor.endswith(".weight"):
            yield f"its tensor {tensor} is of a type that is not used for weights"
