"""Gemma 4 in older versions of vLLM: checkpoints of newer versions of Transformers, and drafters."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from packaging.version import Version
from polydraft.errors import ModelFormatError

from polydraft_vllm.patches import replace, upstream

__all__ = ["initialize_text_config", "load_weights", "read_newer_configs", "share_embeddings", "share_kv"]

_GLOBAL = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
"""Fields of a layer with full attention -> their names in configs that Transformers before 5.15 saved."""


def initialize_text_config(self: Any, *arguments: Any, per_layer_config: Any = None, **fields: Any) -> None:
    """``Gemma4TextConfig.__init__`` of Transformers before 5.15, which takes a ``per_layer_config`` too.

    Raises:
        ModelFormatError: The older config cannot express it.
    """
    if per_layer_config is not None:
        full = {str(index) for index, kind in enumerate(fields.get("layer_types") or ()) if kind == "full_attention"}
        # Transformers pads the numbers with zeros.
        layers = {str(index).lstrip("0") or "0": layer for index, layer in per_layer_config.items()}
        own: Mapping[str, Any] = next(iter(layers.values()), {})
        alike = all(layer == own for layer in layers.values()) and layers.keys() == (full if own else set())
        if not alike or own.keys() - _GLOBAL:
            raise ModelFormatError(
                "Its `per_layer_config` sets more than a head size and KV heads for all layers with full attention.",
                "Use vLLM 0.28 or later, with Transformers 5.15 or later.",
            )
        fields |= {older: own.get(name, fields.get(name)) for name, older in _GLOBAL.items()}
    upstream("transformers.models.gemma4.configuration_gemma4.Gemma4TextConfig.__init__")(self, *arguments, **fields)


def read_newer_configs() -> None:
    """Let Transformers before 5.15 read Gemma 4's newer configs in this process, which may be a server's client."""
    if Version(version("transformers")) < Version("5.15"):
        replace("transformers.models.gemma4.configuration_gemma4.Gemma4TextConfig.__init__", initialize_text_config)


def load_weights(self: Any, weights: Any) -> set[str]:
    """``Gemma4ForCausalLM.load_weights``, for checkpoints without key norms in layers that share the KV of others.

    vLLM gives these layers a norm that they never use, and refuses a checkpoint that lacks it.
    """
    loaded: set[str] = upstream("vllm.model_executor.models.gemma4.Gemma4ForCausalLM.load_weights")(self, weights)
    sharing = (name for name, module in self.named_modules() if getattr(module, "is_kv_shared_layer", False))
    return loaded | {f"{name}.k_norm.weight" for name in sharing}


def share_embeddings(self: Any, target_language_model: Any) -> None:
    """``Gemma4Proposer._maybe_share_embeddings``: the target's embedding is the drafter's, whose own is narrower."""
    if self.vllm_config.parallel_config.pipeline_parallel_size == 1:
        self.model.model.embed_tokens = target_language_model.model.embed_tokens


def share_kv(self: Any, target_layers: set[str]) -> None:
    """``Gemma4Proposer._setup_gemma4_kv_sharing``, which on CPU lets the drafter write KV."""
    upstream("vllm.v1.spec_decode.gemma4.Gemma4Proposer._setup_gemma4_kv_sharing")(self, target_layers)
    for layer in self.model.model.layers:
        attention = layer.self_attn.attn
        attention.impl.kv_sharing_target_layer_name = attention.kv_sharing_target_layer_name
