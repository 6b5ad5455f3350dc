"""A fingerprint changes when the weights do, and only then."""

import os
import shutil

import pytest
from polydraft.contract import HubOptions, ModelSource
from polydraft.verification import _fingerprint as module
from polydraft.verification._fingerprint import fingerprint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(bytes(1000))
    return path


def local(path):
    return fingerprint(ModelSource(id=str(path), kind="local", path=path, format="safetensors"), HubOptions())


def test_a_copy_is_the_same_model_and_words_about_it_do_not_count(folder, tmp_path):
    first = local(folder)
    (folder / "README.md").write_text("words")
    (folder / ".cache").mkdir()
    (folder / ".cache/x").write_text("hidden")
    os.utime(folder / "model.safetensors", (1, 1))
    assert local(folder) == first
    shutil.copytree(folder, tmp_path / "elsewhere/model")
    assert local(tmp_path / "elsewhere/model") == first


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "inner/more.bin"])
def test_a_changed_or_new_file_is_another_model(folder, name):
    first = local(folder)
    (folder / "inner").mkdir()
    (folder / name).write_bytes(bytes(999) + b"\1")
    assert local(folder) != first


def test_a_single_file(folder):
    file = folder / "model.safetensors"
    first = local(file)
    file.write_bytes(bytes(1001))
    assert local(file) != first


def test_links_count_as_what_they_lead_to(folder, tmp_path):
    first = local(folder)
    (folder / "model.safetensors").rename(tmp_path / "data")
    (folder / "model.safetensors").symlink_to(tmp_path / "data")
    (folder / "x.json").symlink_to("gone")
    assert local(folder) == first
    (tmp_path / "data").write_bytes(bytes(999) + b"\1")
    assert local(folder) != first


@pytest.mark.parametrize("given", [1, 2])
def test_all_parts_of_a_split_model_count(tmp_path, given):
    parts = [tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    for part in parts:
        part.write_bytes(b"GGUF")
    first = local(parts[given - 1])
    parts[2 - given].write_bytes(b"GGUG")
    assert local(parts[given - 1]) != first


def test_large_files_are_read_in_parts(folder, monkeypatch):
    monkeypatch.setattr(module, "_WHOLE", 100)
    monkeypatch.setattr(module, "_PARTS", 4)
    monkeypatch.setattr(module, "_PART", 16)
    file = folder / "model.safetensors"
    os.utime(file, ns=(10**18, 10**18))
    first = local(folder)
    assert local(folder) == first
    with file.open("r+b") as opened:  # the last byte: the parts reach to both ends
        opened.seek(999)
        opened.write(b"\1")
    os.utime(file, ns=(10**18, 10**18))
    assert local(folder) != first
    with file.open("r+b") as opened:
        opened.seek(999)
        opened.write(b"\0")
    os.utime(file, ns=(10**18, 10**18))
    assert local(folder) == first
    os.utime(file, ns=(10**18, 10**18 + 1))  # a change between the parts shows in the time
    assert local(folder) != first


def test_of_a_hub_model_the_commit_counts(tmp_path):
    def hub(revision=None):
        source = ModelSource(id="org/name", kind="hub", format="safetensors", revision=revision)
        return fingerprint(source, HubOptions(cache_dir=tmp_path, revision="of-the-target"))

    assert hub() is None
    refs = tmp_path / "models--org--name/refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(COMMIT)
    (refs / "v2").write_text(COMMIT[::-1])
    assert hub() == COMMIT
    assert hub("v2") == COMMIT[::-1]
    assert hub("v3") is None
    assert hub("f" * 40) == "f" * 40
