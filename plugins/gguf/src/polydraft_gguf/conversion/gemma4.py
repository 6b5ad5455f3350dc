"""Gemma 4 targets and assistants: metadata and tensor names.

Keys and shapes are those that llama.cpp reads (``src/models/gemma4.cpp``, ``gemma4-assistant.cpp``). Names of tensors
come from the ``gguf`` package, which does not have the assistant's two projections yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from polydraft.checkpoints.config import layer_config

from polydraft_gguf.conversion.checkpoint import Checkpoint

__all__ = ["add_metadata", "architecture", "extra_tensors", "tensor_name", "unknown"]

_UNROTATED = 1e30
"""A wavelength factor so large that nothing rotates: how llama.cpp leaves part of a head unrotated."""
_OWN_NAMES = {
    "pre_projection.weight": "nextn.pre_projection.weight",
    "post_projection.weight": "nextn.post_projection.weight",
}


def architecture(checkpoint: Checkpoint) -> str:
    """llama.cpp's name of the architecture."""
    return "gemma4-assistant" if "backbone_hidden_size" in checkpoint.config else "gemma4"


def unknown(checkpoint: Checkpoint) -> str:
    """What llama.cpp would compute differently, as part of a sentence; empty if nothing."""
    text = checkpoint.text
    if text.get("hidden_activation", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        return f"its activation is {text['hidden_activation']}"
    if text.get("use_bidirectional_attention") == "all":
        return "it attends to later tokens"
    rope = text.get("rope_parameters") or {}
    for kind, known in (("full_attention", "proportional"), ("sliding_attention", "default")):
        found = rope.get(kind) or {}
        partly = known == "default" and found.get("partial_rotary_factor", 1) != 1
        if partly or found.get("rope_type", known) != known:
            layers = kind.removesuffix("_attention")
            return f"its rotary embedding of {layers} layers is of type {found.get('rope_type')}"
    return ""


def add_metadata(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
    """Add the architecture's hyperparameters."""
    text, layers, arch = checkpoint.text, checkpoint.layers, writer.arch
    window = [kind == "sliding_attention" for kind in text["layer_types"]]
    head_dim, full_dim = int(text["head_dim"]), int(_full(text, "head_dim", "global_head_dim"))
    kv_heads, full_heads = text["num_key_value_heads"], _full(text, "num_key_value_heads", "num_global_key_value_heads")
    shared, width = int(text.get("num_kv_shared_layers") or 0), int(text["intermediate_size"])
    wide = bool(text.get("use_double_wide_mlp"))
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_block_count(layers)
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv([kv_heads if sliding else full_heads for sliding in window])
    # Layers that use the keys and values of others have feed-forward parts of twice the width.
    widths = [2 * width if wide and layer >= layers - shared else width for layer in range(layers)]
    writer.add_feed_forward_length(widths if wide else width)
    # The plain keys are those of full-attention layers; sliding layers have the suffix _swa.
    writer.add_key_length(full_dim)
    writer.add_value_length(full_dim)
    writer.add_uint32(f"{arch}.attention.key_length_swa", head_dim)
    writer.add_uint32(f"{arch}.attention.value_length_swa", head_dim)
    writer.add_rope_dimension_count(full_dim)
    writer.add_uint32(f"{arch}.rope.dimension_count_swa", head_dim)
    writer.add_rope_freq_base(text["rope_parameters"]["full_attention"]["rope_theta"])
    writer.add_float32(f"{arch}.rope.freq_base_swa", text["rope_parameters"]["sliding_attention"]["rope_theta"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_sliding_window(text["sliding_window"])
    writer.add_array(f"{arch}.attention.sliding_window_pattern", window)
    writer.add_uint32(f"{arch}.attention.shared_kv_layers", shared)
    writer.add_uint32(f"{arch}.embedding_length_per_layer_input", int(text.get("hidden_size_per_layer_input") or 0))
    # If the key is missing, llama.cpp caps at 30: "no cap" has to be written as 0.
    writer.add_final_logit_softcapping(text.get("final_logit_softcapping") or 0.0)
    if text.get("enable_moe_block"):
        writer.add_expert_count(text["num_experts"])
        writer.add_expert_used_count(text["top_k_experts"])
        writer.add_expert_feed_forward_length(text["moe_intermediate_size"])
    if arch == "gemma4-assistant":
        writer.add_uint32(f"{arch}.embedding_length_out", checkpoint.config["backbone_hidden_size"])
        writer.add_uint32(f"{arch}.nextn_predict_layers", layers)


def extra_tensors(checkpoint: Checkpoint) -> dict[str, npt.NDArray[np.float32]]:
    """Tensors that no checkpoint has: the wavelength factors of full-attention layers, shape (head_dim / 2,)."""
    text = checkpoint.text
    half = int(_full(text, "head_dim", "global_head_dim")) // 2
    # Pairs (i, i + half) of a head's dimensions; only the first ``rotated`` of them are rotated.
    rotated = int(2 * half * text["rope_parameters"]["full_attention"]["partial_rotary_factor"]) // 2
    return {"rope_freqs.weight": np.array([1.0] * rotated + [_UNROTATED] * (half - rotated), np.float32)}


def tensor_name(name: str, names: gguf.TensorNameMap, *, own_head: bool) -> str | None:
    """The GGUF name of a checkpoint's tensor; None if llama.cpp does not use it.

    Args:
        name: Its name in the checkpoint.
        names: The ``gguf`` package's names.
        own_head: Whether this is an assistant whose head is not its embedding: llama.cpp uses an assistant's embedding
            as its head only, so the head is written in its place.

    Raises:
        KeyError: The tensor is unknown.
    """
    if name.startswith("masked_embedding."):
        return None  # the centroid head: llama.cpp drafts with the full head
    if name in _OWN_NAMES:
        return _OWN_NAMES[name]
    name = name.replace("model.language_model.", "model.")
    if own_head and name in {"lm_head.weight", "model.embed_tokens.weight"}:
        return "token_embd.weight" if name == "lm_head.weight" else None
    stem, _, last = name.rpartition(".")
    if stem.endswith(".router") and last in {"scale", "per_expert_scale"}:
        layer = stem.split(".")[2]
        part = "ffn_gate_inp" if last == "scale" else "ffn_down_exps"
        return f"blk.{layer}.{part}.scale"
    found: str | None = names.get_name(name, try_suffixes=(".weight",))
    if found is None:
        raise KeyError(name)
    return found if found.endswith(".weight") else f"{found}.weight"


def _full(text: Mapping[str, Any], name: str, older: str) -> Any:
    """A hyperparameter of full-attention layers: newer configs give it per layer, older ones in a separate field."""
    of_layer = layer_config(text, text["layer_types"].index("full_attention"))
    return of_layer.get(name) or text.get(older) or text[name]
