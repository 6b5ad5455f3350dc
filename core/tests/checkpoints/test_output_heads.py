"""The tensors decide whether the head is the embedding; the config that engines read agrees with them."""

import json

import pytest
from huggingface_hub import snapshot_download
from polydraft._load import _notes_on_weights
from polydraft.checkpoints._engine_folder import engine_folder
from polydraft.checkpoints._output_head import corrected_config, head_note
from polydraft.contract.requests import HubOptions, ModelSource
from polydraft_conformance.changed_checkpoints import change_tensors

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WRAPPED = ("model.language_model.embed_tokens.weight", "language_model.lm_head.weight")


@pytest.fixture
def model(tmp_path):
    """A function: a folder with these tensors and this config."""

    def make(names, **config):
        folder = tmp_path / "m"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
        change_tensors(folder, lambda tensors: tensors.update({name: ("F32", [1], bytes(4)) for name in names}))
        return folder

    return make


@pytest.mark.parametrize(
    ("names", "config", "tied"),
    [
        ([EMBEDDING], {"tie_word_embeddings": True}, None),
        ([EMBEDDING], {"tie_word_embeddings": False}, True),
        ([EMBEDDING], {"model_type": "gemma3_text"}, None),
        ([EMBEDDING], {"model_type": "llama"}, True),
        ([EMBEDDING, HEAD], {"tie_word_embeddings": False}, None),
        ([EMBEDDING, HEAD], {"tie_word_embeddings": True}, False),
        ([EMBEDDING, HEAD], {"model_type": "gemma3_text"}, False),
        ([EMBEDDING, HEAD], {"model_type": "llama"}, None),
        ([EMBEDDING, "lm_head.scales"], {"tie_word_embeddings": True}, False),
        (WRAPPED, {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, False),
        (WRAPPED[:1], {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True}}, None),
        (["wte.weight"], {"tie_word_embeddings": False}, None),
    ],
)
def test_the_tensors_decide(model, names, config, tied):
    folder = model(names, **config)
    text = corrected_config(folder)
    assert bool(head_note(folder, "m")) == bool(text) == (tied is not None)
    if tied is None:
        assert engine_folder(folder) == folder
        return
    made = json.loads((engine_folder(folder) / "config.json").read_text())
    assert made == json.loads(text)
    assert made["tie_word_embeddings"] is tied
    assert made.get("text_config", {}).get("tie_word_embeddings", tied) is tied
    assert (engine_folder(folder) / "model.safetensors").samefile(folder / "model.safetensors")
    assert json.loads((folder / "config.json").read_text()) == config


@pytest.mark.parametrize("complete", [True, False])
def test_notes_on_a_hub_model_and_none_on_an_incomplete_folder(model, fake_hub, tmp_path, complete):
    """A server that was started elsewhere has weights that this machine may lack: no reason to fail."""
    folder = model([EMBEDDING, HEAD], tie_word_embeddings=True)
    if not complete:
        index = {"weight_map": {EMBEDDING: "gone.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    fake_hub.add("org/m", files)
    hub = HubOptions(cache_dir=tmp_path / "hub")
    snapshot_download("org/m", cache_dir=hub.cache_dir)
    local = ModelSource(id="org/m", kind="local", path=folder, format="safetensors")
    for source in (local, local.model_copy(update={"kind": "hub", "path": None})):
        notes = _notes_on_weights(source, hub)
        assert [("output head" in note) for note in notes] == [True] * complete
