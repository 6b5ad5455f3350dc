"""What a model's chat template does with messages that templates treat differently, found by rendering short ones.

Only where templates disagree: some render only text as content and some only lists of parts, and some render tool calls
only next to empty text or only next to None. Whatever a template does not expect it leaves out without an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from polydraft.errors import PolydraftError, UnsupportedError

if TYPE_CHECKING:
    from polydraft.contract.tokenizer import Tokenizer

__all__ = ["as_the_template_expects"]

_NEEDLE = "polydraft"
_USER = {"role": "user", "content": _NEEDLE}
_CALL = {"id": "call00001", "type": "function", "function": {"name": _NEEDLE, "arguments": {"x": "y"}}}
_known: WeakKeyDictionary[Tokenizer, dict[str, Any]] = WeakKeyDictionary()


def as_the_template_expects(messages: Sequence[dict[str, Any]], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Normalised messages, their content as this tokenizer's template renders it: text, parts or None.

    Raises:
        UnsupportedError: They have tool calls, which the template leaves out.
    """
    habits = _known.setdefault(tokenizer, {})
    if "parts" not in habits:
        parts = {**_USER, "content": [{"type": "text", "text": _NEEDLE}]}
        # Both: text. Neither, as when a template refuses a lone user message: text, and it says why.
        habits["parts"] = not _renders([_USER], tokenizer) and _renders([parts], tokenizer)
    in_parts: bool = habits["parts"]
    found = [{**message, "content": _content(message["content"], in_parts)} for message in messages]
    for message in found:
        if message.get("tool_calls") and not message["content"]:
            message["content"] = _next_to_calls(habits, tokenizer, in_parts)
    return found


def _content(text: str, in_parts: bool) -> Any:
    if not in_parts:
        return text
    return [{"type": "text", "text": text}] if text else []


def _next_to_calls(habits: dict[str, Any], tokenizer: Tokenizer, in_parts: bool) -> Any:
    """The empty content next to which the template renders tool calls."""
    if "empty" not in habits:
        ask = {"role": "user", "content": _content("x", in_parts)}
        habits["empty"] = [
            empty
            for empty in (_content("", in_parts), None)
            if _renders([ask, {"role": "assistant", "content": empty, "tool_calls": [_CALL]}], tokenizer)
        ]
    if not habits["empty"]:
        raise UnsupportedError(
            "This model's chat template does not render tool calls.", "Write the calls and their results as text."
        )
    return habits["empty"][0]


def _renders(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> bool:
    """Whether the needle is in the prompt."""
    try:
        token_ids = tokenizer.chat(messages)
    except PolydraftError:
        return False
    return _NEEDLE.encode() in b"".join(map(tokenizer.token_bytes, token_ids))
