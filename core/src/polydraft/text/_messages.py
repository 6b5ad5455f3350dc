"""Chat messages and tools in the one shape that chat templates take, whatever shape the caller gave them in.

Apps write what OpenAI's API takes: arguments of tool calls as JSON text, content in parts or null, tool messages that
name a call only by its id. Templates expect mappings, text, and the tool's name, and render anything else without an
error.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from polydraft.errors import InvalidRequestError, UnsupportedError
from polydraft.text._call_values import strict_json

__all__ = ["check_continuable", "normalised_messages", "normalised_tools", "plain_data"]

_DEEPEST = 100  # levels of nesting; also what ends a structure that contains itself
_MOST_VALUES = 1_000_000
_MEDIA = frozenset({"image", "image_url", "input_image", "audio", "input_audio", "video", "video_url", "file"})
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}  # type -> its key
_ASSISTANT = ("assistant", "model")
_CALL_SHAPE = (
    "Tool calls look like {'id': 'call_1', 'type': 'function', 'function': {'name': 'f', 'arguments': {'x': 1}}}; the "
    "arguments may also be a JSON object as text."
)
_TOOL_SHAPE = (
    "Tools look like {'type': 'function', 'function': {'name': 'f', 'description': '...', 'parameters': {...}}}, with "
    "the parameters as a JSON schema."
)


def normalised_messages(messages: Sequence[Mapping[Any, Any]]) -> list[dict[str, Any]]:
    """Copies of the messages for the chat template; the given ones are not changed.

    - Content is text: parts are joined, and empty content (None, ``[]`` or missing, next to tool calls) is ``""``.
    - ``tool_calls`` are ``{"type": "function", "function": {"name": ..., "arguments": {...}}}``; JSON text is parsed.
    - A tool message has the ``name`` and the ``tool_call_id`` of the call it answers, as far as they can be known.
    - The role ``developer`` is ``system``, and the deprecated ``function`` is ``tool``.
    - Keys that are None are left out, others are kept.

    Raises:
        InvalidRequestError: A message is malformed, or answers a call that nobody made.
        UnsupportedError: One contains an image, audio, a video or a file.
    """
    found: list[dict[str, Any]] = []
    open_calls: list[dict[str, Any]] = []  # of the last assistant message, not answered yet
    by_id: dict[str, dict[str, Any]] = {}
    for given in messages:
        message = _message(given)
        calls = message.get("tool_calls", [])
        if message["role"] == "tool":
            _name_the_tool(message, open_calls, by_id)
        else:
            open_calls = list(calls)
        by_id.update((call["id"], call) for call in calls if "id" in call)
        found.append(message)
    return found


def normalised_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Copies of the tools as ``{"type": "function", "function": {...}}``; None if there are none.

    Raises:
        InvalidRequestError: One is not the schema of a function.
    """
    if tools is None:
        return None
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise InvalidRequestError("`tools` is not a list of tool schemas.", _TOOL_SHAPE, argument="tools")
    return [_tool(plain_data(tool)) for tool in tools] or None


