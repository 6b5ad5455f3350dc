"""The one tokenizer of all built-in models: byte-level BPE with Gemma 4's special tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 2048
SPECIAL_TOKENS = (
    "<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>", "<|tool>",
    "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>', "<|image|>",
    "<|image>", "<image|>", "<|audio|>", "<|audio>", "<audio|>", "<|video|>",
)  # fmt: skip
IDS = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
PAD, EOS, BOS = IDS["<pad>"], IDS["<eos>"], IDS["<bos>"]
STOP_IDS = (EOS, IDS["<turn|>"], IDS["<|tool_response>"])
TEMPLATE = Path(__file__).with_name("chat_template.jinja")
MODEL_MAX_LENGTH = 8192


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Train the tokenizer; ids 0..22 are the special tokens, then come the 256 bytes, then the merges."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise RuntimeError(f"{tokenizer.get_vocab_size()} tokens, not {VOCAB_SIZE}")
    for token, index in IDS.items():
        if tokenizer.token_to_id(token) != index:
            raise RuntimeError(f"{token} has id {tokenizer.token_to_id(token)}, not {index}")
    return tokenizer


def tokenizer_config() -> dict[str, Any]:
    """The contents of `tokenizer_config.json`."""
    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<bos>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<eos>",
        "model_max_length": MODEL_MAX_LENGTH,
        "pad_token": "<pad>",
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
    }


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the tokenizer's three files into a model's folder."""
    compact = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(compact + "\n", encoding="utf-8")
    config = json.dumps(tokenizer_config(), indent=2)
    (folder / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE.read_text(encoding="utf-8"), encoding="utf-8")


class ChatTemplate:
    """Renders the chat template as Transformers does."""

    def __init__(self) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = self._fail
        self._template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))

    @staticmethod
    def _fail(message: str) -> None:
        raise ValueError(message)

    def __call__(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        enable_thinking: bool = False,
    ) -> str:
        """The prompt, up to the start of the model's turn."""
        return self._template.render(
            messages=messages,
            tools=tools,
            enable_thinking=enable_thinking,
            bos_token="<bos>",
            add_generation_prompt=True,
        )
