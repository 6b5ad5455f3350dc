"""Checkpoints in the layout in which Gemma 4 is published: with images, the language model under another name."""

import importlib.util
import json
import shutil
from pathlib import Path

import polydraft
import pytest

pytest.importorskip("vllm")

PROMPT = "def read_lines(path):\n"
GREEDY = {"max_new_tokens": 48, "ignore_eos": True}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The built-in target as a checkpoint for conditional generation."""
    from safetensors.torch import load_file, save_file

    source = Path(polydraft.default_host().local_models()["tiny-e2b"].path)
    folder = tmp_path_factory.mktemp("published") / "gemma"
    shutil.copytree(source, folder)
    weights = {
        f"model.language_model.{name.removeprefix('model.')}": value
        for name, value in load_file(folder / "model.safetensors").items()
    }
    weights["model.embed_vision.embedding_projection.weight"] = next(iter(weights.values())).clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "text_config": text,
        "vision_config": {"model_type": "gemma4_vision"},
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="vLLM's own way, with torchvision")
def test_the_language_model_alone_is_loaded(published, mtp):
    wanted = mtp.generate(PROMPT, **GREEDY)
    with polydraft.load(
        published,
        drafter="builtin:tiny-e2b-assistant",
        backend="vllm",
        dtype="float32",
        num_speculative_tokens=4,
        context_length=512,
        engine_options={"kv_cache_memory_bytes": 1 << 26},
    ) as session:
        assert any("Only the language model" in note for note in session.running.notes)
        found = session.generate(PROMPT, **GREEDY)
    assert found.token_ids == wanted.token_ids
    assert found.stats.num_accepted_tokens == wanted.stats.num_accepted_tokens
