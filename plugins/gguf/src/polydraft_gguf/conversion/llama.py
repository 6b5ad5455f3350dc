"""Llama: metadata and tensor names."""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt

from polydraft_gguf.conversion.checkpoint import Checkpoint

__all__ = ["add_metadata", "arranged", "tensor_name", "unknown"]


def unknown(checkpoint: Checkpoint) -> str:
    """What llama.cpp would compute differently, as part of a sentence; empty if nothing."""
    text = checkpoint.text
    if (text.get("rope_scaling") or (text.get("rope_parameters") or {}).get("rope_type")) not in {None, "default"}:
        return "it scales its rotary embedding"
    if text.get("hidden_act", "silu") != "silu":
        return f"its activation is {text['hidden_act']}"
    return ""


def add_metadata(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
    """Add the architecture's hyperparameters."""
    text = checkpoint.text
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_block_count(checkpoint.layers)
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(text["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base((text.get("rope_parameters") or text)["rope_theta"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_vocab_size(text["vocab_size"])


def tensor_name(name: str, names: gguf.TensorNameMap) -> str | None:
    """The GGUF name of a checkpoint's tensor.

    Raises:
        KeyError: The tensor is unknown.
    """
    found: str | None = names.get_name(name, try_suffixes=(".weight",))
    if found is None:
        raise KeyError(name)
    return found


def arranged(name: str, values: npt.NDArray[np.float32], checkpoint: Checkpoint) -> npt.NDArray[np.float32]:
    """Rows of queries and keys in llama.cpp's order: it rotates adjacent pairs, Transformers rotates halves."""
    if not name.endswith(("attn_q.weight", "attn_k.weight")):
        return values
    heads = checkpoint.text["num_attention_heads" if name.endswith("attn_q.weight") else "num_key_value_heads"]
    by_half = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(by_half.swapaxes(1, 2).reshape(values.shape))
