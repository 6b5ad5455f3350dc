"""What a checkpoint says about the begin and end of its texts, and its chat templates: one record for every packing.

The order of precedence, in a folder as in Transformers:

* *Chat templates*: ``chat_template.jinja`` (the default) with ``additional_chat_templates/*.jinja`` (named by their
  files); else ``chat_template`` in ``tokenizer_config.json``, a text or a list of names and templates; else
  ``chat_template.json``.
* *Names of tokens* (``bos_token``, ``eos_token``, ...): ``tokenizer_config.json``, then ``special_tokens_map.json``.
* *Ends*: ``eos_token_id`` of ``generation_config.json``, else of ``config.json``, else of its ``text_config``; always
  united with ``eos_token``, and with the tokens in ``TURN_ENDS`` that the vocabulary has.

A GGUF file says the same by ``tokenizer.chat_template``, ``tokenizer.chat_template.NAME``, and under ``tokenizer.ggml``
by ``bos_token_id`` (and so on), ``add_bos_token``, ``eos_token_id``, ``eot_token_id`` and ``eom_token_id``. It has no
key for more ends than these, and none for further tokens: a file that polydraft wrote has them in
``polydraft.special_tokens``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polydraft.checkpoints.config import eos_token_ids, family, read_config
from polydraft.checkpoints.gguf import GgufHeader, StringArray
from polydraft.errors import ModelFormatError

__all__ = [
    "GGUF_KEY",
    "TURN_ENDS",
    "SpecialTokens",
    "gguf_special_tokens",
    "read_special_tokens",
    "turn_ends",
]

GGUF_KEY = "polydraft.special_tokens"
"""JSON in a GGUF file that polydraft wrote: an object with ``names``, ``eos_token_ids`` and ``response_template``."""

TURN_ENDS = (
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>", "<turn|>", "<|tool_response>", "<|end|>"),
    *("<|return|>", "<|call|>", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>", "[EOT]", "<end_of_utterance>"),
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
"""Tokens that end an answer in every model that has them, though some checkpoints do not list them.

A GGUF file has room for one end of text and one of a turn: llama.cpp, too, finds the others by name
(``llama_vocab::impl::load``). ``<|end|>`` separates parts of an answer where ``<|return|>`` ends it.
"""
_STANDARD = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_GGUF_IDS = {"unk": "unknown", "sep": "seperator", "pad": "padding"}  # spelt so
_TEMPLATE = "tokenizer.chat_template"
_DEFAULT = "default"
_BOS_FIRST = (
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"),
    "chameleon",
)
"""Values of ``tokenizer.ggml.pre`` that mean ``add_bos_token``, where the file does not say (``llama-vocab.cpp``)."""


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """The special tokens and chat templates of a checkpoint."""

    names: Mapping[str, str]
    """``bos_token``, ``eos_token`` and so on -> the token's text, as templates use them."""
    eos_token_ids: frozenset[int]
    """The ends that its configuration lists."""
    chat_templates: Mapping[str, str]
    """Name -> Jinja; the one that is used without a name is ``default``."""
    adds_bos: bool | None = None
    """Whether the tokenizer begins a text with BOS; None: its own files say, not these."""
    response_template: Any = None
    """How answers are parsed: the entry of ``tokenizer_config.json``, in Transformers' format."""
    needs_bos: bool = False
    """Whether texts begin with BOS though the tokenizer adds none: Gemma 4 (vllm#52304)."""


def read_special_tokens(folder: Path, config: Mapping[str, Any]) -> SpecialTokens:
    """The record of a folder in the layout of Transformers, ``config`` being its ``config.json``.

    Raises:
        ModelFormatError: A file cannot be read, or has a value of a wrong type.
    """
    tokenizer = _optional(folder, "tokenizer_config.json")
    given = dict(tokenizer)
    # Where the tokenizer's config has a table of added tokens, it is complete (Transformers 4.34 and later).
    if "added_tokens_decoder" not in tokenizer:
        given.update(_optional(folder, "special_tokens_map.json"))
    extra = given.get("extra_special_tokens")
    given.update(extra if isinstance(extra, dict) else {})
    texts = {name: _content(value) for name, value in given.items() if name.endswith("_token")}
    return SpecialTokens(
        names={name: text for name, text in texts.items() if text is not None},
        eos_token_ids=eos_token_ids(config, folder),
        chat_templates=_templates(folder, tokenizer),
        response_template=tokenizer.get("response_template"),
        needs_bos=family(config).startswith("gemma4"),
    )


