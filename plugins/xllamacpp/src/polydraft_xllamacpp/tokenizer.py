"""The tokenizer of a GGUF file: its vocabulary from the header, texts to ids by the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from polydraft.checkpoints.gguf import GgufHeader, StringArray
from polydraft.checkpoints.special_tokens import SpecialTokens, gguf_special_tokens
from polydraft.errors import InvalidRequestError, ModelFormatError
from polydraft.text.prompt_format import PromptFormat
from polydraft_gguf.serving.client import Client

__all__ = ["ServerTokenizer"]

# llama_token_type
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6
_BYTE_LEVEL = {"gpt2"}
"""Values of ``tokenizer.ggml.model`` whose tokens are written with GPT-2's letters for bytes."""
_SPACE = "\u2581".encode()
"""How the others write a space (SentencePiece)."""
_SHOWN_BY_CONVERTER = frozenset(
    (b"<|channel>", b"<channel|>", b"<|tool_call>", b"<tool_call|>", b"<|tool_response>", b"<tool_response|>", b'<|"|>')
)
"""Gemma 4's special tokens that llama.cpp's converter marks as text (``conversion/gemma.py``, visible_tokens)."""


class ServerTokenizer:
    """``polydraft.contract.Tokenizer`` over a file's header, and a server that runs the file.

    Raises:
        ModelFormatError: The header's vocabulary is damaged.
    """

    def __init__(self, header: GgufHeader, client: Client, name: str) -> None:
        tokens, kinds = (header.metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
        if not isinstance(tokens, StringArray) or (kinds is not None and len(kinds) != len(tokens)):
            raise ModelFormatError(f"The vocabulary of {name} is damaged.", "Download or convert it again.")
        self._client = client
        self._special: SpecialTokens = gguf_special_tokens(header)
        self._texts = tokens.items()
        # Without types all tokens are ordinary text.
        self._kinds: Sequence[int] = kinds if kinds is not None else [1] * len(tokens)
        self._is_byte_level = header.metadata.get("tokenizer.ggml.model") in _BYTE_LEVEL

    @property
    def vocab_size(self) -> int:
        """Number of ids, padding included."""
        return len(self._texts)

    @cached_property
    def _format(self) -> PromptFormat:
        return PromptFormat(self._special, self.token_id, self.encode, adds_bos=bool(self._special.adds_bos))

    @property
    def bos_token_id(self) -> int | None:
        """The id that texts begin with: see ``PromptFormat``."""
        return self._format.bos_token_id

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """All ids that end an output: see ``PromptFormat``. llama.cpp's own list has others, and lacks some."""
        return self._format.eos_token_ids

    @property
    def response_template(self) -> Any:
        """How the checkpoint says that its answers are parsed, if it was converted here and says so."""
        return self._special.response_template

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """Ids of control tokens, which llama.cpp takes those that end an output for, too."""
        control = {index for index, kind in enumerate(self._kinds) if kind == _CONTROL}
        shown = {index for index, text in enumerate(self._texts) if text in _SHOWN_BY_CONVERTER}
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
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"The text holds a lone surrogate at character {error.start}.", "Give text that is valid Unicode."
            ) from error
        answer = self._client.json("/tokenize", {"content": text, "add_special": False, "parse_special": True})
        found = answer.get("tokens") if isinstance(answer, dict) else None
        return list(self._client.token_ids(found, self.vocab_size))

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes of a token that is not the first one; of a special token, its name."""
        text, kind = self._texts[token_id], self._kinds[token_id]
        if kind in {_UNKNOWN, _CONTROL, _USER_DEFINED}:
            return text
        if self._is_byte_level:
            return b"".join(_BYTES.get(letter, letter.encode()) for letter in text.decode("utf-8", "replace"))
        if kind == _BYTE:
            return bytes([int(text[3:5], 16)])  # <0x0A>
        return text.replace(_SPACE, b" ")

    def token_id(self, token: str) -> int | None:
        """The id of a token by its name."""
        return self._ids.get(token)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Token ids of the messages through the file's chat template.

        Errors as for ``Tokenizer.chat``.
        """
        return self._format.chat(messages, tools, template_kwargs, continue_final_message=continue_final_message)


def _letters() -> dict[str, bytes]:
    """GPT-2's letter of each byte (Radford et al. 2019): printable Latin-1 is itself, the others follow from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): bytes([byte]) for byte in printable}
    return letters | {chr(256 + index): bytes([byte]) for index, byte in enumerate(others)}


_BYTES = _letters()
