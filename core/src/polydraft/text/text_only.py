"""A stand-in for the tokenizer of an engine that takes and gives text alone: an id is a character."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from polydraft.errors import UnsupportedError

__all__ = ["ChatPrompt", "TextOnlyTokenizer"]

_CHARACTERS = 0x110000
"""Ids below it are Unicode's code points."""
_MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
"""What the engine puts around thinking, and around a tool call in JSON: brackets that no text can spell."""
_CHAT, _END = _CHARACTERS + len(_MARKS), _CHARACTERS + len(_MARKS) + 1


class ChatPrompt(dict[str, Any]):
    """A chat as the caller gave it, for an engine that lays it out itself.

    Its keys are ``messages``, normalised as ``docs/chat.md`` says, ``tools`` (a list, or None) and ``template_kwargs``.
    """


class TextOnlyTokenizer:
    """Implements ``polydraft.contract.Tokenizer`` for an engine that shows neither tokens nor vocabulary.

    An id is a character's code point, and never one of the model's. So equal texts have equal ids, in whatever pieces
    they come. Limits in tokens are the engine's to keep: the core counts none, and the engine says by
    ``Generation.finish`` why its output has ended, and by ``Generation.report`` how many tokens it and the prompt had.
    """

    text_only = True
    """What the core knows it by, in a worker's stand-in as well."""
    note = "The engine gives text, not tokens: the ids in `token_ids` are characters, by their Unicode numbers."
    """For ``RunningInfo.notes``."""

    vocab_size = _END + 1
    bos_token_id: int | None = None
    eos_token_ids: frozenset[int] = frozenset()
    special_token_ids = frozenset({_CHAT, _END})

    def encode(self, text: str) -> list[int]:
        """The text's characters."""
        return [*map(ord, text)]

    def token_bytes(self, token_id: int) -> bytes:
        """The character, or the mark's name; half of a surrogate pair, which is no character, is ``?``."""
        if token_id < _CHARACTERS:
            return chr(token_id).encode(errors="replace")
        return _MARKS[token_id - _CHARACTERS].encode() if token_id < _CHAT else b""

    def token_id(self, token: str) -> int | None:
        """The id of a character or a mark; None for any other text."""
        if token in _MARKS:
            return _CHARACTERS + _MARKS.index(token)
        return ord(token) if len(token) == 1 else None

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> list[int]:
        """The chat itself, in JSON: ``prompt`` reads it.

        Raises:
            UnsupportedError: The last message is to be continued.
        """
        if continue_final_message:
            raise UnsupportedError(
                "This engine lays out chats by itself, and always opens a new answer.", "Give the prompt as text."
            )
        chat = {"messages": list(messages), "tools": tools, "template_kwargs": dict(template_kwargs or {})}
        return [_CHAT, *map(ord, json.dumps(chat, ensure_ascii=False)), _END]

    def prompt(self, token_ids: Sequence[int]) -> str | ChatPrompt:
        """What the ids of a prompt stand for.

        Raises:
            UnsupportedError: They continue a chat, or hold a part of one.
        """
        is_chat = token_ids[0] == _CHAT and token_ids[-1] == _END
        inner = token_ids[1:-1] if is_chat else token_ids
        if not self.special_token_ids.isdisjoint(inner):
            raise UnsupportedError(
                "This prompt holds a part of a chat, which the engine lays out by itself.", "Give messages, or text."
            )
        text = b"".join(map(self.token_bytes, inner)).decode()
        return ChatPrompt(json.loads(text)) if is_chat else text
