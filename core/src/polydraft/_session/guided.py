"""What an output must match: from a call's arguments to ``Guided``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from polydraft._numbers import shown
from polydraft.contract.requests import Guided
from polydraft.errors import InvalidRequestError, UnsupportedError
from polydraft.files import parse_json
from polydraft.text._chat_parser import thought_of
from polydraft.text._tool_grammar import tool_grammar

if TYPE_CHECKING:
    from polydraft.contract.requests import GenerationSettings
    from polydraft.contract.tokenizer import Tokenizer
    from polydraft.text._prompts import EncodedPrompt

__all__ = ["about_calls", "check_guided_settings", "guided_call", "guided_of", "tool_choice_of"]

_THINKING = ("enable_thinking", "thinking")
"""Variables of chat templates that turn thinking on."""
_KINDS = "{'json': schema}, {'regex': text}, {'choice': [text, ...]} or {'grammar': text}"
_FORMATS = "{'type': 'json_schema', 'json_schema': {'schema': ...}}, {'type': 'json_object'}, {'type': 'text'}"


def guided_of(guided: Any, response_format: Any) -> Guided | None:
    """What the arguments ``guided`` and ``response_format`` ask for; None: nothing.

    Raises:
        InvalidRequestError: One of them is malformed, or both are given.
        UnsupportedError: A format of OpenAI's that polydraft does not have.
    """
    if guided is None:
        return None if response_format is None else _of_format(response_format)
    if response_format is not None:
        raise InvalidRequestError(
            "`guided` and `response_format` both say what the output must match.", "Give one of them."
        )
    if isinstance(guided, Guided):
        return guided
    if not isinstance(guided, Mapping) or len(guided) != 1:
        raise _malformed("guided", guided, _KINDS)
    ((kind, given),) = guided.items()
    if kind == "json":
        return Guided(kind="json", text=_schema("guided", given))
    if kind == "choice":
        if isinstance(given, str) or not isinstance(given, Sequence) or not given:
            raise _malformed("guided", guided, "{'choice': [text, ...]}, with at least one text")
        if not all(isinstance(one, str) and one for one in given):
            raise _malformed("guided", guided, "{'choice': [text, ...]}, none of them empty")
        return Guided(kind="choice", text=_text("guided", json.dumps(list(given), ensure_ascii=False)))
    if kind not in ("regex", "grammar") or not isinstance(given, str) or not given.strip():
        raise _malformed("guided", guided, _KINDS)
    return Guided(kind=kind, text=_text("guided", given))


def _of_format(given: Any) -> Guided | None:
    if hasattr(given, "model_json_schema"):
        return Guided(kind="json", text=_schema("response_format", given))
    kind = given.get("type") if isinstance(given, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return Guided(kind="json", text='{"type": "object"}')
    if kind != "json_schema":
        if isinstance(kind, str) and kind:
            raise UnsupportedError(f"`response_format` has the type {shown(kind)}.", f"Give {_FORMATS}.")
        raise _malformed("response_format", given, _FORMATS)
    # The Responses API has no object around it.
    inner = given.get("json_schema", given)
    if not isinstance(inner, Mapping) or inner.get("schema") is None:
        raise _malformed("response_format", given, _FORMATS)
    return Guided(kind="json", text=_schema("response_format", inner["schema"]))


def _schema(argument: str, given: Any) -> str:
    """A JSON schema as text: of data, of JSON text, or of a pydantic model."""
    if hasattr(given, "model_json_schema"):
        given = given.model_json_schema()
    try:
        if isinstance(given, str):
            given = parse_json(given)
        if not isinstance(given, Mapping | bool):
            raise TypeError(f"a schema is an object, and this is of type {type(given).__name__}")
        text = json.dumps(given, allow_nan=False, default=dict)
        if "\\ud" in text:  # written as an escape, halves of surrogate pairs would pass
            _text(argument, json.dumps(given, ensure_ascii=False, default=dict))
        return text
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, InvalidRequestError):
            raise
        reason = "it is nested too deeply, or contains itself" if isinstance(error, RecursionError) else str(error)
        raise InvalidRequestError(
            f"`{argument}` holds no JSON schema: {reason}.",
            "Give a dict, JSON text, or a pydantic model.",
            argument=argument,
        ) from error


def _text(argument: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError(
            f"`{argument}` holds half of a surrogate pair, which no text contains.",
            "Decode it again, for example with errors='replace'.",
            argument=argument,
        ) from None
    return text


def _malformed(argument: str, given: Any, allowed: str) -> InvalidRequestError:
    return InvalidRequestError(f"`{argument}={shown(given)}` is not allowed.", f"Give {allowed}.", argument=argument)


def check_guided_settings(settings: GenerationSettings) -> None:
    """Refuse settings with which an output could never match.

    Raises:
        InvalidRequestError: ``ignore_eos`` or ``forced_token_ids`` with ``guided``.
    """
    if settings.guided is None:
        return
    if settings.ignore_eos:
        raise InvalidRequestError(
            "`ignore_eos=True` was given, and an output that must match ends with an end-of-sequence token.",
            "Leave one of them out.",
            argument="ignore_eos",
        )
    if settings.forced_token_ids:
        raise InvalidRequestError(
            "`forced_token_ids` were given, whatever the output must match.",
            "Leave them out, or write them into what it must match.",
            argument="forced_token_ids",
        )


def tool_choice_of(tool_choice: Any, tools: Any) -> str:
    """``auto``, ``none``, ``required``, or ``=`` and the name of the tool that must be called.

    Raises:
        InvalidRequestError: It is malformed, or asks for a call without tools.
    """
    if tool_choice is None:
        return "auto"
    named = tool_choice
    if isinstance(named, Mapping) and isinstance(named.get("function"), Mapping):
        named = named["function"]  # OpenAI's: {"type": "function", "function": {"name": ...}}
    name = named.get("name") if isinstance(named, Mapping) else None
    if not (isinstance(name, str) and name) and tool_choice not in ("auto", "none", "required"):
        raise _malformed("tool_choice", tool_choice, "'auto', 'none', 'required' or {'name': ...}")
    if not tools and tool_choice not in ("auto", "none"):
        raise InvalidRequestError(
            f"`tool_choice={shown(tool_choice)}` asks for a call, and there are no `tools`.",
            "Give `tools`, or leave it out.",
            argument="tool_choice",
        )
    return f"={name}" if name else str(tool_choice)


def about_calls(error: InvalidRequestError) -> InvalidRequestError:
    """An error of a grammar that was made of tools, in words of the tools."""
    if error.argument != "guided":
        return error
    return InvalidRequestError(
        error.message.replace("The grammar in `guided`", "The grammar of the calls that `tool_choice` asks for"),
        "Correct the `parameters` of the `tools`, or use `tool_choice='auto'`.",
        argument="tools",
    )


def guided_call(
    guided: Guided | None,
    encoded: EncodedPrompt,
    tool_choice: str,
    tokenizer: Tokenizer,
    chat_template_kwargs: Mapping[str, Any] | None,
) -> Guided | None:
    """What an output must match, with the call that ``tool_choice`` forces, and the thought that may come before it.

    Raises:
        InvalidRequestError: A call is forced and ``guided`` is given; or there is no such tool.
        UnsupportedError: How this model writes calls, or delimits thoughts, is not known.
    """
    if tool_choice == "required" or tool_choice.startswith("="):
        if guided is not None:
            raise InvalidRequestError(
                "`tool_choice` asks for a call, and the output must match something else.",
                "Leave out one of the two.",
                argument="tool_choice",
            )
        name = None if tool_choice == "required" else tool_choice[1:]
        guided = Guided(kind="grammar", text=tool_grammar(tokenizer, encoded.tools, name))
    if guided is None or guided.thought is not None or not encoded.is_chat:
        return guided
    thinks = any((chat_template_kwargs or {}).get(name) for name in _THINKING)
    thought = thought_of(tokenizer, encoded.token_ids, expected=thinks)
    return guided if thought is None else guided.model_copy(update={"thought": thought})
