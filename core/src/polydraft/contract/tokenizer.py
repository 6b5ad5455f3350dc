"""The tokenizer interface. ``polydraft.text.hub_tokenizer`` implements it on tokenizers of Transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

__all__ = ["Tokenizer"]


class Tokenizer(Protocol):
    """A model's tokenizer. Token ids are ints from 0 to ``vocab_size - 1``.

    It may have one more attribute, ``response_template``: how answers are parsed, as the checkpoint's
    tokenizer_config.json says it in Transformers' format (a dict), or None. Without it the core goes by the formats
    that it knows.
    """

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the model takes; its logits may be padded beyond it."""

    @property
    def bos_token_id(self) -> int | None:
        """Beginning-of-sequence id; None if the model has none."""

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """End-of-sequence ids: the generation config's and the tokenizer's own."""

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Ids of control tokens, which are not text."""

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without an added BOS. Special tokens written in the text are recognised."""

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that the token adds to a text when it is not the first one; for a special token, its name.

        They may be part of a character; ``b""`` for an id without text.
        """

    def token_id(self, token: str) -> int | None:
        """The id of the token of this name, special or not; None if the vocabulary lacks it."""

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Token ids of the messages as the model's chat template renders them, ready for the model's answer.

        Args:
            messages: At least one, each with a ``role`` and a ``content``; ``docs/chat.md`` says how the core has
                normalised them.
            tools: Tool schemas: ``{"type": "function", "function": {...}}``.
            template_kwargs: Further variables of the template.
            continue_final_message: Instead of opening a new answer, end with the text of the last message, for the
                model to continue it.

        Raises:
            UnsupportedError: The model has no chat template.
            InvalidRequestError: The template refuses the messages, or leaves out the message to be continued.
            ModelFormatError: The template is broken, or needs too much time or memory.
        """
