"""Adapt a tokenizer of Transformers to polydraft's ``Tokenizer``. Does not import Transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from polydraft.errors import InvalidRequestError, ModelFormatError, UnsupportedError
from polydraft.files import system_error

__all__ = ["HubTokenizer"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_table() -> dict[str, int]:
    """GPT-2's map from printable characters to bytes (Radford et al. 2019, ``encoder.py``)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    # The 68 bytes that do not print, such as space and newline, are written as U+0100 and following.
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table


class HubTokenizer:
    """Implements ``polydraft.contract.Tokenizer`` over a fast tokenizer object of Transformers.

    Args:
        tokenizer: A ``PreTrainedTokenizerFast``, with a ``backend_tokenizer``.
        eos_token_ids: End-of-sequence ids of the generation config; united with the tokenizer's own.
        vocab_size: Rows of the model's embedding. A model may have more ids than its tokenizer (these have no text), or
            fewer (the others cannot be run). None: the tokenizer's number of ids.

    Raises:
        ModelFormatError: It is not a fast tokenizer, or its decoder is of an unknown kind.
    """

    def __init__(self, tokenizer: Any, *, eos_token_ids: Iterable[int] = (), vocab_size: int | None = None) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelFormatError(
                f"The tokenizer {type(tokenizer).__name__} is not a fast one.",
                "Convert the checkpoint so that it has a tokenizer.json.",
            )
        self._tokenizer = tokenizer
        self._backend = backend
        own = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
        self._eos = frozenset(int(token_id) for token_id in {*eos_token_ids, *own})
        self._vocab_size = vocab_size
        self._bytes: dict[int, bytes] = {}
        # Decoders nest (``Sequence``): their types are looked for in the text of the whole tree.
        decoder = json.dumps(json.loads(backend.to_str()).get("decoder"), ensure_ascii=False)
        self._byte_level = '"ByteLevel"' in decoder
        sentencepiece = any(mark in decoder for mark in ('"ByteFallback"', '"Metaspace"', "\u2581"))
        if not self._byte_level and not sentencepiece:
            raise ModelFormatError(
                "The tokenizer's decoder is neither byte-level nor SentencePiece-like.",
                "polydraft knows ByteLevel, ByteFallback and Metaspace decoders.",
            )

    @cached_property
    def vocab_size(self) -> int:
        """Number of ids: the model's, if given, else the tokenizer's, added tokens included."""
        if self._vocab_size is not None:
            return self._vocab_size
        # Not their count: the ids of a vocabulary may have gaps.
        return int(max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)) + 1

    @property
    def bos_token_id(self) -> int | None:
        """The tokenizer's BOS id; None if it has none."""
        bos = self._tokenizer.bos_token_id
        return None if bos is None else int(bos)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Union of the generation config's ids and the tokenizer's own."""
        return self._eos

    @cached_property
    def _added(self) -> dict[int, Any]:
        return dict(self._backend.get_added_tokens_decoder())

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """Ids of added tokens that are marked special."""
        return frozenset(token_id for token_id, token in self._added.items() if token.special)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without added special tokens."""
        token_ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return token_ids

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes of the token inside a text; for an added token, its name; ``b""`` for an unknown id."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._make_bytes(token_id)
        return known

    def _make_bytes(self, token_id: int) -> bytes:
        # Added tokens are plain text, not written in the byte-level alphabet.
        if token_id in self._added:
            return str(self._added[token_id].content).encode()
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            table = _BYTE_LEVEL
            if all(character in table for character in token):
                return bytes(table[character] for character in token)
            return str(token).encode()
        # Byte fallback: <0xE2> is one byte, perhaps of a longer character.
        match = _BYTE_TOKEN.fullmatch(token)
        if match:
            return bytes([int(match[1], 16)])
        # U+2581 stands for a space.
        return str(token).replace("\u2581", " ").encode()

    def token_id(self, token: str) -> int | None:
        """The id of the token of this name; None if the vocabulary lacks it."""
        found = self._backend.token_to_id(token)
        return None if found is None else int(found)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of the messages through the checkpoint's chat template.

        Raises:
            UnsupportedError: The checkpoint has no chat template.
            InvalidRequestError: The template refuses the messages.
        """
        if not getattr(self._tokenizer, "chat_template", None):
            raise UnsupportedError(
                "This model has no chat template.", "Give the prompt as text, or use an instruction-tuned model."
            )
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=list(tools) if tools else None,
                add_generation_prompt=True,
                tokenize=False,
                **dict(template_kwargs or {}),
            )
        except Exception as error:  # jinja2's errors, and what a template raises
            if refused := system_error(error, "The model's chat template cannot be run"):
                raise refused from error
            raise InvalidRequestError(
                f"The model's chat template refuses the messages: {error}", "Check the roles and their order."
            ) from error
        token_ids = self.encode(text)
        bos = self.bos_token_id
        # Most templates write BOS themselves. Where one does not, it is added; a second one is removed.
        if bos is not None and token_ids[:1] != [bos] and self._adds_bos:
            token_ids = [bos, *token_ids]
        while bos is not None and token_ids[:2] == [bos, bos]:
            token_ids = token_ids[1:]
        return token_ids

    @cached_property
    def _adds_bos(self) -> bool:
        """Whether the tokenizer itself starts sequences with BOS (Llama's do, Gemma 4's and Qwen's do not)."""
        return bool(self._backend.encode("a").ids[:1] == [self.bos_token_id])


_BYTE_LEVEL = _byte_level_table()
