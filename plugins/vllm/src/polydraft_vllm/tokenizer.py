"""The target's tokenizer, from its files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polydraft.checkpoints.config import text_config
from polydraft.checkpoints.special_tokens import read_special_tokens
from polydraft.text.hub_tokenizer import HubTokenizer

from polydraft_vllm.older_models import read_newer_configs

if TYPE_CHECKING:
    from pathlib import Path

    from polydraft.contract import LoadRequest

__all__ = ["TOKENIZER_PATTERNS", "load_tokenizer"]

TOKENIZER_PATTERNS = ("*.json", "*.jinja", "tokenizer*")
"""The files of a checkpoint that it needs, without the weights."""


def load_tokenizer(folder: Path, request: LoadRequest) -> HubTokenizer:
    """The tokenizer, with the checkpoint's special tokens and as many ids as the model has rows.

    ``trust_remote_code`` lets its code run.
    """
    from transformers import AutoTokenizer

    text = text_config(request.target.config)
    if "per_layer_config" in text:
        read_newer_configs()  # the tokenizer's class may depend on the config
    tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=request.trust_remote_code
    )
    special = read_special_tokens(folder, request.target.config)
    # Configs leave out what is their class's default: then the ids are the tokenizer's.
    return HubTokenizer(tokenizer, special, vocab_size=text.get("vocab_size"))
