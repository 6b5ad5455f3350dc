"""Missing and truncated weight files are found before an engine sees them."""

import json

import pytest
from polydraft.checkpoints.safetensors import check_folder, header, weight_files
from polydraft.errors import ModelFormatError


@pytest.fixture
def model(make_model):
    return make_model("m", {"model_type": "llama"})


def shard(folder, *names):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    for name in names:
        (folder / name).write_bytes(whole)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_whole_folder(model):
    check_folder(model)
    assert header(model / "model.safetensors")["w"]["shape"] == [4]


def test_real_checkpoint(builtin_data):
    check_folder(builtin_data / "tiny-e2b")


def test_cut_at_every_length(model):
    whole = (model / "model.safetensors").read_bytes()
    for length in range(len(whole)):
        (model / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(ModelFormatError, match=r"model\.safetensors") as error:
            check_folder(model)
        assert "download" in error.value.hint


def test_not_safetensors_at_all(model):
    (model / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 5\n")
    with pytest.raises(ModelFormatError, match=r"not a safetensors file"):
        check_folder(model)


def test_header_without_offsets(model):
    raw = b'{"w": 3}'
    (model / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(ModelFormatError, match="header cannot be read"):
        check_folder(model)


def test_shards(model):
    shard(model, "model-1.safetensors", "model-2.safetensors")
    assert [path.name for path in weight_files(model)] == ["model-1.safetensors", "model-2.safetensors"]
    check_folder(model)


def test_missing_shard(model):
    shard(model, "model-1.safetensors")
    with pytest.raises(ModelFormatError, match=r"1 of 2 weight files are missing \(model-2\.safetensors\)"):
        check_folder(model)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_broken_index(model, content):
    (model / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelFormatError, match="not an index"):
        check_folder(model)


def test_no_weights(make_model):
    with pytest.raises(ModelFormatError, match="holds no safetensors"):
        check_folder(make_model("m", {}, weights=False))