def check_continuable(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse to continue the last of the normalised ``messages`` unless it is text of the assistant's.

    Raises:
        InvalidRequestError: It is not.
    """
    last = messages[-1]
    wrong = None
    if last["role"] not in _ASSISTANT:
        wrong = f"the last message is the {last['role']}'s"
    elif last.get("tool_calls"):
        wrong = "the last message is a tool call"
    elif not last["content"].strip():
        wrong = "the last message is empty"
    if wrong:
        raise InvalidRequestError(
            f"`continue_final_message` was given, and {wrong}.",
            "End with an assistant message that holds the start of the answer.",
            argument="continue_final_message",
        )


def plain_data(value: Any) -> Any:
    """A copy of nested data in dicts and lists; other values are kept.

    Raises:
        InvalidRequestError: It is too deep or too large, has a key that is not text, half of a surrogate pair, or an
            object of a client library.
    """
    return _Copy().of(value, 0)


class _Copy:
    """Copies data and counts its values: a few lists that repeat one another may stand for any number of values."""

    def __init__(self) -> None:
        self._count = 0

    def of(self, value: Any, depth: int) -> Any:
        self._count += 1
        if depth > _DEEPEST or self._count > _MOST_VALUES:
            what = f"nested more than {_DEEPEST} levels deep" if depth > _DEEPEST else "too large"
            raise InvalidRequestError(
                f"The prompt holds data that is {what}.", "Check whether a list or dict in it contains itself."
            )
        if isinstance(value, str):
            return _checked_text(value)
        if isinstance(value, Mapping):
            return {self._key(key): self.of(inner, depth + 1) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.of(inner, depth + 1) for inner in value]
        if hasattr(value, "model_dump"):
            _refuse_object(value)
        return value

    def _key(self, key: Any) -> str:
        if not isinstance(key, str):
            raise InvalidRequestError(
                f"The prompt holds a dict with the key {reprlib.repr(key)}, which is not text.",
                "The keys of messages, tools and arguments are text, as in JSON.",
            )
        return _checked_text(key)


def _checked_text(text: str) -> str:
    """Refuse lone surrogates, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"The prompt holds {text[error.start]!r} at character {error.start} of a text: half of a surrogate "
            "pair, which is not a character.",
            "Decode the text again, for example with errors='replace'.",
        ) from None
    return text


def _refuse_object(value: Any) -> NoReturn:
    raise InvalidRequestError(
        f"The prompt holds an object of type {type(value).__name__}, and messages and tools are dicts.",
        "Convert it with its method `.model_dump()`.",
    )


def _message(given: Mapping[Any, Any]) -> dict[str, Any]:
    role = given.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequestError("A chat message has no role.", "Give it a role such as 'user'.")
    message = {key: value for key, value in plain_data(given).items() if value is not None}
    message["role"] = {"developer": "system", "function": "tool"}.get(role, role)
    for key in ("name", "tool_call_id"):
        if not isinstance(message.get(key, ""), str):
            raise InvalidRequestError(f"The `{key}` of the {role} message is not text.", "Give a string.")
    called = message.pop("function_call", None)  # OpenAI's form before there were tools
    calls = [called] if called and "tool_calls" not in message else message.pop("tool_calls", [])
    if calls:
        if role not in _ASSISTANT:
            raise InvalidRequestError(
                f"The {role} message has tool calls.", "Only messages of the assistant may have them."
            )
        message["tool_calls"] = _calls(calls)
    message["content"] = _content(role, message)
    return message


def _content(role: str, message: dict[str, Any]) -> str:
    content = message.get("content")
    if content is None:
        refusal = message.get("refusal")
        if isinstance(refusal, str) and role in _ASSISTANT:
            return refusal
        if not message.get("tool_calls"):
            raise InvalidRequestError(f"The {role} message has no content.", "Give it text as its content.")
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequestError(
            f"The content of the {role} message is of type {type(content).__name__}.", "Give text, or a list of parts."
        )
    return "".join(_text_of(role, part) for part in content)


