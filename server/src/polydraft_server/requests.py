"""The bodies of requests, checked, and what they ask ``Session.generate`` for.

The fields are OpenAI's, and those that vLLM adds. What would change the answer and cannot be honoured is refused; a
field that nobody knows is told, and does no harm.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar, cast

from polydraft import Prompt, Speculate
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from polydraft_server.problems import ApiError

__all__ = ["ChatRequest", "CompletionRequest", "checked", "client_of"]

_MOST_ANSWERS = 128
_MOST_TOLD = 20
"""Unknown fields that an answer names: each is compared with all known ones."""
_COMPLETION_TOKENS = 16
"""OpenAI's default for ``/v1/completions``. A chat answer may fill the context."""

_REFUSED: dict[str, tuple[Any, ...]] = {
    # field -> the values that ask for nothing
    "suffix": (None, ""),
    "functions": (None, []),
    "function_call": (None, "none"),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "web_search_options": (None,),
    "use_beam_search": (None, False),
    "length_penalty": (None, 1.0),
    "prompt_logprobs": (None,),
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
    "truncate_prompt_tokens": (None,),
    "documents": (None, []),
    "chat_template": (None,),
    "include_stop_str_in_output": (None, False),
    "skip_special_tokens": (None, True),
    "add_generation_prompt": (None, True),
    "prompt_embeds": (None,),
    "logits_processors": (None, []),
}
"""Fields that would change the answer, and that this server does not have."""
_INSTEAD = {
    "functions": "Give `tools`.",
    "function_call": "Give `tool_choice`.",
    "truncate_prompt_tokens": "Shorten the prompt.",
    "chat_template": "The server's own template is used; `chat_template_kwargs` sets its variables.",
    "add_generation_prompt": "Give `continue_final_message` to continue the last message.",
}
_WITHOUT_EFFECT = frozenset(
    (
        *("user", "safety_identifier", "spaces_between_special_tokens", "include_reasoning"),
        *("return_tokens_as_token_ids", "request_id", "metadata", "store", "service_tier", "verbosity"),
        *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "priority", "cache_salt"),
    )
)
"""Known fields that say nothing about the answer's text: accepted without a word."""


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    include_usage: bool | None = None


