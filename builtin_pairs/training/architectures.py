"""The shapes of the built-in models: small versions of Gemma 4, and a small Llama pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from .tokenizer import BOS, EOS, MODEL_MAX_LENGTH, PAD, STOP_IDS, VOCAB_SIZE

SLIDING_WINDOW = 64
LAYER_SCALARS = (1.0, 0.875)
"""Not all ones, so that an engine that ignores the scalars computes other logits."""
NUM_CENTROIDS = 64
CENTROID_TOP_K = 12
DEFAULT_K = 4
TARGET_SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95}
"""Gemma 4's published settings."""
FIXED_DRAFTS = {
    "num_assistant_tokens": DEFAULT_K,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.0,
}
"""Make Transformers' own loop draft a fixed number of tokens."""

S, F = "sliding_attention", "full_attention"
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": MODEL_MAX_LENGTH,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": BOS,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Shape:
    """Settings specific to one Gemma pair."""

    hidden_size: int
    intermediate_size: int
    layer_types: tuple[str, ...]
    num_key_value_heads: int
    num_global_key_value_heads: int | None
    extra: dict[str, Any]
    """Further fields of the target's config."""
    centroid_head: bool = False


NO_LAYER_INPUTS = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
MIXTURE = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64}
SHAPES = {
    "tiny-e2b": Shape(
        hidden_size=160,
        intermediate_size=256,
        layer_types=(S, S, S, F, S, S, S, F),
        num_key_value_heads=1,
        num_global_key_value_heads=None,
        extra={
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "num_kv_shared_layers": 4,
            "use_double_wide_mlp": True,
        },
        centroid_head=True,
    ),
    "tiny-31b": Shape(192, 480, (S, S, F, S, S, F), 2, 1, {**NO_LAYER_INPUTS, "attention_k_eq_v": True}),
    "tiny-26b": Shape(160, 128, (S, S, F, S, S, F), 2, 1, {**NO_LAYER_INPUTS, "attention_k_eq_v": True, **MIXTURE}),
}
ASSISTANT_LAYERS = [S, S, S, F]
LLAMA, LLAMA_DRAFT = "tiny-llama", "tiny-llama-draft"
PAIRS = {name: f"{name}-assistant" for name in SHAPES} | {LLAMA: LLAMA_DRAFT}


def gemma_text(shape: Shape, **fields: Any) -> Gemma4TextConfig:
    """The text configuration shared by target and drafter, with `fields` added."""
    # Full layers need their own head size: Transformers turns these two keywords into `per_layer_config`.
    wide: dict[str, Any] = {"global_head_dim": 64}
    if shape.num_global_key_value_heads is not None:
        wide["num_global_key_value_heads"] = shape.num_global_key_value_heads
    return Gemma4TextConfig(
        **COMMON,
        **wide,
        **fields,
        head_dim=32,
        num_attention_heads=4,
        num_key_value_heads=shape.num_key_value_heads,
        sliding_window=SLIDING_WINDOW,
    )


def gemma_target(shape: Shape) -> Gemma4ForCausalLM:
    """A fresh target."""
    config = gemma_text(
        shape,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=len(shape.layer_types),
        layer_types=list(shape.layer_types),
        final_logit_softcapping=30.0,
        **shape.extra,
    )
    model = Gemma4ForCausalLM(config)
    prepare_gemma(model)
    model.generation_config = generation_config(**TARGET_SAMPLING)
    return model


def gemma_assistant(shape: Shape) -> Gemma4AssistantForCausalLM:
    """A fresh drafter for the target of the same shape."""
    text = gemma_text(
        shape,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=len(ASSISTANT_LAYERS),
        layer_types=ASSISTANT_LAYERS,
        num_kv_shared_layers=len(ASSISTANT_LAYERS),
        attention_k_eq_v=shape.extra.get("attention_k_eq_v", False),
        **NO_LAYER_INPUTS,
    )
    config = Gemma4AssistantConfig(
        text_config=text,
        backbone_hidden_size=shape.hidden_size,
        use_ordered_embeddings=shape.centroid_head,
        num_centroids=NUM_CENTROIDS,
        centroid_intermediate_top_k=CENTROID_TOP_K,
        **{name: COMMON[name] for name in ("tie_word_embeddings", "pad_token_id", "eos_token_id", "bos_token_id")},
    )
    model = Gemma4AssistantForCausalLM(config)
    prepare_gemma(model)
    if model.masked_embedding is not None:
        model.masked_embedding.token_ordering.copy_(torch.arange(VOCAB_SIZE))
    model.generation_config = generation_config(**FIXED_DRAFTS)
    return model


def prepare_gemma(model: Any) -> None:
    """Initialise the query norms to 1/sqrt(head_dim), as Gemma 4 does not scale attention; set the layer scalars."""
    for module in model.modules():
        if type(module).__name__ == "Gemma4TextAttention":
            module.q_norm.weight.data.fill_(module.head_dim**-0.5)
    for index, layer in enumerate(model.model.layers):
        layer.layer_scalar.fill_(LAYER_SCALARS[index % len(LAYER_SCALARS)])


def llama(*, draft: bool) -> LlamaForCausalLM:
    """A fresh Llama target or drafter."""
    config = LlamaConfig(
        **COMMON,
        hidden_size=96 if draft else 192,
        intermediate_size=192 if draft else 320,
        num_hidden_layers=2 if draft else 5,
        num_attention_heads=3 if draft else 6,
        num_key_value_heads=1 if draft else 2,
        head_dim=32,
        rms_norm_eps=1e-6,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    model.generation_config = generation_config(**(FIXED_DRAFTS if draft else TARGET_SAMPLING))
    return model


def generation_config(**fields: Any) -> GenerationConfig:
    """A generation config with all of Gemma 4's stop tokens."""
    return GenerationConfig(bos_token_id=BOS, eos_token_id=list(STOP_IDS), pad_token_id=PAD, **fields)  # type: ignore[no-untyped-call]


def build_target(name: str) -> PreTrainedModel:
    """Create an untrained target by name."""
    return llama(draft=False) if name == LLAMA else gemma_target(SHAPES[name])


def build_drafter(name: str) -> PreTrainedModel:
    """Create an untrained drafter for the named target."""
    return llama(draft=True) if name == LLAMA else gemma_assistant(SHAPES[name])
