"""The toy checkpoints' ``config.json``, checked. A toy has no weight file: its weights are made from ``seed``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from polydraft.errors import ModelFormatError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from polydraft_reference.tokenizer import VOCAB_SIZE

__all__ = ["ASSISTANT_TYPE", "MODEL_TYPE", "AssistantConfig", "ModelConfig", "read_config"]

MODEL_TYPE = "polydraft_reference"
ASSISTANT_TYPE = "polydraft_reference_assistant"


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    vocab_size: int = Field(default=VOCAB_SIZE, ge=VOCAB_SIZE, le=VOCAB_SIZE)
    seed: int = Field(ge=0, lt=2**32)


class ModelConfig(_Config):
    """A toy transformer, target or draft model; the names are those of Transformers."""

    model_type: Literal["polydraft_reference"]
    hidden_size: int = Field(default=32, ge=2, le=1024)
    intermediate_size: int = Field(default=64, ge=1, le=4096)
    num_attention_heads: int = Field(default=2, ge=1)
    layer_types: list[Literal["sliding_attention", "full_attention"]] = Field(min_length=1, max_length=64)
    sliding_window: int = Field(default=16, ge=1, description="Tokens a sliding layer sees, the newest included.")
    max_position_embeddings: int = Field(default=1024, ge=2, le=2**20, description="Context length, tokens.")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError("hidden_size must be a multiple of num_attention_heads")
        return self


class AssistantConfig(_Config):
    """A drafter of adjustable quality for one target; ``drafters.mtp`` runs it."""

    model_type: Literal["polydraft_reference_assistant"]
    backbone_hidden_size: int = Field(ge=2, description="hidden_size of the target it belongs to.")
    agreement: float = Field(ge=0.0, le=1.0, description="Share of positions at which it drafts the target's choice.")


C = TypeVar("C", bound=_Config)


def read_config(kind: type[C], data: Mapping[str, Any], name: str) -> C:
    """Check a parsed config.json.

    Args:
        kind: ``ModelConfig`` or ``AssistantConfig``.
        data: The parsed file.
        name: Name of the checkpoint, for the message.

    Raises:
        ModelFormatError: A field is missing, unknown, of another type or out of range.
    """
    try:
        return kind.model_validate(dict(data))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "config"
        raise ModelFormatError(
            f"config.json of {name} is not a toy model's: {field}: {first['msg']}.",
            "Compare it with the folder models/ of polydraft_reference.",
        ) from error
