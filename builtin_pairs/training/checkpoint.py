"""Model folders in the layout that Transformers saves, in bf16, tied weights stored once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, Gemma4AssistantForCausalLM, PreTrainedModel

from .tokenizer import write_tokenizer


def round_to_bf16(model: PreTrainedModel) -> None:
    """Round the weights to bf16 values, in place, keeping the dtype."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(torch.bfloat16).to(tensor.dtype))


def save(model: PreTrainedModel, folder: Path, tokenizer: Tokenizer) -> None:
    """Write the folder, replacing what is there."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    # Cast a copy: buffers that are not stored must stay exact in the model itself.
    state = {
        name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    copy: Any = type(model)(model.config)
    copy.load_state_dict(state)
    copy.generation_config = model.generation_config
    copy.to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(tokenizer, folder)
    for file in folder.iterdir():
        file.chmod(0o644)


def load(folder: Path, *, device: str = "cpu") -> Any:
    """Loads a target or a drafter in fp32, ready to run."""
    if folder.name.endswith("-assistant"):
        model: Any = Gemma4AssistantForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(device).eval()
