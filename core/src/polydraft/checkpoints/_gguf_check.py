"""Whether the values of a GGUF header are of the kind that their keys stand for.

A file whose header can be read to its end may be damaged all the same. What is checked here is what polydraft and its
plugins read; limits are far beyond any model's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polydraft.errors import ModelFormatError

if TYPE_CHECKING:
    from polydraft.checkpoints.gguf import GgufHeader

__all__ = ["check_values"]

_MOST_LAYERS = 10_000
_MOST = 2**32 - 1
_NUMBERS = (
    "block_count",
    "context_length",
    "embedding_length",
    "embedding_length_out",
    "vocab_size",
    "attention.key_length",
    "attention.key_length_swa",
    "attention.value_length",
    "attention.value_length_swa",
    "attention.sliding_window",
    "attention.shared_kv_layers",
    "rope.dimension_count",
    "rope.dimension_count_swa",
    "expert_count",
    "nextn_predict_layers",
)
_PATTERN = "attention.sliding_window_pattern"
"""May be shorter: layers that only draft are not always in it."""
_BY_LAYER = ("attention.head_count", "attention.head_count_kv", "expert_used_count", _PATTERN)
"""One number for all layers, or one (or a yes or no) a layer."""


def check_values(header: GgufHeader, name: str) -> None:
    """Check the values that are read of a header.

    Args:
        header: The file's.
        name: The model's name, for the message.

    Raises:
        ModelFormatError: A value is of another kind, negative, or larger than any model's.
    """
    wrong = next(_wrong(header), None)
    if wrong is not None:
        key, value = wrong
        raise ModelFormatError(
            f"{name} is damaged: its GGUF header says {key} = {_shown(value)}.", "Download or convert it again."
        )


def _wrong(header: GgufHeader) -> Any:
    """Each key and value that cannot be."""
    from polydraft.checkpoints.gguf import StringArray

    metadata, get = header.metadata, header.of_architecture
    for key in ("general.architecture", "tokenizer.ggml.model"):
        if not isinstance(metadata.get(key, ""), str):
            yield key, metadata[key]
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
        if key in metadata and not isinstance(metadata[key], StringArray):
            yield key, metadata[key]
    if not _is_number(metadata.get("general.file_type", 0)):
        yield "general.file_type", metadata["general.file_type"]
    for key in _NUMBERS:
        value = get(key, 0)
        if not _is_number(value) or (key == "block_count" and value > _MOST_LAYERS):
            yield f"{header.architecture}.{key}", value
    for key in _BY_LAYER:
        value = get(key, 0)
        if not _is_number(value) and not (
            isinstance(value, tuple)
            and (key == _PATTERN or len(value) >= get("block_count", 0))
            and all(isinstance(item, bool) or _is_number(item) for item in value)
        ):
            yield f"{header.architecture}.{key}", value
    if get("attention.shared_kv_layers", 0) > get("block_count", _MOST_LAYERS):
        yield f"{header.architecture}.attention.shared_kv_layers", get("attention.shared_kv_layers")


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
