"""A fingerprint changes when a byte that is loaded does, and only then."""

import json
import os
import shutil
import time

import pytest
from polydraft.checkpoints import contents
from polydraft.contract import HubOptions, ModelSource
from polydraft.errors import ModelFormatError
from polydraft.verification._fingerprint import commit_of, fingerprint, snapshot_of, state_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(bytes(1000))
    return path


def local(path, form="safetensors", file=None):
    source = ModelSource(id=str(path), kind="local", path=path, format=form, file=file)
    return fingerprint(source, HubOptions())


def test_the_same_bytes_elsewhere_are_the_same_model_and_words_about_it_do_not_count(folder, tmp_path, monkeypatch):
    first = local(folder)
    (folder / "README.md").write_text("words")
    (folder / ".cache").mkdir()
    (folder / ".cache/x").write_text("hidden")
    os.utime(folder / "model.safetensors", (1, 1))
    assert local(folder) == first
    shutil.copytree(folder, tmp_path / "elsewhere/renamed")
    (tmp_path / "link").symlink_to(folder)
    assert local(tmp_path / "elsewhere/renamed") == local(tmp_path / "link") == first
    monkeypatch.chdir(tmp_path)
    assert local(type(folder)("model")) == local(type(folder)("./elsewhere/../model/")) == first


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "inner/more.bin", "modeling.py", "inner/.hidden.safetensors"]
)
def test_a_changed_or_new_file_is_another_model(folder, name):
    first = local(folder)
    (folder / "inner").mkdir()
    (folder / name).write_bytes(bytes(999) + b"\1")
    assert local(folder) != first


def test_files_behind_links_count(folder, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "template.jinja").write_text("a")
    (outside / "blob").write_bytes(bytes(1000))
    (folder / "modeling.py").symlink_to(outside / "blob")
    (folder / "additional").symlink_to(outside)
    (folder / "round").symlink_to(folder)  # a circle ends
    first = local(folder)
    (outside / "template.jinja").write_text("b")
    second = local(folder)
    (outside / "blob").write_bytes(bytes(999) + b"\1")
    assert len({first, second, local(folder)}) == 3


def test_a_file_that_cannot_be_read_is_an_error(folder, monkeypatch):
    monkeypatch.setattr(contents, "_hashed", lambda path: path.joinpath("x").read_bytes())
    with pytest.raises(ModelFormatError, match="cannot be read"):
        local(folder)


def test_a_single_file_is_known_by_its_bytes_and_a_split_one_by_all_its_parts(tmp_path):
    for number in (1, 2):
        (tmp_path / f"m-0000{number}-of-00002.gguf").write_bytes(bytes([number]))
    (tmp_path / "other.gguf").write_bytes(b"other")
    first = local(tmp_path / "m-00001-of-00002.gguf", "gguf")
    assert local(tmp_path, "gguf", "m-00001-of-00002.gguf") == first
    shutil.copy(tmp_path / "other.gguf", tmp_path / "copy.gguf")
    assert local(tmp_path / "other.gguf", "gguf") == local(tmp_path / "copy.gguf", "gguf")
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(b"changed")
    assert local(tmp_path / "m-00001-of-00002.gguf", "gguf") != first


@pytest.fixture
def settled(monkeypatch):
    """Digests are kept at once and for small files, on any file system; returns the paths that were hashed."""
    monkeypatch.setattr(contents, "_SMALL", 0)
    monkeypatch.setattr(contents, "_SETTLED", -60)
    monkeypatch.setattr(contents, "_keeps_time_of_change", lambda _: True)
    hashed = []
    read = contents._hashed
    monkeypatch.setattr(contents, "_hashed", lambda path: hashed.append(path.name) or read(path))
    return hashed


def test_a_byte_changed_with_size_and_time_kept_is_noticed_though_files_are_hashed_once(folder, settled):
    file = folder / "model.safetensors"
    before = file.stat()
    first = local(folder)
    assert local(folder) == first
    assert sorted(settled) == ["config.json", "model.safetensors"]
    time.sleep(0.05)  # more than a tick of the file system's clock: see ``_SETTLED``
    with file.open("r+b") as opened:
        opened.seek(500)
        opened.write(b"\1")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert local(folder) != first


@pytest.mark.parametrize("damage", ["sha256", "seal", "link", "garbage", "no key"])
def test_a_kept_digest_that_was_edited_does_not_count(folder, settled, damage, tmp_path, data_home):
    file = folder / "model.safetensors"
    first = contents.file_digest(file)
    (kept,) = contents.digest_folder().glob("*.json")
    data = json.loads(kept.read_text())
    if damage == "sha256":
        data["record"]["sha256"] = "0" * 64
    elif damage == "seal":
        data["seal"] = "0" * 64
    kept.write_text("[" if damage == "garbage" else json.dumps(data))
    if damage == "link":
        kept.rename(tmp_path / "moved")
        kept.symlink_to(tmp_path / "moved")
    elif damage == "no key":
        (data_home.parent / "key").unlink()
    assert contents.file_digest(file) == first
    assert len(settled) == 2


def test_digests_are_not_kept_without_end(folder, settled, monkeypatch):
    monkeypatch.setattr(contents, "_MOST", 4)
    for number in range(12):
        (folder / f"{number}.safetensors").write_bytes(bytes([number]))
    local(folder)
    assert len(list(contents.digest_folder().glob("*.json"))) <= 4


def test_nothing_is_kept_where_there_is_no_time_of_change(folder, monkeypatch):
    monkeypatch.setattr(contents, "_SMALL", 0)
    monkeypatch.setattr(contents, "_SETTLED", -60)
    monkeypatch.setattr(contents, "_mounts", lambda: {"/": "ext4", str(folder): "vfat"})
    local(folder)
    assert not contents.digest_folder().exists()


def test_of_a_hub_model_what_is_in_the_cache_counts(tmp_path):
    def source(revision=None):
        return ModelSource(id="org/name", kind="hub", format="safetensors", revision=revision)

    hub = HubOptions(cache_dir=tmp_path, revision="of-the-target")
    assert (fingerprint(source(), hub), commit_of(source(), hub)) == ("", "")
    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots" / COMMIT
    for folder in (repo / "refs", repo / "blobs", snapshot):
        folder.mkdir(parents=True)
    (repo / "refs/main").write_text(COMMIT)
    assert commit_of(source(), hub) == COMMIT
    assert commit_of(source("f" * 40), hub) == "f" * 40
    (snapshot / "config.json").write_text("{}")
    assert fingerprint(source(), hub) == ""  # the weights are still to be downloaded
    (repo / "blobs/abc").write_bytes(b"weights")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    first = fingerprint(source(), hub)
    assert first
    assert local(snapshot) == fingerprint(source(COMMIT), hub) == first  # another spelling
    assert fingerprint(source("v3"), hub) == ""
    (repo / "blobs/abc").write_bytes(b"Weights")  # edited in the cache
    assert fingerprint(source(), hub) != first


def test_a_model_of_a_server_is_known_by_its_name():
    """No Hub id: its bytes are part of the backend's build."""
    served = ModelSource(id="gemma4:e2b", kind="served", format="gguf")
    assert fingerprint(served, HubOptions()) == "gemma4:e2b"
    assert (snapshot_of(served, HubOptions()), state_of(served, HubOptions())) == (None, ())
