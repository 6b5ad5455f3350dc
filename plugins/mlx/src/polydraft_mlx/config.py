"""Translate configs of Transformers for mlx-lm's classes, in memory; nothing on disk is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polydraft.checkpoints.config import layer_config, layer_types, text_config
from polydraft.errors import ModelFormatError, UnsupportedError

__all__ = ["is_gemma4", "overrides", "text_overrides"]

# Defaults of Gemma4TextConfig (transformers 5.22, configuration_gemma4.py) that differ from mlx-lm's. A field that is
# missing in config.json has Transformers' default.
_GEMMA4_DEFAULTS: dict[str, Any] = {
    "attention_k_eq_v": False,
    "final_logit_softcapping": None,
    "global_head_dim": 512,
    "head_dim": 256,
    "hidden_size": 2304,
    "hidden_size_per_layer_input": 256,
    "intermediate_size": 9216,
    "num_attention_heads": 8,
    "num_hidden_layers": 30,
    "num_key_value_heads": 4,
    "num_kv_shared_layers": 0,
    "sliding_window": 512,
    "tie_word_embeddings": True,
    "use_double_wide_mlp": False,
    "vocab_size": 262144,
}

_ACTIVATION = "gelu_pytorch_tanh"


def is_gemma4(config: Mapping[str, Any]) -> bool:
    """Whether the text model is a Gemma 4."""
    return str(text_config(config).get("model_type") or config.get("model_type") or "").startswith("gemma4")


def overrides(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The ``model_config`` of ``mlx_lm.utils.load_model`` for a target or draft model.

    Args:
        config: The parsed ``config.json``.
        name: The model's name, for messages.

    Raises:
        ModelFormatError: Layers differ in a way that mlx-lm cannot express, or the activation is not Gemma 4's.
        UnsupportedError: Attention is not causal.
    """
    if not is_gemma4(config):
        return _rope(config)
    text = text_overrides(config, name)
    if "text_config" not in config:
        return text
    # mlx-lm's wrapper reads vocab_size from the outer config, and defaults to that of Google's models.
    merged = {**config["text_config"], **text}
    return {"text_config": merged, "vocab_size": merged["vocab_size"]}


def text_overrides(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Fields of a Gemma 4 text model under the names that mlx-lm reads; errors as for ``overrides``.

    Transformers 5.17 and later write the differences between layers as ``per_layer_config``. Earlier versions, and
    mlx-lm, have ``global_head_dim`` and ``num_global_key_value_heads`` for layers with full attention.
    """
    text = text_config(config)
    if text.get("use_bidirectional_attention") == "all":
        raise UnsupportedError(f"The attention of {name} is bidirectional.", "Choose a causal model.")
    activation = text.get("hidden_activation") or _ACTIVATION
    if activation != _ACTIVATION:
        raise ModelFormatError(
            f"The activation of {name} is {activation}, but mlx-lm always computes {_ACTIVATION} in Gemma 4.",
            "Load this model with the transformers or vllm backend.",
        )
    changed = {key: default for key, default in _GEMMA4_DEFAULTS.items() if key not in text}
    changed["layer_types"] = layer_types({"model_type": "gemma4_text", **text})
    if text.get("per_layer_config"):
        changed.update(_global_heads(text, changed, name))
    return changed


def _global_heads(text: Mapping[str, Any], changed: Mapping[str, Any], name: str) -> dict[str, Any]:
    """``global_head_dim`` and ``num_global_key_value_heads`` from ``per_layer_config``."""
    found: dict[str, dict[str, set[int]]] = {}
    for index, kind in enumerate(changed["layer_types"]):
        layer = layer_config(text, index)
        if unknown := set(layer) - {"head_dim", "num_key_value_heads"}:
            raise ModelFormatError(
                f"per_layer_config of {name} sets {', '.join(sorted(unknown))}, which mlx-lm cannot set per layer.",
                "Load this model with the transformers or vllm backend.",
            )
        for key in ("head_dim", "num_key_value_heads"):
            value = layer.get(key) or text.get(key) or changed.get(key)
            found.setdefault(kind, {}).setdefault(key, set()).add(int(value))  # type: ignore[arg-type]
    if any(len(values) > 1 for kinds in found.values() for values in kinds.values()):
        raise ModelFormatError(
            f"Layers of one attention type differ in {name}, which mlx-lm cannot express.",
            "Load this model with the transformers or vllm backend.",
        )
    translated: dict[str, Any] = {}
    if sliding := found.get("sliding_attention"):
        translated["head_dim"] = next(iter(sliding["head_dim"]))
        translated["num_key_value_heads"] = next(iter(sliding["num_key_value_heads"]))
    if full := found.get("full_attention"):
        translated["global_head_dim"] = next(iter(full["head_dim"]))
        translated["num_global_key_value_heads"] = next(iter(full["num_key_value_heads"]))
        apart = translated["num_global_key_value_heads"] != translated.get("num_key_value_heads")
        if apart and not (text.get("attention_k_eq_v") or changed.get("attention_k_eq_v")):
            # mlx-lm reads num_global_key_value_heads only where keys and values are the same (gemma4_text.Attention).
            raise ModelFormatError(
                f"Full-attention layers of {name} have their own number of heads without attention_k_eq_v, which "
                "mlx-lm cannot express.",
                "Load this model with the transformers or vllm backend.",
            )
    return translated


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling``, which Transformers 5 writes as ``rope_parameters``.

    Without ``rope_theta``, mlx-lm's older classes silently use their own defaults. Models with two kinds of attention
    (Gemma 3) have parameters for each.
    """
    text = text_config(config)
    given = text.get("rope_parameters")
    if not isinstance(given, Mapping):
        return {}
    full, sliding = given, given.get("sliding_attention")
    found: dict[str, Any] = {}
    if isinstance(given.get("full_attention"), Mapping):
        full = given["full_attention"]
        if isinstance(sliding, Mapping) and "rope_theta" in sliding:
            found["rope_local_base_freq"] = sliding["rope_theta"]
    if "rope_theta" not in full:
        return {}
    found["rope_theta"] = full["rope_theta"]
    if full.get("rope_type", "default") != "default":
        found["rope_scaling"] = {key: value for key, value in full.items() if key != "rope_theta"}
    found = {key: value for key, value in found.items() if key not in text}
    if not found or "text_config" not in config:
        return found
    return {"text_config": {**text, **found}}
