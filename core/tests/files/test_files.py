"""Files that are not regular, and what the system refuses, at every place where the core reads or writes."""

import errno
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from polydraft._folders import cache_folder, data_folder
from polydraft._load import prepare
from polydraft._plugins import PluginHost
from polydraft._registry.pairs import PairRegistry
from polydraft._sealed import check_writable, read_sealed, write_sealed
from polydraft.checkpoints._names import KnownNames
from polydraft.checkpoints._resolve import resolve
from polydraft.checkpoints.config import read_config
from polydraft.checkpoints.safetensors import header, weight_files
from polydraft.errors import InvalidRequestError, ModelFormatError, OutOfMemoryError, SystemResourceError
from polydraft.files import parse_json, read_bytes, system_error, system_errors

posix = pytest.mark.skipif(sys.platform == "win32", reason="FIFOs and /dev are of POSIX")


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EROFS", "EIO", "EMFILE", "ENFILE"])
def test_what_the_system_refuses_is_typed(name):
    number = getattr(errno, name)
    with pytest.raises(SystemResourceError) as caught, system_errors("The pair cannot be read"):
        raise OSError(number, "as the system says it", "/models/config.json")
    assert str(caught.value).startswith("The pair cannot be read: ")
    assert "(/models/config.json)" in caught.value.message
    assert caught.value.hint
    # tokenizers and safetensors write the number into the text of their own exceptions.
    assert isinstance(system_error(Exception(f"I/O error: as it says (os error {number})")), SystemResourceError)


def test_memory_and_other_errors():
    assert isinstance(system_error(MemoryError()), OutOfMemoryError)
    assert isinstance(system_error(ImportError("libx.so: failed to map segment from shared object")), OutOfMemoryError)
    assert system_error(FileNotFoundError(errno.ENOENT, "no")) is None
    assert system_error(ValueError("wrong")) is None


@posix
def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")  # opening it for reading would wait for a writer
    for path in (tmp_path / "fifo", "/dev/zero", "/dev/null", tmp_path):
        with pytest.raises(OSError, match=r"regular|directory"):
            read_bytes(path)


def test_deep_json():
    for text in ("[" * 100_000, '{"a":' * 100_000):
        with pytest.raises(ValueError, match="too deeply"):
            parse_json(text)


def test_readers_on_deep_files_and_failing_disks(tmp_path, monkeypatch):
    deep = tmp_path / "model.safetensors.index.json"
    deep.write_text("[" * 100_000)
    with pytest.raises(ModelFormatError, match="too deeply"):
        read_config(deep, "m")
    with pytest.raises(ModelFormatError, match="too deeply"):
        weight_files(tmp_path)
    weights = tmp_path / "model.safetensors"
    text = b'{"a": {"data_offsets": [0, 1e400]}}'
    weights.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ModelFormatError, match="header cannot be read"):
        header(weights)

    def fail(*arguments, **options):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("polydraft.files.os.open", fail)
    for read in (lambda: read_config(deep, "m"), lambda: weight_files(tmp_path), lambda: header(weights)):
        with pytest.raises(SystemResourceError, match="input/output error"):
            read()


@posix
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja"])
def test_a_model_folder_with_a_file_of_another_kind(name, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "polydraft_reference"}')
    (tmp_path / name).unlink(missing_ok=True)
    for make in (os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to("no")):
        make(tmp_path / name)
        with pytest.raises(ModelFormatError, match=rf"{name} of .* is (not a regular|a link)"):
            prepare(str(tmp_path))
        (tmp_path / name).rmdir() if (tmp_path / name).is_dir() else (tmp_path / name).unlink()


