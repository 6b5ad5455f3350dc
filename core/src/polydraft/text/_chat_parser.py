r"""Thinking and tool calls of chat models, separated by token ids.

Ids, not text: a chunk may hold any number of tokens, and text can be cut anywhere (vllm#42781, #41967, #45588).
Gemma 4: ``<|channel>thought\n...<channel|>`` and ``<|tool_call>call:name{key:<|"|>text<|"|>}<tool_call|>``
(ai.google.dev, "Gemma 4 prompt formatting"). Formats that wrap thinking in ``<think>`` tokens are known, too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from polydraft.contract.results import ToolCall

if TYPE_CHECKING:
    from polydraft.contract.tokenizer import Tokenizer

__all__ = ["ChatParser", "Part", "parse_tool_call"]

Part = Literal["answer", "thinking", "tool_call"]

# (opening token, closing token, what lies between, whether a first line names the channel)
_BRACKETS: tuple[tuple[str, str, Part, bool], ...] = (
    ("<|channel>", "<channel|>", "thinking", True),
    ("<think>", "</think>", "thinking", False),
    ("<|tool_call>", "<tool_call|>", "tool_call", False),
)
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?", re.ASCII)
_FRACTION = re.compile(r"[.eE]")
_QUOTE = '<|"|>'


class ChatParser:
    """Follows the token ids of one answer.

    Args:
        tokenizer: Formats whose tokens it lacks are ignored.
        prompt_token_ids: If the prompt ends inside thinking, the answer starts there. An opening token that a message
            merely mentions has no effect, since the special tokens that end the message close it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int]) -> None:
        self._opening: dict[int, tuple[int, Part, bool]] = {}
        for opening, closing, part, named in _BRACKETS:
            begin, end = tokenizer.token_id(opening), tokenizer.token_id(closing)
            if begin is not None and end is not None and begin != end:
                self._opening[begin] = (end, part, named)
        self.part: Part = "answer"
        self.names_channel = False
        self._closing: int | None = None
        special = tokenizer.special_token_ids
        for token_id in prompt_token_ids:
            if not self.step(token_id) and token_id in special:
                self._close()
        self._begin_answer()

    def _begin_answer(self) -> None:
        """Forget a tool call or a channel's name that the prompt left open."""
        self.names_channel = False
        if self.part == "tool_call":
            self._close()

    def step(self, token_id: int) -> bool:
        """Process one token. True if it is a bracket, which belongs to no part; ``part`` is then the part after it."""
        if self._closing is None:
            found = self._opening.get(token_id)
            if found is None:
                return False
            self._closing, self.part, self.names_channel = found
            return True
        if token_id != self._closing:
            return False
        self._close()
        return True

    def _close(self) -> None:
        self._closing, self.part, self.names_channel = None, "answer", False


def parse_tool_call(raw: str) -> ToolCall | None:
    """Parse ``raw``, the text between the tool-call tokens; None if it is malformed."""
    match = re.match(r"\s*call:\s*([\w.-]+)\s*", raw)
    if match is None:
        return None
    try:
        value, end = _value(raw, match.end())
    except (ValueError, IndexError, RecursionError):
        return None
    if not isinstance(value, dict) or raw[end:].strip():
        return None
    return ToolCall(name=match[1], arguments=value, raw=raw)


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _value(text: str, at: int) -> tuple[Any, int]:
    at = _skip(text, at)
    if text.startswith(_QUOTE, at):
        end = text.index(_QUOTE, at + len(_QUOTE))
        return text[at + len(_QUOTE) : end], end + len(_QUOTE)
    if text[at] == "{":
        return _object(text, at + 1)
    if text[at] == "[":
        return _array(text, at + 1)
    match = re.compile(r"[^,\]}\s]+").match(text, at)
    if match is None:
        raise ValueError(text[at:])
    return _scalar(match[0]), match.end()


def _scalar(word: str) -> Any:
    constants = {"true": True, "false": False, "null": None}
    if word in constants:
        return constants[word]
    if not _NUMBER.fullmatch(word):  # float() accepts nan, infinity and 1_000, too
        raise ValueError(word)
    number = float(word)
    # 1e999 overflows to infinity, for which JSON has no form.
    if number in (float("inf"), float("-inf")):
        raise ValueError(word)
    return number if _FRACTION.search(word) else int(word)


def _object(text: str, at: int) -> tuple[dict[str, Any], int]:
    found: dict[str, Any] = {}
    at = _skip(text, at)
    while text[at] != "}":
        if text.startswith(_QUOTE, at):
            key, at = _value(text, at)
        else:
            end = text.index(":", at)
            key, at = text[at:end].strip(), end
        at = _skip(text, at)
        if text[at] != ":":
            raise ValueError(text[at:])
        found[key], at = _value(text, at + 1)
        at = _separator(text, at, "}")
    return found, at + 1


def _array(text: str, at: int) -> tuple[list[Any], int]:
    found: list[Any] = []
    at = _skip(text, at)
    while text[at] != "]":
        item, at = _value(text, at)
        found.append(item)
        at = _separator(text, at, "]")
    return found, at + 1


def _separator(text: str, at: int, closing: str) -> int:
    at = _skip(text, at)
    if text[at] == ",":
        return _skip(text, at + 1)
    if text[at] != closing:
        raise ValueError(text[at:])
    return at
