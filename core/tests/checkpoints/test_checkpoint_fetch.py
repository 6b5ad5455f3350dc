"""Fetching files: whole ones come back, damaged and missing ones are named."""

import json

import pytest
from polydraft.checkpoints._names import KnownNames
from polydraft.checkpoints._resolve import resolve
from polydraft.checkpoints.fetch import fetch
from polydraft.contract.requests import HubOptions, ModelSource
from polydraft.errors import ModelFormatError, ModelNotFoundError, PolydraftError

pytestmark = pytest.mark.usefixtures("clean_environment")


@pytest.fixture
def weights(make_model):
    return (make_model("source-of-weights", {}) / "model.safetensors").read_bytes()


def source(name, **fields):
    return ModelSource(id=name, kind="hub", format="safetensors", **fields)


def test_local_folder_is_checked(make_model):
    folder = make_model("m", {"model_type": "llama"})
    model = resolve(folder, known=KnownNames())
    assert fetch(model) == folder
    (folder / "model.safetensors").write_bytes(b"\x00" * 4)
    with pytest.raises(ModelFormatError, match=r"model\.safetensors"):
        fetch(model)


def test_local_folder_that_went_away(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no longer"):
        fetch(ModelSource(id="x", kind="local", path=tmp_path / "x", format="safetensors"))


def test_local_file(tmp_path, gguf_bytes):
    file = tmp_path / "m.gguf"
    file.write_bytes(gguf_bytes())
    assert fetch(resolve(file, known=KnownNames())) == file


def test_download(fake_hub, weights):
    fake_hub.add("org/m", {"config.json": {"model_type": "llama"}, "model.safetensors": weights, "big.onnx": b"x"})
    folder = fetch(source("org/m"), HubOptions())
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_patterns(fake_hub):
    fake_hub.add("org/m", {"a-Q4.gguf": b"GGUF", "a-Q8.gguf": b"GGUF"})
    model = ModelSource(id="org/m:Q4", kind="hub", format="gguf", file="*Q4*.gguf")
    assert [path.name for path in fetch(model, patterns=["*Q4*.gguf"]).iterdir()] == ["a-Q4.gguf"]
    other = model.model_copy(update={"file": "*Q2*.gguf"})
    with pytest.raises(ModelFormatError, match=r"no file '\*Q2\*\.gguf'"):
        fetch(other, patterns=["*Q4*.gguf"])


def test_download_of_a_damaged_file(fake_hub, weights):
    fake_hub.add("org/m", {"config.json": {}, "model.safetensors": weights[:-1]})
    with pytest.raises(ModelFormatError, match=r"model\.safetensors is cut short"):
        fetch(source("org/m"))


def test_download_without_a_shard(fake_hub, weights):
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    fake_hub.add(
        "org/m",
        {"config.json": {}, "1.safetensors": weights, "model.safetensors.index.json": json.dumps(index).encode()},
    )
    with pytest.raises(ModelFormatError, match=r"2\.safetensors"):
        fetch(source("org/m"))


def test_only_the_config_is_in_the_cache(fake_hub, weights):
    """A snapshot without weights must not pass for a model."""
    fake_hub.add("org/m", {"config.json": {}, "model.safetensors": weights})
    resolve("org/m", known=KnownNames())
    with pytest.raises(PolydraftError) as error:
        fetch(source("org/m"), HubOptions(local_files_only=True))
    assert isinstance(error.value, ModelNotFoundError | ModelFormatError)
    assert error.value.hint


def test_gated_while_downloading(fake_hub):
    fake_hub.fail("org/m", 403, "GatedRepo")
    with pytest.raises(ModelNotFoundError, match="gated") as error:
        fetch(source("org/m"))
    assert "licence" in error.value.hint


def test_revision_of_the_source_counts(fake_hub):
    fake_hub.add("org/m", {"config.json": {}})
    with pytest.raises(ModelNotFoundError, match="no revision 'v2'"):
        fetch(source("org/m", revision="v2"), HubOptions(revision="main"))


def test_disk_full(fake_hub, monkeypatch):
    import errno

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(PolydraftError, match="disk is full") as error:
        fetch(source("org/m"))
    assert "HF_HOME" in error.value.hint