def _text_of(role: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind in _MEDIA:
        raise UnsupportedError(
            f"The {role} message holds a part of type {kind}; only text is supported so far.",
            "Leave the part out, or describe it in words.",
        )
    text = part.get(_TEXT_PARTS[kind]) if isinstance(kind, str) and kind in _TEXT_PARTS else None
    if not isinstance(text, str):
        raise InvalidRequestError(
            f"A part of the {role} message is not text.", "Parts look like {'type': 'text', 'text': '...'}."
        )
    return text


def _calls(calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise InvalidRequestError(f"The tool calls of a message are of type {type(calls).__name__}.", _CALL_SHAPE)
    return [_call(call) for call in calls]


def _call(call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        raise InvalidRequestError("A tool call of a message has no name of a function.", _CALL_SHAPE)
    if not isinstance(call.get("id") or "", str):
        raise InvalidRequestError(f"The id of the call of {name} is not text.", _CALL_SHAPE)
    outer = {key: value for key, value in call.items() if value is not None} if function is not call else {}
    if function is call and call.get("id"):
        outer["id"] = call["id"]
    inner = {key: value for key, value in function.items() if key not in ("id", "type") or function is not call}
    return {**outer, "type": "function", "function": {**inner, "arguments": _arguments(name, function)}}


def _arguments(name: str, function: dict[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _from_json(name, arguments)
    if arguments is None:
        return {}
    if not isinstance(arguments, dict):
        raise InvalidRequestError(
            f"The arguments of the call of {name} are of type {type(arguments).__name__}.",
            "Give a dict, or a JSON object as text.",
        )
    return arguments


def _from_json(name: str, text: str) -> Any:
    if not text.strip():  # what several servers give for a call without arguments
        return None
    try:
        found = strict_json(text)
    except (ValueError, RecursionError):
        raise InvalidRequestError(
            f"The arguments of the call of {name} are not JSON: {reprlib.repr(text)}.",
            "Give a dict, or a JSON object as text.",
        ) from None
    return plain_data(found)


def _name_the_tool(
    message: dict[str, Any], open_calls: list[dict[str, Any]], by_id: Mapping[str, dict[str, Any]]
) -> None:
    """Find the call that a tool message answers: by its id, else by its tool's name, else the first one left."""
    given = message.get("tool_call_id")
    if given is not None:
        call = next((one for one in open_calls if one.get("id") == given), by_id.get(given))
        if call is None and any("id" in one for one in open_calls or by_id.values()):
            raise InvalidRequestError(
                f"A tool message answers the call {given!r}, which no message before it made.",
                "Give the `id` of a call in an earlier assistant message as its `tool_call_id`.",
            )
    else:
        call = None
    if call is None:
        named = message.get("name")
        call = next((one for one in open_calls if named in (None, one["function"]["name"])), None)
    if call is None:
        return
    if call in open_calls:
        open_calls.remove(call)
    message.setdefault("name", call["function"]["name"])
    if "id" in call:
        message.setdefault("tool_call_id", call["id"])


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    function = tool.get("function")
    if function is None and tool.get("type", "function") == "function":  # the bare schema of a function
        function = {key: value for key, value in tool.items() if key != "type"}
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        raise InvalidRequestError("An entry of `tools` has no name of a function.", _TOOL_SHAPE, argument="tools")
    if not isinstance(function.get("description") or "", str):
        raise InvalidRequestError(f"In `tools`, the description of {name} is not text.", _TOOL_SHAPE, argument="tools")
    if (parameters := function.get("parameters")) is not None:
        function = {**function, "parameters": _schema(parameters, name, "`parameters`")}
    outer = {key: value for key, value in tool.items() if key != "function"} if "function" in tool else {}
    return {**outer, "type": "function", "function": function}


def _schema(given: Any, where: str, what: str = "the schema") -> dict[str, Any]:
    """A schema in which what templates go through are objects; properties may be true or false, which are schemas."""
    if not isinstance(given, dict):
        said = f"In `tools`, {what} of {where} is of type {type(given).__name__}, and not an object."
        raise InvalidRequestError(said, _TOOL_SHAPE, argument="tools")
    found = dict(given)
    if (properties := found.get("properties")) is not None:
        if not isinstance(properties, dict):
            _schema(properties, where, "`properties`")
        as_objects: dict[bool, dict[str, Any]] = {True: {}, False: {"not": {}}}
        found["properties"] = {
            name: _schema(as_objects[one] if isinstance(one, bool) else one, f"{where}.{name}")
            for name, one in properties.items()
        }
    if isinstance(found.get("items"), dict):
        found["items"] = _schema(found["items"], f"{where}[]")
    return found
