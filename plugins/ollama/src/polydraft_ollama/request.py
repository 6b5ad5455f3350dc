"""A generation's request as Ollama takes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from polydraft.errors import InvalidRequestError
from polydraft.text.text_only import ChatPrompt

if TYPE_CHECKING:
    from polydraft.contract import TokenRequest

__all__ = ["request_of", "sampling_options"]

_THINK = {"enable_thinking", "reasoning_effort", "think"}
_EFFORTS = {"none": False, "minimal": "low", "xhigh": "max", "ultra": "max"}
"""OpenAI's efforts -> Ollama's, where they are called otherwise, as its own server for OpenAI's API has them."""


def request_of(
    request: TokenRequest,
    prompt: str | ChatPrompt,
    body: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    num_speculative_tokens: int | None,
) -> tuple[str, dict[str, Any]]:
    """Path and body of the request.

    Args:
        request: The call.
        prompt: Its prompt, as text or as a chat.
        body: What each request begins with.
        options: Those that all requests share.
        num_speculative_tokens: k of the loaded model; 0: it decodes plainly. None: the server knows no k.

    Raises:
        InvalidRequestError: A variable for the chat template that Ollama does not have, or two that contradict.
    """
    asked = {**options, **sampling_options(request)}
    if (k := num_speculative_tokens) is not None:
        # Of so few tokens none is drafted, and another k would make the server load the model anew.
        few = request.settings.max_new_tokens <= 2
        asked["draft_num_predict"] = request.num_speculative_tokens if request.speculate else k if few else 0
    whole = {
        **body,
        "options": asked,
        # Without these a long prompt loses its beginning, and a full context half of it, and nobody is told.
        "truncate": False,
        "shift": False,
    }
    if isinstance(prompt, str):
        # The stop strings of a Modelfile belong to its chats.
        return "/api/generate", {**whole, "options": {**asked, "stop": []}, "prompt": prompt, "raw": True}
    chat = {**whole, "messages": _messages(prompt["messages"])}
    if prompt["tools"]:
        chat["tools"] = prompt["tools"]
    variables = prompt["template_kwargs"]
    if unknown := sorted(variables.keys() - _THINK):
        raise InvalidRequestError(
            f"`chat_template_kwargs` holds {unknown[0]!r}: Ollama lays out chats by itself.",
            f"It takes {', '.join(sorted(_THINK))}.",
            argument="chat_template_kwargs",
        )
    if (think := _think(variables)) is not None:
        chat["think"] = think
    return "/api/chat", chat


def sampling_options(request: TokenRequest) -> dict[str, Any]:
    """All settings by Ollama's names. Also those at their defaults: Ollama's, and those of a Modelfile, are others."""
    settings = request.settings
    return {
        "num_predict": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "min_p": settings.min_p,
        "typical_p": settings.typical_p,
        "repeat_penalty": settings.repetition_penalty,
        "repeat_last_n": -1,  # the whole context; the default is 64 tokens
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        # 31 bits fit into any integer of the server; each stream of a batch has a seed of its own.
        "seed": (request.seed + 0x9E3779B1 * request.stream) % 0x7FFFFFFF,
    }


def _think(variables: Mapping[str, Any]) -> Any:
    """Ollama's ``think``: whether, or how much; None: it is not said."""
    given = [_EFFORTS.get(value, value) if isinstance(value, str) else value for value in variables.values()]
    found = {str(value): value for value in given if value is not None}
    if "True" in found and "False" not in found and len(found) > 1:
        del found["True"]  # how much says that it thinks
    if len(found) > 1:
        raise InvalidRequestError(
            "`chat_template_kwargs` holds two values for Ollama's `think`.",
            f"Give one of {', '.join(sorted(_THINK))}.",
            argument="chat_template_kwargs",
        )
    return next(iter(found.values()), None)


def _messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages in Ollama's shape: arguments of calls are objects, and a tool's answer has the tool's name."""
    names: dict[str, str] = {}
    found = []
    for message in messages:
        made = {"role": message["role"], "content": message.get("content") or ""}
        if calls := message.get("tool_calls"):
            made["tool_calls"] = [
                {"function": {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}}
                for call in calls
            ]
            names |= {call["id"]: call["function"]["name"] for call in calls if call.get("id")}
        if message["role"] == "tool":
            made["tool_name"] = message.get("name") or names.get(message.get("tool_call_id", ""), "")
        found.append(made)
    return found
