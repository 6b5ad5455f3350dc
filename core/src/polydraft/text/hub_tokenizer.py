"""Adapt a tokenizer of Transformers to polydraft's ``Tokenizer``. Does not import Transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from typing import Any

from polydraft.checkpoints.special_tokens import SpecialTokens
from polydraft.errors import ModelFormatError
from polydraft.text.prompt_format import FormattedTokenizer, PromptFormat

__all__ = ["HubTokenizer", "decoder_is_byte_level", "piece_bytes"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_table() -> dict[str, int]:
    """GPT-2's map from printable characters to bytes (Radford et al. 2019, ``encoder.py``)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    # The 68 bytes that do not print, such as space and newline, are written as U+0100 and following.
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table


_BYTE_LEVEL = _byte_level_table()


def decoder_is_byte_level(decoder: Any) -> bool:
    """Whether the decoder of a tokenizer.json writes bytes as GPT-2 does."""
    # Decoders nest (``Sequence``): their types are looked for in the text of the whole tree.
    return '"ByteLevel"' in json.dumps(decoder)


def piece_bytes(piece: str, *, byte_level: bool) -> bytes:
    """The UTF-8 bytes that a token of a vocabulary adds to a text, as the vocabulary writes it; no added tokens."""
    if byte_level:
        if all(character in _BYTE_LEVEL for character in piece):
            return bytes(_BYTE_LEVEL[character] for character in piece)
        return piece.encode()
    # Byte fallback: <0xE2> is one byte, perhaps of a longer character.
    match = _BYTE_TOKEN.fullmatch(piece)
    if match:
        return bytes([int(match[1], 16)])
    # U+2581 stands for a space.
    return piece.replace("\u2581", " ").encode()


class HubTokenizer(FormattedTokenizer):
    """Implements ``polydraft.contract.Tokenizer`` over a fast tokenizer object of Transformers.

    Args:
        tokenizer: A ``PreTrainedTokenizerFast``, with a ``backend_tokenizer``.
        special_tokens: What the checkpoint's files say. None: only what the tokenizer itself says.
        eos_token_ids: Further end-of-sequence ids.
        vocab_size: Rows of the model's embedding. A model may have more ids than its tokenizer (these have no text), or
            fewer (the others cannot be run). None: the tokenizer's number of ids.

    Raises:
        ModelFormatError: It is not a fast tokenizer, or its decoder is of an unknown kind.
    """

    def __init__(
        self,
        tokenizer: Any,
        special_tokens: SpecialTokens | None = None,
        *,
        eos_token_ids: Iterable[int] = (),
        vocab_size: int | None = None,
    ) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelFormatError(
                f"The tokenizer {type(tokenizer).__name__} is not a fast one.",
                "Convert the checkpoint so that it has a tokenizer.json.",
            )
        self._tokenizer = tokenizer
        self._backend = backend
        self._special = special_tokens or SpecialTokens({}, frozenset(), _templates(tokenizer))
        self._further_ends = frozenset(eos_token_ids)
        self._vocab_size = vocab_size
        self._bytes: dict[int, bytes] = {}
        decoder = json.loads(backend.to_str()).get("decoder")
        self._byte_level = decoder_is_byte_level(decoder)
        tree = json.dumps(decoder, ensure_ascii=False)
        sentencepiece = any(mark in tree for mark in ('"ByteFallback"', '"Metaspace"', "\u2581"))
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

    @cached_property
    def _format(self) -> PromptFormat:
        # Classes of tokenizers have defaults for what the files leave out.
        names = {**self._tokenizer.special_tokens_map, **self._special.names}
        named = {name: text for name, text in names.items() if isinstance(text, str)}  # in Transformers 4 also a list
        bos = named.get("bos_token")
        adds_bos = bos is not None and self._backend.encode("a").tokens[:1] == [bos]
        return PromptFormat(replace(self._special, names=named), self.token_id, self.encode, adds_bos=adds_bos)

    @property
    def response_template(self) -> Any:
        """The checkpoint's own description of its answers, from its tokenizer_config.json; None if it has none."""
        # Versions of Transformers that do not know the entry keep it with the other arguments.
        known = getattr(self._tokenizer, "response_template", None)
        return getattr(self._tokenizer, "init_kwargs", {}).get("response_template") if known is None else known

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """All ids that end an output: see ``PromptFormat``."""
        return self._format.eos_token_ids | self._further_ends

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
        return piece_bytes(str(token), byte_level=self._byte_level)

    def token_id(self, token: str) -> int | None:
        """The id of the token of this name; None if the vocabulary lacks it."""
        found = self._backend.token_to_id(token)
        return None if found is None else int(found)


def _templates(tokenizer: Any) -> dict[str, str]:
    """The chat templates of a tokenizer object: one text, or a dict of several by name."""
    found = getattr(tokenizer, "chat_template", None) or {}
    return {"default": found} if isinstance(found, str) else dict(found)
