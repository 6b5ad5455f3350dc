"""The byte tokenizer of the toy models: a byte is its own id; Gemma 4's special tokens follow."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from polydraft.errors import InvalidRequestError

__all__ = ["SPECIAL_TOKENS", "VOCAB_SIZE", "ByteTokenizer"]

SPECIAL_TOKENS = (
    "<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>", "<|tool>",
    "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>', "<|image|>",
    "<|image>", "<image|>", "<|audio|>", "<|audio>", "<audio|>", "<|video|>",
)  # fmt: skip
"""Gemma 4's control tokens; the first one has id 256."""

VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

_IDS = {token: 256 + index for index, token in enumerate(SPECIAL_TOKENS)}
_SPECIAL_PATTERN = re.compile("|".join(re.escape(token) for token in SPECIAL_TOKENS))
_TURN_END = "<turn|>\n"
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "model", "model": "model"}


class ByteTokenizer:
    """A ``polydraft.contract.Tokenizer`` that needs no files."""

    vocab_size = VOCAB_SIZE
    bos_token_id: int | None = _IDS["<bos>"]
    # Gemma 4's generation config names three. A loop or parser that knows only one would not stop.
    eos_token_ids = frozenset({_IDS["<eos>"], _IDS["<turn|>"], _IDS["<|tool_response>"]})
    special_token_ids = frozenset(_IDS.values())

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``: its UTF-8 bytes, and special tokens where their names are written."""
        token_ids: list[int] = []
        end = 0
        for match in _SPECIAL_PATTERN.finditer(text):
            token_ids += text[end : match.start()].encode()
            token_ids.append(_IDS[match.group()])
            end = match.end()
        return token_ids + list(text[end:].encode())

    def token_bytes(self, token_id: int) -> bytes:
        """The byte itself, or a special token's name.

        Raises:
            InvalidRequestError: There is no such id.
        """
        if not 0 <= token_id < VOCAB_SIZE:
            raise InvalidRequestError(f"Token id {token_id} does not exist.", f"Ids go from 0 to {VOCAB_SIZE - 1}.")
        return bytes([token_id]) if token_id < 256 else SPECIAL_TOKENS[token_id - 256].encode()

    def token_id(self, token: str) -> int | None:
        """The id of a special token, or of a text of one byte."""
        encoded = token.encode()
        return encoded[0] if len(encoded) == 1 else _IDS.get(token)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> list[int]:
        r"""Gemma 4's turns: ``<bos><|turn>user\n...<turn|>\n<|turn>model\n``; tools are written as plain JSON.

        Args:
            messages: Each with ``role`` (system, developer, user, assistant, model, tool) and text ``content``.
            tools: Declarations, put into the system turn.
            template_kwargs: ``enable_thinking`` puts ``<|think|>`` into the system turn.
            continue_final_message: End with the last message's text.

        Raises:
            InvalidRequestError: An unknown role, content that is not text, or no message.
        """
        if not messages:
            raise InvalidRequestError("There are no messages.", "Give at least one.")
        turns = [_turn(message) for message in messages]
        head = "<|think|>\n" if (template_kwargs or {}).get("enable_thinking") else ""
        foot = "".join(f"<|tool>{json.dumps(tool, sort_keys=True)}<tool|>" for tool in tools or ())
        if head or foot:
            system = turns.pop(0)[1] if turns[0][0] == "system" else ""
            turns.insert(0, ("system", head + system + foot))
        text = "".join(f"<|turn>{role}\n{content}<turn|>\n" for role, content in turns)
        end = "" if continue_final_message else "<|turn>model\n"
        return self.encode(f"<bos>{text.removesuffix(_TURN_END) if continue_final_message else text}{end}")


def _turn(message: Mapping[str, Any]) -> tuple[str, str]:
    """(role, text) of one message, as the chat format writes them."""
    role = message.get("role")
    content = _text(message.get("content") or "")
    if role == "tool":
        return "tool", f"<|tool_response>{content}<tool_response|>"
    if role not in _ROLES:
        raise InvalidRequestError(f"The chat format has no role {role!r}.", f"Use one of {', '.join(_ROLES)}, tool.")
    calls = "".join(
        f"<|tool_call>{json.dumps(call, sort_keys=True)}<tool_call|>" for call in message.get("tool_calls") or ()
    )
    return _ROLES[role], content + calls


def _text(content: Any) -> str:
    """Text of a message's content: a string, or a list of text parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        return "".join(part["text"] for part in content)
    raise InvalidRequestError("The content of a message is not text.", "This model takes text only.")
