"""The engine's tokens for polydraft: a byte is its own id, and one special token ends a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from polydraft.errors import InvalidRequestError

from polydraft_markov.markov import END, VOCAB_SIZE

_END = "<end>"


class ByteTokenizer:
    """A ``polydraft.contract.Tokenizer``.

    For tokenizers of Transformers there is an adapter: ``polydraft.text.hub_tokenizer``.
    """

    vocab_size = VOCAB_SIZE
    bos_token_id: int | None = None
    eos_token_ids = frozenset({END})
    special_token_ids = frozenset({END})

    def encode(self, text: str) -> list[int]:
        """UTF-8 bytes; ``<end>`` is the special token."""
        parts = [list(part.encode()) for part in text.split(_END)]
        return [token for part in parts for token in (*part, END)][:-1]

    def token_bytes(self, token_id: int) -> bytes:
        """The byte, or the special token's name."""
        return bytes([token_id]) if token_id < END else _END.encode()

    def token_id(self, token: str) -> int | None:
        """The id of ``<end>``, or of a text of one byte."""
        token_ids = self.encode(token)
        return token_ids[0] if len(token_ids) == 1 else None

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Questions and answers, as in the text that the model knows."""
        if tools or template_kwargs:
            raise InvalidRequestError("This model's chat format has neither tools nor options.", "Leave them out.")
        names = {"system": "", "user": "Q: ", "assistant": "A: "}
        turns: list[int] = []
        for message in messages:
            if message["role"] not in names:
                raise InvalidRequestError(
                    f"The chat format has no role {message['role']!r}.", f"Use {', '.join(names)}."
                )
            end = _END if message["role"] == "assistant" else "\n"
            turns += self.encode(f"{names[message['role']]}{_text(message['content'])}{end}")
        if continue_final_message:
            return turns[:-1]  # without what ends the last message
        return [*turns, *self.encode("A: ")]


def _text(content: str | Sequence[Mapping[str, str]]) -> str:
    """A message's text; polydraft has checked that all parts are text."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
