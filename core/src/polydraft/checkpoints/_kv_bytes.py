"""What a context takes: the bytes of a KV cache, by a config alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polydraft.checkpoints.config import family, layer_shape, layer_types, text_config

__all__ = ["kv_bytes"]


def kv_bytes(config: Mapping[str, Any], length: int, number_bytes: int) -> int | None:
    """Bytes of the keys and values of ``length`` tokens; None if the config lacks their sizes.

    A number takes ``number_bytes``. Layers that share those of others store none; layers with a sliding window store
    their window at most.
    """
    text = _with_heads(text_config(config))
    layers = text.get("num_hidden_layers")
    if not isinstance(layers, int):
        return None
    kinds = layer_types(config) or ["full_attention"] * layers
    window = text.get("sliding_window")
    total = 0
    for index, kind in enumerate(kinds[: layers - int(text.get("num_kv_shared_layers") or 0)]):
        shape = layer_shape(text, index, kind)
        if shape is None:
            return None
        slides = kind == "sliding_attention" and isinstance(window, int) and window > 0
        # Keys and values.
        total += 2 * shape.heads * shape.head_dim * (min(length, window) if slides and window else length)
    return total * number_bytes


def _with_heads(text: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config with the head counts and sizes that it leaves out, as most architectures mean it."""
    heads, hidden = text.get("num_attention_heads"), text.get("hidden_size")
    if family(text).startswith("gemma4") or not isinstance(heads, int) or heads < 1:
        return text
    usual = {"num_key_value_heads": heads, "head_dim": hidden // heads if isinstance(hidden, int) else None}
    return {**text, **{name: value for name, value in usual.items() if text.get(name) is None}}
