"""Make a conditional-generation copy of a text-only target, the layout of published Gemma 4, for tests of loading code.

The language model's weights are the same, under their other names; a tiny vision tower with random weights is added.

    python -m training.conditional SOURCE DESTINATION
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Gemma4VisionConfig,
    GenerationConfig,
)

VISION_FIELDS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "position_embedding_size": 64,
    "pooling_kernel_size": 2,
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
MEDIA = {
    "image_token_id": "<|image|>",
    "boi_token_id": "<|image>",
    "eoi_token_id": "<image|>",
    "audio_token_id": "<|audio|>",
    "boa_token_id": "<|audio>",
    "eoa_token_index": "<audio|>",
    "video_token_id": "<|video|>",
}


def conditional_copy(source: Path, destination: Path) -> Path:
    """Write the copy into `destination`, a new folder, and return its path."""
    added = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    config = Gemma4Config(
        text_config=Gemma4TextConfig.from_pretrained(source),
        vision_config=Gemma4VisionConfig(**VISION_FIELDS),
        audio_config=None,
        **{field: ids[token] for field, token in MEDIA.items()},
    )
    torch.manual_seed(0)
    model: Any = Gemma4ForConditionalGeneration(config)
    state = model.state_dict()
    with safe_open(source / "model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            name = "model.language_model." + key.removeprefix("model.")
            if state[name].shape != file.get_tensor(key).shape:
                raise ValueError(f"{name}: another shape")
            state[name].copy_(file.get_tensor(key))
    model.generation_config = GenerationConfig.from_pretrained(source)
    destination.mkdir(parents=True)
    model.to(torch.bfloat16).save_pretrained(destination)
    for name in TOKENIZER_FILES:
        shutil.copyfile(source / name, destination / name)
    return destination


if __name__ == "__main__":
    print(conditional_copy(Path(sys.argv[1]), Path(sys.argv[2])))