@pytest.mark.parametrize("layers", [10**30, 10**9, float("inf")])
def test_numbers_of_layers_that_no_model_has(layers, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(f'{{"num_hidden_layers": {"1e400" if layers == float("inf") else layers}}}')
    with pytest.raises(ModelFormatError, match="num_hidden_layers"):
        read_config(file, "m")


def test_a_users_file_of_pairs(tmp_path):
    file = tmp_path / "pairs.toml"
    registry = lambda: PairRegistry.of(PluginHost({}), environ={"POLYDRAFT_PAIRS": str(file)})  # noqa: E731
    file.write_bytes(b'\xef\xbb\xbf[[pair]]\r\ntarget = "a/b"\r\ndrafter = "c/d"\r\nkind = "draft-model"\r\n')
    assert any(entry.pair.target == "a/b" for entry in registry().entries)
    for text in ("x = " + "[" * 5000, "x = " + "9" * 5000):
        file.write_text(text)
        with pytest.raises(InvalidRequestError, match=r"too deeply|a number in it has too many digits"):
            registry()


def test_records_when_no_file_can_be_opened(tmp_path, monkeypatch):
    """A machine without file handles must not look like a pair that has never been verified."""
    monkeypatch.setattr("platformdirs.user_data_path", lambda name: tmp_path / "data")
    write_sealed(tmp_path / "record.json", {"verdict": "EXACT"})
    assert read_sealed(tmp_path / "record.json") == {"verdict": "EXACT"}

    def fail(*arguments, **options):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("polydraft.files.os.open", fail)
    with pytest.raises(SystemResourceError, match=r"record\.json cannot be read: this process may open no more files"):
        read_sealed(tmp_path / "record.json")


@posix
@pytest.mark.parametrize("name", [".hidden", "x.json", "additional"])
def test_other_files_of_a_model_folder(name, tmp_path):
    """Links to nowhere do not stop a load, nor do folders or anything hidden; a FIFO does, which engines may open."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.gguf").write_bytes(b"")
    file = tmp_path / name
    for make in (lambda path: path.symlink_to("no"), os.mkdir, os.mkfifo):
        make(file)
        refused = make is os.mkfifo and name[0] != "."
        with nullcontext() if not refused else pytest.raises(ModelFormatError, match="not a regular file"):
            assert resolve(tmp_path, known=KnownNames()).format == "gguf"
        file.rmdir() if make is os.mkdir else file.unlink()


@posix
def test_a_folder_that_is_no_model_is_called_that_whatever_it_holds(tmp_path):
    os.mkfifo(tmp_path / "some-fifo")
    with pytest.raises(ModelFormatError, match=r"is not a model: it has no config\.json"):
        resolve(tmp_path, known=KnownNames())
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ModelFormatError, match=r"config\.json of .* is not a regular file"):
        resolve(tmp_path, known=KnownNames())


@pytest.mark.parametrize("given", ["~nobody-of-this-name/data", "data", ""])
def test_folders_of_a_user_without_a_home(given, tmp_path, monkeypatch):
    def fail(name):
        raise RuntimeError("could not determine the home directory")

    for kind in ("data", "cache"):
        monkeypatch.setattr(f"platformdirs.user_{kind}_path", fail)
    monkeypatch.setattr("os.getcwd", Path("/no/folder").stat)
    monkeypatch.setenv("POLYDRAFT_DATA_DIR", given)
    for folder, variable in ((data_folder, "POLYDRAFT_DATA_DIR"), (cache_folder, "XDG_CACHE_HOME")):
        with pytest.raises(SystemResourceError, match="no home folder") as caught:
            folder()
        assert variable in caught.value.hint
    # Older versions of platformdirs.
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: Path("~/.cache") / name)
    with pytest.raises(SystemResourceError, match="no home folder"):
        cache_folder()


def test_a_record_that_is_nested_as_deeply_as_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYDRAFT_DATA_DIR", str(tmp_path))
    write_sealed(tmp_path / "record.json", {})
    for depth in range(900, 1000, 7):
        (tmp_path / "record.json").write_text('{"seal": "x", "record": ' + "[" * depth + "]" * depth + "}")
        assert read_sealed(tmp_path / "record.json") is None


def test_check_writable(tmp_path, monkeypatch):
    monkeypatch.setattr("platformdirs.user_data_path", lambda name: tmp_path / "data")
    check_writable(tmp_path / "new" / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]  # with the key
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        check_writable(tmp_path / "file" / "folder")


@pytest.mark.parametrize("value", [[1], "x", True, 1.5])
def test_a_bos_token_id_that_is_none(value, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": value}))
    with pytest.raises(ModelFormatError, match=r"bos_token_id in config\.json of m is .*, not a token id"):
        read_config(tmp_path / "config.json", "m")
