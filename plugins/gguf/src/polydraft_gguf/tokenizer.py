"""What the tokenizers of GGUF files have in common: how prompts are laid out, by the file's metadata."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import Any

from polydraft.checkpoints.special_tokens import SpecialTokens
from polydraft.text.prompt_format import FormattedTokenizer, PromptFormat

__all__ = ["SHOWN_BY_CONVERTER", "GgufTokenizerBase"]

SHOWN_BY_CONVERTER = frozenset(
    ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')
)
"""Gemma 4's special tokens that llama.cpp's converter marks as text (``conversion/gemma.py``, visible_tokens)."""


class GgufTokenizerBase(FormattedTokenizer):
    """Layout and ends are the file's: llama.cpp's own list of ends has others, and lacks some.

    A subclass adds the rest of a ``polydraft.contract.Tokenizer``.

    Args:
        special: What the file says.
    """

    def __init__(self, special: SpecialTokens) -> None:
        self._special = special

    @cached_property
    def _format(self) -> PromptFormat:
        return PromptFormat(self._special, self.token_id, self.encode, adds_bos=bool(self._special.adds_bos))

    @property
    def response_template(self) -> Any:
        """How the checkpoint says that its answers are parsed, if it was converted here and says so."""
        return self._special.response_template

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; nothing is added."""

    @abstractmethod
    def token_id(self, token: str) -> int | None:
        """The id of a token by its name."""
