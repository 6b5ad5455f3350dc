"""A stand-in for the tokenizer of a checkpoint that has none: token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from polydraft.errors import UnsupportedError

__all__ = ["IdsOnlyTokenizer"]

_HINT = "Give the prompt as token ids, or save the model's tokenizer next to its weights."


class IdsOnlyTokenizer:
    """Implements ``polydraft.contract.Tokenizer`` without any text: every token's text is empty.

    Args:
        vocab_size: Rows of the model's embedding.
        eos_token_ids: End-of-sequence ids of the model's configuration.
        bos_token_id: BOS id of the model's configuration, if it has one.
    """

    note = "The checkpoint has no tokenizer: prompts are token ids, and results have no text."
    """For ``RunningInfo.notes``."""

    special_token_ids: frozenset[int] = frozenset()

    def __init__(self, vocab_size: int, *, eos_token_ids: Iterable[int] = (), bos_token_id: int | None = None) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = frozenset(eos_token_ids)
        self.bos_token_id = bos_token_id

    def encode(self, text: str) -> list[int]:
        """Not possible without a tokenizer.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError("This model has no tokenizer, so text cannot become tokens.", _HINT)

    def token_bytes(self, token_id: int) -> bytes:
        """``b""``: no token has text."""
        return b""

    def token_id(self, token: str) -> int | None:
        """None: no token has a name."""
        return None

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Not possible without a tokenizer.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError("This model has no tokenizer, so messages cannot become tokens.", _HINT)
