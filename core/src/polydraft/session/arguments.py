"""The keyword arguments of a call: one list for ``generate``, ``stream``, their async twins and ``generate_many``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

if TYPE_CHECKING:
    from polydraft.contract.processors import LogitsProcessor, StatefulLogitsProcessor
    from polydraft.contract.requests import Acceptance, Speculate

__all__ = ["CallArguments", "shows_arguments"]

_Method = TypeVar("_Method", bound=Callable[..., Any])


class CallArguments(TypedDict, total=False):
    """See ``Session.generate``. What is left out or None takes the default of ``GenerationSettings``."""

    max_new_tokens: int | None
    min_new_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    banned_token_ids: Sequence[int] | None
    forced_token_ids: Mapping[int, int] | None
    logits_processor: LogitsProcessor | StatefulLogitsProcessor | None
    acceptance: Acceptance | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    logprobs: int | None
    speculate: Speculate
    tools: Sequence[Mapping[str, Any]] | None
    chat_template_kwargs: Mapping[str, Any] | None


def shows_arguments(method: _Method) -> _Method:
    """Let ``help`` and completion see each argument of a method that takes ``**arguments: Unpack[CallArguments]``."""
    signature = inspect.signature(method)
    parameters = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    for name, kind in CallArguments.__annotations__.items():
        default = "auto" if name == "speculate" else None
        text = getattr(kind, "__forward_arg__", kind)
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=text))
    method.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return method