class _Request(BaseModel):
    """Fields of both endpoints. None is the default of each."""

    model_config = ConfigDict(extra="allow", strict=True, hide_input_in_errors=True)
    prompt_field: ClassVar[str]

    model: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, le=_MOST_ANSWERS)
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = Field(default=None, description="a text or a list of texts")
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = Field(default=None, description="a JSON schema, as an object or a text")
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    return_token_ids: bool | None = None
    speculate: Speculate | None = None
    num_speculative_tokens: int | None = None
    user: str | None = None
    safety_identifier: str | None = None

    @property
    def answers(self) -> int:
        """Answers for each prompt."""
        return 1 if self.n is None else self.n

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def ignored(self) -> list[str]:
        """The first fields that nobody knows, with what may have been meant."""
        known = {*type(self).model_fields, *_REFUSED}
        extra = self.model_extra or {}
        unknown = sorted(name for name in extra.keys() - known - _WITHOUT_EFFECT if extra[name] is not None)
        further = (self.stream_options.model_extra or {}) if self.stream_options else {}
        unknown += sorted(f"stream_options.{name}" for name in further if name != "include_obfuscation")
        return [_with_guess(name, known) for name in unknown[:_MOST_TOLD]]

    def _arguments(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of ``Session.generate`` that both endpoints have."""
        self._refuse()
        found: dict[str, Any] = {
            "max_new_tokens": self.max_tokens,
            "min_new_tokens": self.min_tokens,
            "stop": _stops(self.stop),
            "logit_bias": None if self.logit_bias is None else _biases(self.logit_bias),
            # vLLM's -1 is no limit, as 0 is.
            "top_k": 0 if self.top_k == -1 else self.top_k,
        }
        for name in ("stop_token_ids", "ignore_eos", "seed", "temperature", "top_p", "min_p", "typical_p", "speculate"):
            found[name] = getattr(self, name)
        for name in ("presence_penalty", "frequency_penalty", "repetition_penalty", "num_speculative_tokens"):
            found[name] = getattr(self, name)
        found["response_format"], found["guided"] = self.response_format, self._guided()
        return {**defaults, **{name: value for name, value in found.items() if value is not None}}

    def _guided(self) -> dict[str, Any] | None:
        """What the output must match, in vLLM's fields: in one, or each kind in its own."""
        found = dict(self.structured_outputs or {})
        for kind in ("json", "regex", "choice", "grammar"):
            if (given := getattr(self, f"guided_{kind}")) is not None:
                if found.get(kind, given) != given:
                    raise ApiError.of(
                        400,
                        f"`guided_{kind}` and `structured_outputs` say different things.",
                        "Leave one of them out.",
                        param=f"guided_{kind}",
                    )
                found[kind] = given
        return {kind: given for kind, given in found.items() if given is not None} or None

    @property
    def fields(self) -> dict[str, str]:
        """Arguments of ``Session.generate`` -> this request's fields for them, where they differ."""
        guided = ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
        given = (name for name in guided if getattr(self, name) is not None)
        return {"guided": next(given, "response_format"), "prompt": self.prompt_field}

    def _refuse(self) -> None:
        extra = self.model_extra or {}
        for name, neutral in _REFUSED.items():
            if name in extra and extra[name] not in neutral:
                hint = _INSTEAD.get(name, "Leave it out.")
                raise ApiError.of(
                    400, f"`{name}` is not supported by this server.", hint, code="unsupported", param=name
                )

    def choice_arguments(self, arguments: Mapping[str, Any], choice: int) -> dict[str, Any]:
        """The arguments for answer ``choice`` of a prompt: each has a seed of its own, the first one the given."""
        seed = arguments.get("seed")
        if choice == 0 or type(seed) is not int or not 0 <= seed < 2**63:
            return dict(arguments)
        digest = hashlib.blake2b(f"{seed}/{choice}".encode(), digest_size=8).digest()
        return {**arguments, "seed": int.from_bytes(digest) >> 1}


def _named(choice: str | dict[str, Any]) -> Any:
    """``tool_choice`` in Python's words: OpenAI names a function in an object of its own."""
    function = choice.get("function") if isinstance(choice, dict) else None
    return {"name": function.get("name")} if isinstance(function, dict) else choice


R = TypeVar("R", bound=_Request)


class ChatRequest(_Request):
    """The body of ``/v1/chat/completions``."""

    prompt_field = "messages"

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = Field(
        default=None, description="'none', 'auto', 'required', or an object that names a function"
    )
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None

    @property
    def fields(self) -> dict[str, str]:
        """As of both endpoints, and the names that the request has for its limit and for numbers of candidates."""
        limit = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        candidates = "top_logprobs" if self.top_logprobs else "logprobs"
        return {**super().fields, "max_new_tokens": limit, "logprobs": candidates}

    @property
    def one_call(self) -> bool:
        """Whether the answer ends with its first tool call."""
        return self.parallel_tool_calls is False

    def arguments(self, defaults: Mapping[str, Any], context_length: int) -> dict[str, Any]:
        """Arguments of ``Session.generate``.

        Raises:
            ApiError: The request asks for what this server does not have.
        """
        found = {"max_new_tokens": context_length, **self._arguments(defaults)}
        if self.max_completion_tokens is not None:
            found["max_new_tokens"] = self.max_completion_tokens
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError.of(
                400, "`top_logprobs` is given without `logprobs`.", "Set `logprobs` to true.", param="top_logprobs"
            )
        if self.logprobs:
            found["logprobs"] = self.top_logprobs or 0
        choice = self.tool_choice
        if self.tools:
            found["tools"] = self.tools
        elif choice not in (None, "none", "auto"):
            raise ApiError.of(
                400, "`tool_choice` is given without `tools`.", "Give `tools`, or leave it out.", param="tool_choice"
            )
        if choice is not None and self.tools:
            found["tool_choice"] = _named(choice)
        variables = dict(self.chat_template_kwargs or {})
        if "chat_template" in variables:
            raise ApiError.of(
                400,
                "`chat_template_kwargs` names a chat template, and this server uses its own.",
                "Leave `chat_template` out of it.",
                code="unsupported",
                param="chat_template_kwargs",
            )
        if self.reasoning_effort is not None:
            variables.setdefault("reasoning_effort", self.reasoning_effort)
            variables.setdefault("enable_thinking", self.reasoning_effort != "none")
        if variables:
            found["chat_template_kwargs"] = variables
        if self.continue_final_message:
            found["continue_final_message"] = True
        return found


class CompletionRequest(_Request):
    """The body of ``/v1/completions``."""

    prompt_field = "prompt"

    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="text, a list of texts, a list of token ids, or a list of such lists"
    )
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None

    def prompts(self) -> list[Prompt]:
        """The prompts, each text or token ids.

        Raises:
            ApiError: There is none, or too many.
        """
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise ApiError.of(400, "`prompt` is empty.", "Give text or token ids.", param="prompt")
        if isinstance(self.prompt[0], int):
            return [cast("Prompt", self.prompt)]
        if len(self.prompt) * self.answers > _MOST_ANSWERS:
            raise ApiError.of(
                400,
                f"The request asks for {len(self.prompt) * self.answers} answers, and {_MOST_ANSWERS} are the most.",
                "Send several requests.",
                param="prompt",
            )
        return cast("list[Prompt]", self.prompt)

    def arguments(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of ``Session.generate``.

        Raises:
            ApiError: The request asks for what this server does not have.
        """
        if self.best_of not in (None, self.answers):
            raise ApiError.of(
                400, "`best_of` is not supported by this server.", "Leave it out.", code="unsupported", param="best_of"
            )
        if self.echo and (self.logprobs is not None or not _is_text(self.prompt)):
            raise ApiError.of(
                400,
                "`echo` is supported for prompts that are text, without `logprobs`.",
                "Leave one of them out.",
                code="unsupported",
                param="echo",
            )
        found = {"max_new_tokens": _COMPLETION_TOKENS, **self._arguments(defaults)}
        if self.logprobs is not None:
            found["logprobs"] = self.logprobs
        return found


def checked(kind: type[R], body: Any) -> R:
    """A body as a request.

    Raises:
        ApiError: It is not an object, lacks a field, or a field is of the wrong type.
    """
    if not isinstance(body, dict):
        raise ApiError.of(400, "The body is not a JSON object.", 'Send one, such as {"model": "...", ...}.')
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = str(first["loc"][0]) if first["loc"] else ""
        if field not in kind.model_fields:
            raise ApiError.of(
                400, "The name of a field is not valid Unicode.", "Send a JSON object in UTF-8."
            ) from None
        if first["type"] == "missing":
            raise ApiError.of(
                400, f"`{field}` is missing.", "Give it.", code="missing_required_parameter", param=field
            ) from None
        # Of a field with several types, pydantic names the first one.
        said = kind.model_fields[field].description or first["msg"].removeprefix("Input should be ")
        of_size = first["type"] in ("literal_error", "greater_than_equal", "less_than_equal")
        code = "invalid_value" if of_size else "invalid_type"
        raise ApiError.of(
            400, f"`{field}` is not of the right type or size.", f"It should be {said}.", code=code, param=field
        ) from None


def client_of(request: _Request, address: str) -> tuple[str, str]:
    """Whose turn a request takes: that of an end user at an address."""
    return address, request.safety_identifier or request.user or ""


def _stops(stop: str | Sequence[str] | None) -> str | Sequence[str] | None:
    return None if stop == [] else stop


def _biases(given: Mapping[str, float]) -> dict[int, float]:
    """JSON's keys are text."""
    found = {}
    for key, bias in given.items():
        if not re.fullmatch(r"\d{1,18}", key, re.ASCII):
            raise ApiError.of(
                400,
                f"`logit_bias` has the key {key[:40]!r}, which is not a token id.",
                'For example {"42": -100}.',
                param="logit_bias",
            )
        found[int(key)] = bias
    return found


def _is_text(prompt: Any) -> bool:
    return isinstance(prompt, str) or all(isinstance(one, str) for one in prompt)


def _with_guess(name: str, known: set[str]) -> str:
    shown = re.sub(r"[^\w.-]", "?", name[:40], flags=re.ASCII)
    close = difflib.get_close_matches(shown, known, n=1, cutoff=0.75)
    return f"{shown} (did you mean {close[0]}?)" if close else shown
