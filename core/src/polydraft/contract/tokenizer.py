"""What the core asks of a tokenizer. ``polydraft.text.hub_tokenizer`` adapts those of Transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

__all__ = ["Tokenizer"]


class Tokenizer(Protocol):
    """A tokenizer of one model. Token ids are ints from 0 to ``vocab_size - 1``."""

    @property
    def vocab_size(self) -> int:
        """Number of ids that the tokenizer knows (a model's logits may be padded beyond it)."""
        ...

    @property
    def bos_token_id(self) -> int | None:
        """The id that begins a sequence; None if the model has none."""
        ...

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Union of the generation config's list and the tokenizer's own."""
        ...

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Ids that are control tokens, not text."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; nothing is added (no BOS). Special tokens written in the text are recognised."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that the token contributes when it is not the first one; a special token's own name.

        A token may hold a part of a character. An id without text gives ``b""``.
        """
        ...

    def token_id(self, token: str) -> int | None:
        """The id of a (special) token by its name; None if there is none."""
        ...

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of the messages through the model's chat template, with the generation prompt at the end.

        Raises:
            UnsupportedError: The model has no chat template.
            InvalidRequestError: The template refuses the messages.
        """
        ...
