"""Fetching files: whole ones come back, damaged and missing ones are named."""

import glob
import json
import shutil
from pathlib import Path

import pytest
from polydraft.checkpoints._names import KnownNames
from polydraft.checkpoints._resolve import resolve
from polydraft.checkpoints.fetch import fetch, has_tokenizer
from polydraft.checkpoints.safetensors import check_folder, weight_files
from polydraft.contract.requests import HubOptions, ModelSource
from polydraft.errors import InvalidRequestError, ModelFormatError, ModelNotFoundError, PolydraftError

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


def test_a_download_leaves_out_what_is_not_the_models(fake_hub, weights):
    others = [
        "consolidated.safetensors",
        "original/model.safetensors",
        "adapter_model.safetensors",
        "pytorch_model.bin",
    ]
    others += ["adapter_config.json", "consolidated.safetensors.index.json", "optimizer.safetensors"]
    files = {"config.json": {}, "model.safetensors": weights, "additional_chat_templates/tools.jinja": b"x"}
    fake_hub.add("org/m", files | dict.fromkeys(others, b"x"))
    folder = fetch(source("org/m"))
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == set(files)


def test_a_snapshot_with_left_overs(fake_hub, weights, tmp_path):
    """The Hub's cache keeps what other programs have downloaded; its files are links to the repository's blobs."""
    fake_hub.add("org/m", {"config.json": {}, "model.safetensors": weights, "model-old.safetensors": b"x"})
    from huggingface_hub import snapshot_download

    snapshot = Path(snapshot_download("org/m"))
    folder = fetch(source("org/m"))
    assert folder.is_relative_to(tmp_path / "cache-home")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").samefile(snapshot / "model.safetensors")


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


# --- the folder that an engine gets ----------------------------------------------------------------------------------
def shards(folder, names, *, listed=True):
    """Shards with one tensor each, and an index unless ``listed`` is False."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    for number, name in enumerate(names):
        header = json.dumps({f"t{number}": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    index = {"metadata": {}, "weight_map": {f"t{number}": name for number, name in enumerate(names)}}
    if listed:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def fetched(folder):
    return fetch(resolve(folder, known=KnownNames()))


@pytest.mark.parametrize("names", [[], ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]])
def test_an_ordinary_folder_is_used_as_it_is(make_model, names):
    folder = make_model("m", {"model_type": "llama"})
    if names:
        shards(folder, names)
    for name in ("pytorch_model.bin", "optimizer.pt", ".gitattributes", "tokenizer.json", "modeling.py", "m.gguf"):
        (folder / name).write_text("x")
    assert fetched(folder) == folder


@pytest.mark.parametrize(
    "other",
    [
        *("model-00001-of-00001.safetensors.safetensors", "old.safetensors", "consolidated.safetensors"),
        *(
            "._model.safetensors",
            "adapter_config.json",
            "adapter_model.safetensors",
            "original/consolidated.safetensors",
        ),
    ],
)
def test_other_weights_are_not_in_the_folder_that_an_engine_gets(make_model, other):
    folder = make_model("my model", {"model_type": "llama"}, tokenizer={})
    for name in (other, "pytorch_model.bin", ".hidden", "modeling.py", "additional_chat_templates/tools.jinja"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    made = fetched(folder)
    assert made != folder
    assert made.name == "my_model"
    found = sorted(path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file())
    own = ["additional_chat_templates/tools.jinja", "config.json", "model.safetensors", "modeling.py", "tokenizer.json"]
    assert found == own
    assert all((made / name).samefile(folder / name) for name in own)
    assert fetched(folder) == made, "it is made once"
    (made / "model.safetensors").unlink()
    assert fetched(folder) == made
    assert (made / "model.safetensors").samefile(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("names", "listed"),
    [
        (["weights.safetensors"], False),
        (["model-1-of-2.safetensors", "model-2-of-2.safetensors"], False),
        (["a.safetensors", "b.safetensors"], True),
        (["parts/model-1.safetensors", "model-2.safetensors"], True),
        (["model.safetensors", "model-2.safetensors"], True),
    ],
)
def test_unusual_names_become_usual(make_model, names, listed):
    folder = make_model("m", {"model_type": "llama"})
    shards(folder, names, listed=listed)
    made = fetched(folder)
    check_folder(made)
    files = weight_files(made)
    usual = ["model.safetensors"] if len(names) == 1 else ["model-00001-of-00002.safetensors"]
    assert [file.name for file in files][:1] == usual
    assert all(file.samefile(folder / name) for file, name in zip(files, sorted(names), strict=True))


@pytest.mark.parametrize("name", ["m[1]", "m[x", "m*", "m?"])
def test_a_path_with_characters_of_patterns(make_model, name):
    folder = make_model(name, {"model_type": "llama"})
    made = fetched(folder)
    assert not glob.has_magic(str(made))
    assert fetched(folder / ".." / name).parent.parent == made.parent.parent
    assert (made / "model.safetensors").samefile(folder / "model.safetensors")


def test_where_symbolic_links_are_not_permitted(make_model, monkeypatch):
    folder = make_model("m[1]", {"model_type": "llama"})

    def refuse(*args, **kwargs):
        raise OSError("privilege not held")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    made = fetched(folder)
    assert (made / "model.safetensors").samefile(folder / "model.safetensors")
    assert not (made / "model.safetensors").is_symlink()
    # Another file in its place: the hard link still leads to the old one.
    (folder / "config.json").unlink()
    (folder / "config.json").write_text('{"model_type": "gemma"}')
    assert (fetched(folder) / "config.json").samefile(folder / "config.json")
    monkeypatch.setattr("os.link", refuse)
    other = make_model("n[1]", {"model_type": "llama"})
    with pytest.raises(InvalidRequestError, match="privilege not held") as error:
        fetched(other)
    assert "Rename it" in error.value.hint
    assert not list(made.parents[1].glob("tmp*")), "nothing is left behind"


def test_the_folder_of_a_model_that_is_gone_is_removed(make_model):
    folder = make_model("m[1]", {"model_type": "llama"})
    made = fetched(folder)
    shutil.rmtree(folder)
    other = fetched(make_model("n[1]", {"model_type": "llama"}))
    assert other.exists()
    assert not made.parent.exists()


def test_a_config_that_names_its_own_weights(make_model):
    folder = make_model("m", {"model_type": "llama", "transformers_weights": "other.safetensors"})
    with pytest.raises(ModelFormatError, match="transformers_weights"):
        fetched(folder)


def test_hidden_files_are_no_tokenizer(make_model):
    folder = make_model("m", {})
    (folder / "._tokenizer.json").write_text("")
    assert not has_tokenizer(folder)
    (folder / "merges.txt").write_text("")
    assert has_tokenizer(folder)
