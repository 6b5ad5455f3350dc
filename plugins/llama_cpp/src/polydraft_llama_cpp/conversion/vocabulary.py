"""A byte-level BPE ``tokenizer.json`` as GGUF metadata."""

from __future__ import annotations

from typing import Any

import gguf
from polydraft.errors import ModelFormatError

from polydraft_llama_cpp.conversion.checkpoint import Checkpoint

__all__ = ["add_vocabulary", "unknown_tokenizer"]

_OPTIONS = ("byte_fallback", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix", "dropout")
_ADDED_OPTIONS = ("lstrip", "rstrip", "single_word")


def unknown_tokenizer(tokenizer: dict[str, Any]) -> str:
    """Why a tokenizer cannot be written, as part of a sentence; empty if it can.

    Before BPE, llama.cpp splits text by rules that a file names (``src/llama-vocab.cpp``). Only GPT-2's rule is written
    here: for a tokenizer that splits otherwise it would silently give other tokens.
    """
    splitter, model = tokenizer.get("pre_tokenizer") or {}, tokenizer.get("model") or {}
    if model.get("type") != "BPE":
        return f"its tokenizer is of type {model.get('type')}, not BPE"
    if tokenizer.get("normalizer") is not None:
        return "its tokenizer normalizes text"
    if splitter.get("type") != "ByteLevel" or not splitter.get("use_regex", True) or splitter.get("add_prefix_space"):
        return "its tokenizer does not split text as GPT-2's does"
    if any(model.get(name) for name in _OPTIONS):
        return "its BPE has options that GPT-2's does not have"
    if any(token.get(name) for token in tokenizer.get("added_tokens") or () for name in _ADDED_OPTIONS):
        return "its added tokens absorb adjacent spaces, or match whole words only"
    return ""


def add_vocabulary(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
    """Add tokens, merges, special ids and the chat template."""
    tokenizer, size = checkpoint.tokenizer, int(checkpoint.text["vocab_size"])
    texts = {index: text for text, index in tokenizer["model"]["vocab"].items()}
    texts.update({token["id"]: token["content"] for token in tokenizer["added_tokens"]})
    kinds = {
        token["id"]: gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        for token in tokenizer["added_tokens"]
    }
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([texts.get(index, f"[PAD{index}]") for index in range(size)])
    usual = {True: gguf.TokenType.NORMAL, False: gguf.TokenType.UNUSED}
    writer.add_token_types([int(kinds.get(index, usual[index in texts])) for index in range(size)])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for name, add in (
        ("bos_token_id", writer.add_bos_token_id),
        ("eos_token_id", writer.add_eos_token_id),
        ("pad_token_id", writer.add_pad_token_id),
    ):
        value = checkpoint.config.get(name, checkpoint.text.get(name))
        if isinstance(value, list):
            value = value[0]
        if value is not None:
            if not isinstance(value, int) or not 0 <= value < 2**32:
                raise ModelFormatError(
                    f"{name} in config.json of {checkpoint.folder} is {value!r}, not a token id.", "Fix the file."
                )
            add(value)
    writer.add_add_bos_token(checkpoint.config.get("bos_token_id") is not None)
    writer.add_add_space_prefix(False)
    template = checkpoint.folder / "chat_template.jinja"
    if template.is_file():
        try:
            writer.add_chat_template(template.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ModelFormatError(f"{template} is not UTF-8 text.", "Download or save the model again.") from error
