"""Missing and truncated weight files are found before an engine sees them."""

import json

import pytest
from polydraft.checkpoints._weight_files import ignored_files
from polydraft.checkpoints.safetensors import check_folder, header, weight_files
from polydraft.errors import ModelFormatError


@pytest.fixture
def model(make_model):
    return make_model("m", {"model_type": "llama"})


def shard(folder, *names):
    """Shards that hold the tensors a and b, of an index that lists both."""
    (folder / "model.safetensors").unlink()
    for name in names:
        (folder / name).write_bytes(tensors("a" if "1" in name else "b"))
    write_index(folder, {"a": "model-1.safetensors", "b": "model-2.safetensors"})


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def tensors(*names):
    """A safetensors file with a tensor of four zeros for each name."""
    entries = {
        name: {"dtype": "F32", "shape": [4], "data_offsets": [16 * at, 16 * at + 16]} for at, name in enumerate(names)
    }
    raw = json.dumps(entries).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(16 * len(names))


def put(folder, *names):
    """Files of weights by name, with one tensor each, named as the file."""
    for name in names:
        (folder / name).write_bytes(tensors(name))


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


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}'])
def test_broken_index(model, content):
    (model / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelFormatError, match="not an index"):
        check_folder(model)


def test_no_weights(make_model):
    with pytest.raises(ModelFormatError, match="holds no safetensors"):
        check_folder(make_model("m", {}, weights=False))


# --- which files are the weights --------------------------------------------------------------------------------------
HIDDEN = ("._model.safetensors", ".model-00001-of-00001.safetensors")
OTHER = ("consolidated.safetensors", "consolidated-00001-of-00001.safetensors", "optimizer.safetensors")
ADAPTERS = ("adapter_model.safetensors", "0000100_adapters.safetensors")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["model.safetensors", *HIDDEN, *OTHER, *ADAPTERS], ["model.safetensors"]),
        (["model.safetensors", SHARDS[1]], ["model.safetensors"]),  # left over from another save
        (["model.safetensors", "model.fp16.safetensors", "mtp.safetensors"], ["model.safetensors"]),
        ([*SHARDS, *OTHER, "model-00003-of-00003.safetensors"], list(SHARDS)),
        ([*SHARDS, "whole.safetensors"], list(SHARDS)),
        (["weights.safetensors", *HIDDEN, *OTHER], ["weights.safetensors"]),
        (["king-of-hearts.safetensors"], ["king-of-hearts.safetensors"]),
        ([*HIDDEN, *OTHER, *ADAPTERS], []),
    ],
)
def test_the_one_complete_set(make_model, names, chosen):
    folder = make_model("m", {}, weights=False)
    put(folder, *names)
    (folder / "dir.safetensors").mkdir()
    assert [path.name for path in weight_files(folder)] == chosen


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["model.safetensors", *SHARDS], "several sets"),
        ([*SHARDS, "model-00001-of-00001.safetensors"], "several sets"),
        (["a.safetensors", "b.safetensors"], "several sets"),
        (["model-00002-of-00003.safetensors"], r"2 of 3 weight files are missing \(model-00001-of-00003"),
        (["model-00001-of-00002.safetensors", "mtp.safetensors"], "1 of 2 weight files are missing"),
    ],
)
def test_no_one_complete_set(make_model, names, said):
    folder = make_model("m", {}, weights=False)
    put(folder, *names)
    with pytest.raises(ModelFormatError, match=said):
        weight_files(folder)


def test_the_index_comes_first(model):
    put(model, "model-1.safetensors", "model-2.safetensors", "model-00001-of-00001.safetensors")
    write_index(model, {f"model-{n}.safetensors": f"model-{n}.safetensors" for n in (1, 2)})
    assert [path.name for path in weight_files(model)] == ["model-1.safetensors", "model-2.safetensors"]
    check_folder(model)
    assert ignored_files(model) == ["model-00001-of-00001.safetensors", "model.safetensors"]


def test_a_stale_index(model):
    write_index(model, {"a": "model-1.safetensors"})
    with pytest.raises(ModelFormatError, match="missing") as error:
        weight_files(model)
    assert "delete the index" in error.value.hint


def test_an_index_of_another_save(model):
    write_index(model, {"other": "model.safetensors"})
    with pytest.raises(ModelFormatError, match=r"model\.safetensors does not hold the tensor other"):
        check_folder(model)
    shard(model, "model-1.safetensors", "model-2.safetensors")
    (model / "model-2.safetensors").write_bytes(tensors("b", "a"))
    with pytest.raises(ModelFormatError, match="tensor a twice"):
        check_folder(model)


@pytest.mark.parametrize(
    "name",
    [
        *("../other/model.safetensors", "a/../../x.safetensors", "/etc/model.safetensors", "..\\x.safetensors"),
        *("C:\\x.safetensors", "._model.safetensors", ".git/x.safetensors", "model.bin", "model.safetensors/../x.pt"),
    ],
)
def test_an_index_that_lists_other_files(model, name):
    write_index(model, {"w": name})
    with pytest.raises(ModelFormatError, match="lists"):
        weight_files(model)


def test_links(model, make_model, tmp_path):
    """Inside the folder, and from the Hub's snapshots to its blobs; nowhere else, whatever the folder is called."""
    other = make_model("other", {})
    file = model / "model.safetensors"
    file.rename(model / "data")
    file.symlink_to("data")
    check_folder(model)
    (tmp_path / "link").symlink_to(model)
    check_folder(tmp_path / "link")
    file.unlink()
    file.symlink_to(other / "model.safetensors")
    with pytest.raises(ModelFormatError, match="outside the model's folder"):
        weight_files(model)
    file.unlink()
    file.symlink_to("gone")
    with pytest.raises(ModelFormatError, match=r"a link to .*gone, which is not there"):
        weight_files(model)
    file.unlink()
    file.symlink_to(file.name)  # to itself
    with pytest.raises(ModelFormatError, match="which is not there"):
        weight_files(model)
    index = model / "model.safetensors.index.json"
    index.symlink_to("gone")
    with pytest.raises(ModelFormatError, match="not an index"):
        weight_files(model)


@pytest.mark.parametrize(("blobs", "allowed"), [("../../blobs", True), ("../../../blobs", True), ("../..", False)])
def test_links_of_a_snapshot(make_model, tmp_path, blobs, allowed):
    folder = make_model("models--org--m/snapshots/abc", {})
    file = folder / "model.safetensors"
    place = folder / blobs
    place.mkdir(exist_ok=True)
    file.rename(place / "0123")
    file.symlink_to(f"{blobs}/0123")
    (tmp_path / "mine").symlink_to(folder)
    for path in (folder, tmp_path / "mine"):
        if allowed:
            check_folder(path)
        else:
            with pytest.raises(ModelFormatError, match="outside"):
                check_folder(path)


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        *[("tokenizer.json", True), ("generation_config.json", True), ("chat_template.jinja", True)],
        *[("README.md", False), ("old.safetensors", False), (".tokenizer.json", False)],
    ],
)
def test_links_to_nothing(model, name, refused):
    """Without a file that it need not have, the model would run as if it had none."""
    (model / name).symlink_to("gone")
    if refused:
        with pytest.raises(ModelFormatError, match="gone, which is not there"):
            check_folder(model)
    else:
        check_folder(model)
