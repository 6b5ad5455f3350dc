"""The tokenizer of a GGUF file: its vocabulary from the header, texts to ids by the server."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from polydraft.checkpoints.gguf import GgufHeader, StringArray
from polydraft.checkpoints.special_tokens import gguf_special_tokens
from polydraft.errors import ModelFormatError
from polydraft.text.hub_tokenizer import piece_bytes
from polydraft.text.prompt_format import utf8
from polydraft_gguf.serving.client import Client
from polydraft_gguf.tokenizer import SHOWN_BY_CONVERTER, GgufTokenizerBase

__all__ = ["ServerTokenizer"]

# llama_token_type
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6
_BYTE_LEVEL = {"gpt2"}
"""Values of ``tokenizer.ggml.model`` whose tokens are written with GPT-2's letters for bytes."""
_SPACE = "\u2581".encode()
"""How the others write a space (SentencePiece)."""


class ServerTokenizer(GgufTokenizerBase):
    """``polydraft.contract.Tokenizer`` over a file's header, and a server that runs the file.

    Raises:
        ModelFormatError: The header's vocabulary is damaged.
    """

    def __init__(self, header: GgufHeader, client: Client, name: str) -> None:
        tokens, kinds = (header.metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
        if not isinstance(tokens, StringArray) or (kinds is not None and len(kinds) != len(tokens)):
            raise ModelFormatError(f"The vocabulary of {name} is damaged.", "Download or convert it again.")
        super().__init__(gguf_special_tokens(header))
        self._client = client
        self._texts = tokens.items()
        # Without types all tokens are ordinary text.
        self._kinds: Sequence[int] = kinds if kinds is not None else [1] * len(tokens)
        self._is_byte_level = header.metadata.get("tokenizer.ggml.model") in _BYTE_LEVEL

    @property
    def vocab_size(self) -> int:
        """Number of ids, padding included."""
        return len(self._texts)

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """Ids of control tokens, which llama.cpp takes those that end an output for, too."""
        control = {index for index, kind in enumerate(self._kinds) if kind == _CONTROL}
        shown = {index for name in SHOWN_BY_CONVERTER if (index := self._ids.get(name)) is not None}
        return frozenset(control | shown | self.eos_token_ids)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {text.decode("utf-8", "replace"): index for index, text in enumerate(self._texts) if text}

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, asked of the server; nothing is added.

        Raises:
            InvalidRequestError: The text cannot be written as UTF-8.
            EngineError: The server failed.
        """
        utf8(text)
        answer = self._client.json("/tokenize", {"content": text, "add_special": False, "parse_special": True})
        found = answer.get("tokens") if isinstance(answer, dict) else None
        return list(self._client.token_ids(found, self.vocab_size))

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes of a token that is not the first one; of a special token, its name."""
        text, kind = self._texts[token_id], self._kinds[token_id]
        if kind in {_UNKNOWN, _CONTROL, _USER_DEFINED}:
            return text
        if self._is_byte_level:
            return piece_bytes(text.decode("utf-8", "replace"), byte_level=True)
        if kind == _BYTE:
            return bytes([int(text[3:5], 16)])  # <0x0A>
        return text.replace(_SPACE, b" ")

    def token_id(self, token: str) -> int | None:
        """The id of a token by its name."""
        return self._ids.get(token)
