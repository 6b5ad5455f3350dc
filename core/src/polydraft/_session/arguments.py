"""The keyword arguments of a call: one list for ``generate``, ``stream``, their async twins and ``generate_many``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from polydraft._signatures import shows_arguments

if TYPE_CHECKING:
    from polydraft.contract.processors import LogitsProcessor, StatefulLogitsProcessor
    from polydraft.contract.requests import Acceptance, Guided, Speculate

__all__ = ["CallArguments", "call_arguments"]


class CallArguments(TypedDict, total=False):
    """The keyword arguments of ``Session.generate``. Omitted or None: the default of ``GenerationSettings``."""

    max_new_tokens: int | None
    min_new_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    banned_token_ids: Sequence[int] | None
    forced_token_ids: Mapping[int, int] | None
    logits_processor: LogitsProcessor | StatefulLogitsProcessor | None
    guided: Guided | Mapping[str, Any] | None
    response_format: Mapping[str, Any] | type[Any] | None
    acceptance: Acceptance | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    logprobs: int | None
    speculate: Speculate
    num_speculative_tokens: int | None
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    chat_template_kwargs: Mapping[str, Any] | None
    continue_final_message: bool | None


call_arguments = shows_arguments(CallArguments, {"speculate": "auto", "continue_final_message": False})
"""Decorates a method that takes ``**arguments: Unpack[CallArguments]``."""
