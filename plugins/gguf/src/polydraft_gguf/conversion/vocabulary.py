"""A byte-level BPE ``tokenizer.json`` as GGUF metadata."""

from __future__ import annotations

import json
from typing import Any

import gguf
from polydraft.checkpoints.special_tokens import GGUF_KEY, read_special_tokens

from polydraft_gguf.conversion.checkpoint import Checkpoint

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
    """Add tokens, merges, special ids and chat templates.

    Raises:
        ModelFormatError: A file that says them cannot be read.
    """
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
    writer.add_add_space_prefix(False)
    _add_special_tokens(writer, checkpoint, {text: index for index, text in texts.items()})


def _add_special_tokens(writer: gguf.GGUFWriter, checkpoint: Checkpoint, ids: dict[str, int]) -> None:
    special = read_special_tokens(checkpoint.folder, checkpoint.config)
    named = {name: ids[text] for name, text in special.names.items() if text in ids}
    ends = sorted(special.eos_token_ids - {named.get("eos_token")})
    if "eos_token" in named:
        ends.insert(0, named["eos_token"])
    # GGUF has keys for three ends: of the text, of a turn, and of a message.
    ends_by_key = zip((writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), ends, strict=False)
    for add, index in ends_by_key:
        add(index)
    for name, add in (
        ("bos_token", writer.add_bos_token_id),
        ("unk_token", writer.add_unk_token_id),
        ("pad_token", writer.add_pad_token_id),
    ):
        if name in named:
            add(named[name])
    writer.add_add_bos_token(_adds_bos(checkpoint.tokenizer, special.names.get("bos_token")))
    said = {"names": dict(special.names), "eos_token_ids": ends, "response_template": special.response_template}
    writer.add_string(GGUF_KEY, json.dumps(said))
    others = dict(special.chat_templates)
    if (template := others.pop("default", None)) is not None:
        writer.add_chat_template(template)
    for name, template in others.items():
        writer.add_string(f"tokenizer.chat_template.{name}", template)
    if others:
        writer.add_array("tokenizer.chat_templates", sorted(others))


def _adds_bos(tokenizer: dict[str, Any], bos: str | None) -> bool:
    """Whether the tokenizer begins a text with BOS: its post-processor does, or a part of it."""
    processor = tokenizer.get("post_processor") or {}
    for part in processor.get("processors") or [processor]:
        first = (part.get("single") or [{}])[0].get("SpecialToken", {}).get("id")
        if bos is not None and bos in (first, (part.get("cls") or [None])[0]):
            return True
    return False
