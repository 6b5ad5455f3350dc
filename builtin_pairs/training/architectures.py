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
    """The differences between the Gemma pairs."""

    name: str
    hidden_size: int
    intermediate_size: int
    layer_types: tuple[str, ...]
    num_attention_heads: int
    num_key_value_heads: int
    num_global_key_value_heads: int | None
    extra: tuple[tuple[str, Any], ...]
    assistant_hidden_size: int = 96
    assistant_intermediate_size: int = 128
    assistant_layer_types: tuple[str, ...] = (S, S, S, F)
    centroid_head: bool = False
    head_dim: int = 32
    global_head_dim: int = 64

    @property
    def assistant(self) -> str:
        """The drafter's name."""
        return f"{self.name}-assistant"


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            name="tiny-e2b",
            hidden_size=160,
            intermediate_size=256,
            layer_types=(S, S, S, F, S, S, S, F),
            num_attention_heads=4,
            num_key_value_heads=1,
            num_global_key_value_heads=None,
            extra=(
                ("hidden_size_per_layer_input", 16),
                ("vocab_size_per_layer_input", VOCAB_SIZE),
                ("num_kv_shared_layers", 4),
                ("use_double_wide_mlp", True),
            ),
            centroid_head=True,
        ),
        Shape(
            name="tiny-31b",
            hidden_size=192,
            intermediate_size=480,
            layer_types=(S, S, F, S, S, F),
            num_attention_heads=4,
            num_key_value_heads=2,
            num_global_key_value_heads=1,
            extra=(("hidden_size_per_layer_input", 0), ("vocab_size_per_layer_input", 0), ("attention_k_eq_v", True)),
        ),
        Shape(
            name="tiny-26b",
            hidden_size=160,
            intermediate_size=128,
            layer_types=(S, S, F, S, S, F),
            num_attention_heads=4,
            num_key_value_heads=2,
            num_global_key_value_heads=1,
            extra=(
                ("hidden_size_per_layer_input", 0),
                ("vocab_size_per_layer_input", 0),
                ("attention_k_eq_v", True),
                ("enable_moe_block", True),
                ("num_experts", 8),
                ("top_k_experts", 2),
                ("moe_intermediate_size", 64),
            ),
        ),
    )
}
LLAMA, LLAMA_DRAFT = "tiny-llama", "tiny-llama-draft"
PAIRS = {name: shape.assistant for name, shape in SHAPES.items()} | {LLAMA: LLAMA_DRAFT}


def gemma_text(shape: Shape, **fields: Any) -> Gemma4TextConfig:
    """The text configuration shared by target and drafter, with `fields` added."""
    # Full layers need their own head size: Transformers turns these two keywords into `per_layer_config`.
    wide: dict[str, Any] = {"global_head_dim": shape.global_head_dim}
    if shape.num_global_key_value_heads is not None:
        wide["num_global_key_value_heads"] = shape.num_global_key_value_heads
    return Gemma4TextConfig(
        **COMMON,
        **wide,
        **fields,
        head_dim=shape.head_dim,
        num_attention_heads=shape.num_attention_heads,
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
        **dict(shape.extra),
    )
    model = Gemma4ForCausalLM(config)
    prepare_gemma(model)
    model.generation_config = target_generation_config()
    return model


def gemma_assistant(shape: Shape) -> Gemma4AssistantForCausalLM:
    """A fresh drafter for the target of the same shape."""
    text = gemma_text(
        shape,
        hidden_size=shape.assistant_hidden_size,
        intermediate_size=shape.assistant_intermediate_size,
        num_hidden_layers=len(shape.assistant_layer_types),
        layer_types=list(shape.assistant_layer_types),
        num_kv_shared_layers=len(shape.assistant_layer_types),
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=0,
        attention_k_eq_v=dict(shape.extra).get("attention_k_eq_v", False),
    )
    fields: dict[str, Any] = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}
    config = Gemma4AssistantConfig(
        text_config=text,
        backbone_hidden_size=shape.hidden_size,
        use_ordered_embeddings=shape.centroid_head,
        num_centroids=NUM_CENTROIDS,
        centroid_intermediate_top_k=CENTROID_TOP_K,
        tie_word_embeddings=True,
        **fields,
    )
    model = Gemma4AssistantForCausalLM(config)
    prepare_gemma(model)
    if model.masked_embedding is not None:
        model.masked_embedding.token_ordering.copy_(torch.arange(VOCAB_SIZE))
    model.generation_config = drafter_generation_config()
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
    model.generation_config = drafter_generation_config() if draft else target_generation_config()
    return model


def target_generation_config() -> GenerationConfig:
    """Gemma 4's published sampling settings and its list of stop tokens."""
    return GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=BOS,
        eos_token_id=list(STOP_IDS),
        pad_token_id=PAD,
        do_sample=True,
        temperature=1.0,
        top_k=64,
        top_p=0.95,
    )


def drafter_generation_config() -> GenerationConfig:
    """Makes Transformers' own loop draft a fixed number of tokens."""
    return GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=BOS,
        eos_token_id=list(STOP_IDS),
        pad_token_id=PAD,
        num_assistant_tokens=DEFAULT_K,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
    )


def build_target(name: str) -> PreTrainedModel:
    """A fresh target by name."""
    return llama(draft=False) if name == LLAMA else gemma_target(SHAPES[name])


def build_drafter(name: str) -> PreTrainedModel:
    """A fresh drafter by its target's name."""
    return llama(draft=True) if name == LLAMA else gemma_assistant(SHAPES[name])


def parameters(model: PreTrainedModel) -> int:
    """Distinct parameters: tied weights count once."""
    return sum(parameter.numel() for parameter in model.parameters())
