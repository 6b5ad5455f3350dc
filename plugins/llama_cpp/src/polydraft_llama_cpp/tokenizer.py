"""The tokenizer inside a GGUF file, as polydraft's ``Tokenizer``."""

from __future__ import annotations

import ctypes
from functools import cached_property
from typing import Any

from polydraft.checkpoints.special_tokens import SpecialTokens
from polydraft.errors import InvalidRequestError
from polydraft.text.prompt_format import utf8
from polydraft_gguf.tokenizer import SHOWN_BY_CONVERTER, GgufTokenizerBase

from polydraft_llama_cpp.bindings import library
from polydraft_llama_cpp.model import Model

__all__ = ["GgufTokenizer"]


class GgufTokenizer(GgufTokenizerBase):
    """``polydraft.contract.Tokenizer`` over a loaded model's vocabulary; ``special`` is what its file says."""

    def __init__(self, model: Model, special: SpecialTokens) -> None:
        super().__init__(special)
        self._model = model
        self._vocab: Any = model.vocab
        self._bytes: dict[int, bytes] = {}

    @property
    def vocab_size(self) -> int:
        """Number of ids, padding included."""
        return self._model.vocab_size

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """Ids of control tokens."""
        lib = library()
        control = lib.LLAMA_TOKEN_ATTR_CONTROL
        found = {index for index in range(self.vocab_size) if lib.llama_vocab_get_attr(self._vocab, index) & control}
        return frozenset(found | {index for name in SHOWN_BY_CONVERTER if (index := self._ids.get(name)) is not None})

    @cached_property
    def _ids(self) -> dict[str, int]:
        lib = library()
        texts = (lib.llama_vocab_get_text(self._vocab, index) for index in range(self.vocab_size))
        return {text.decode("utf-8", "replace"): index for index, text in enumerate(texts) if text}

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; nothing is added.

        Raises:
            InvalidRequestError: The text cannot be written as UTF-8.
        """
        data = utf8(text)
        lib = library()
        # A token covers at least one byte, except those that the tokenizer inserts, such as a leading space.
        size = len(data) + 8
        for _ in range(2):
            buffer = (lib.llama_token * size)()
            # add_special=False: no BOS. parse_special=True: names of special tokens become single ids.
            count = lib.llama_tokenize(self._vocab, data, len(data), buffer, size, False, True)
            # Otherwise minus the size that is needed.
            if count >= 0:
                return list(buffer[:count])
            size = -count
        raise InvalidRequestError("llama.cpp cannot split the text into tokens.", "Give the prompt as token ids.")

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes of a token that is not the first one; of a special token, its name."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._piece(token_id)
        return known

    def _piece(self, token_id: int) -> bytes:
        lib = library()
        size = 64
        for _ in range(2):
            buffer = ctypes.create_string_buffer(size)
            # lstrip=0 keeps leading spaces; special=True gives a special token's name.
            count = lib.llama_token_to_piece(self._vocab, token_id, buffer, size, 0, True)
            if count >= 0:
                return buffer.raw[:count]
            size = -count
        return b""

    def token_id(self, token: str) -> int | None:
        """The id of a token by its name."""
        return self._ids.get(token)
