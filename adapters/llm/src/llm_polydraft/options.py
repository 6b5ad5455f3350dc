"""The models' options: ``llm -o NAME VALUE``, or keyword arguments in Python."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import llm
from pydantic import BeforeValidator, Field

__all__ = ["AnyTargetOptions", "PolydraftOptions"]


def _parsed(value: Any) -> Any:
    """JSON as the command line gives it; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f'{value!r} is not a JSON object, such as {{"threads": 4}}') from error


class PolydraftOptions(llm.Options):
    """Arguments of ``polydraft.load`` and ``Session.generate``, under the same names; None: polydraft's own default."""

    backend: str | None = Field(default=None, description="The engine, such as transformers; auto: the fittest.")
    drafter: str | None = Field(
        default=None, description="auto, ngram, a Hub id or folder, or none for plain decoding."
    )
    num_speculative_tokens: int | Literal["auto"] | None = Field(
        default=None, description="k: tokens proposed in one round, the bonus token excluded; auto: picked each round."
    )
    quantization: str | None = Field(
        default=None, description="Which of the target's packings: auto, none, or a name such as q4_0."
    )
    exactness: Literal["standard", "bitwise"] | None = Field(
        default=None, description="bitwise: steps of fixed shape, whose output equals plain decoding bit by bit."
    )
    context_length: int | None = Field(default=None, description="Tokens of prompt and output together.")
    dtype: str | None = Field(default=None, description="auto, float32, bfloat16 or float16.")
    device: str | None = Field(default=None, description="auto, cpu, cuda, cuda:1, mps, ...")
    revision: str | None = Field(default=None, description="Branch, tag or commit of the target on the Hub.")
    local_files_only: bool | None = Field(default=None, description="Use the Hub's cache only, never the network.")
    engine_options: Annotated[dict[str, Any] | None, BeforeValidator(_parsed)] = Field(
        default=None, description="The backend's own options, as a JSON object."
    )
    max_new_tokens: int | None = Field(default=None, description="Maximum number of tokens to generate: 512.")
    temperature: float | None = Field(default=None, description="0, the default, is greedy.")
    top_p: float | None = Field(default=None, description="Keep the most likely tokens that hold this share.")
    top_k: int | None = Field(default=None, description="Keep the k likeliest tokens; 0 keeps all.")
    min_p: float | None = Field(default=None, description="Drop tokens below this share of the likeliest one's.")
    repetition_penalty: float | None = Field(default=None, description="Above 1: discourages tokens seen before.")
    presence_penalty: float | None = Field(default=None, description="Subtracted from logits of the output's tokens.")
    frequency_penalty: float | None = Field(default=None, description="The same, once per occurrence.")
    seed: int | None = Field(default=None, description="The same seed gives the same output.")
    stop: str | list[str] | None = Field(default=None, description="Text that ends the output.")
    speculate: Literal["auto", "on", "off"] | None = Field(
        default=None, description="on: an error where speculation is not possible; off: plain decoding."
    )
    enable_thinking: bool | None = Field(
        default=None, description="Let the model think first, where its chat template can."
    )


class AnyTargetOptions(PolydraftOptions):
    """Those of the model ``polydraft``, whose target is an option as well."""

    target: str | None = Field(default=None, description="The model to run: a Hub id, a folder, a file, builtin:NAME.")