def gguf_special_tokens(header: GgufHeader) -> SpecialTokens:
    """The record of a GGUF file.

    Raises:
        ModelFormatError: A key has a value of a wrong type.
    """
    metadata = header.metadata
    tokens = metadata.get("tokenizer.ggml.tokens")
    texts = tokens.items() if isinstance(tokens, StringArray) else []
    kind = metadata.get("tokenizer.ggml.model")

    def token_id(name: str) -> int | None:
        # SentencePiece's own numbers, which files of that kind may leave out.
        default = {"bos": 1, "eos": 2}.get(name) if kind == "llama" else None
        value = metadata.get(f"tokenizer.ggml.{_GGUF_IDS.get(name, name)}_token_id", default)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise _wrong(f"tokenizer.ggml.{name}_token_id", value)
        return value if value is not None and 0 <= value < len(texts) else None  # others are ignored, as in llama.cpp

    ids = {f"{name}_token": token_id(name) for name in _STANDARD}
    names = {name: texts[index].decode("utf-8", "replace") for name, index in ids.items() if index is not None}
    ends = {index for index in map(token_id, ("eos", "eot", "eom")) if index is not None}
    response_template = None
    if GGUF_KEY in metadata:
        written = _written(metadata[GGUF_KEY])
        names, ends = dict(written["names"]), ends | set(written["eos_token_ids"])
        response_template = written.get("response_template")
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token")
    if adds_bos is None:
        adds_bos = kind == "llama" or metadata.get("tokenizer.ggml.pre") in _BOS_FIRST
    templates = {
        key.removeprefix(_TEMPLATE).removeprefix(".") or _DEFAULT: value
        for key, value in metadata.items()
        if key == _TEMPLATE or key.startswith(f"{_TEMPLATE}.")
    }
    for name, template in templates.items():
        if not isinstance(template, str):
            raise _wrong(f"{_TEMPLATE}.{name}", template)
    return SpecialTokens(
        names,
        frozenset(ends),
        templates,
        adds_bos=bool(adds_bos),
        response_template=response_template,
        needs_bos=header.architecture.startswith("gemma4"),
    )


def turn_ends(token_id: Callable[[str], int | None]) -> frozenset[int]:
    """The ids of ``TURN_ENDS`` in a vocabulary; ``token_id`` gives the id of a token's text."""
    found = {name: index for name in TURN_ENDS if (index := token_id(name)) is not None}
    if "<|return|>" in found:
        found.pop("<|end|>", None)
    return frozenset(found.values())


def _optional(folder: Path, file: str) -> dict[str, Any]:
    return read_config(folder / file, str(folder)) if (folder / file).is_file() else {}


def _content(value: Any) -> str | None:
    """The text of a token: Transformers writes it plain, or as an object with its ``content``."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _templates(folder: Path, tokenizer: Mapping[str, Any]) -> dict[str, str]:
    files = {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if (single := folder / "chat_template.jinja").is_file():
        files = {_DEFAULT: single, **files}
    if files:
        return {name: _text(path) for name, path in files.items()}
    found = tokenizer.get("chat_template")
    if found is None:
        found = _optional(folder, "chat_template.json").get("chat_template")
    if found is None:
        return {}
    if isinstance(found, str):
        return {_DEFAULT: found}
    try:
        listed = found.items() if isinstance(found, dict) else [(entry["name"], entry["template"]) for entry in found]
    except (KeyError, TypeError):
        listed = [(None, None)]
    if not all(isinstance(name, str) and isinstance(text, str) for name, text in listed):
        raise ModelFormatError(
            f"chat_template of {folder} is neither a text nor a list of names and templates.",
            "Fix its tokenizer_config.json, or download or save the model again.",
        )
    return dict(listed)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFormatError(f"The chat template {path} cannot be read: {error}.", "Download it again.") from error


def _written(value: Any) -> dict[str, Any]:
    try:
        found = json.loads(value)
        names, ends = found["names"], found["eos_token_ids"]
        if all(isinstance(text, str) for text in names.values()) and all(isinstance(index, int) for index in ends):
            return dict(found)
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise _wrong(GGUF_KEY, value)


def _wrong(key: str, value: Any) -> ModelFormatError:
    return ModelFormatError(
        f"The GGUF header says {key} = {str(value)[:40]!r}, which is of the wrong type.",
        "Download or convert it again.",
    )
