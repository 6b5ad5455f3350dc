"""``polydraft cache``: what is kept, and removing it."""

import json
import os

import polydraft
import pytest
from polydraft import caches
from polydraft._sealed import write_sealed
from polydraft.caches import CacheFolder
from polydraft.contract import CacheRecord, hookimpl


class Plugin:
    @hookimpl
    def polydraft_caches(self):
        yield CacheRecord(name="things", summary="things made", path=str(CacheFolder("things", "NO_VARIABLE").path))


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """A verification, and two files of a plugin, one of which this process uses."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("polydraft._plugins.default_host", lambda: polydraft.PluginHost({"mine": Plugin()}))
    monkeypatch.setattr("polydraft.caches._used", {})
    folder = CacheFolder("things", "NO_VARIABLE")
    for name in ("used", "free"):
        folder.file(name, lambda path: path.write_bytes(bytes(5 << 20)))
    os.close(caches._used.pop(folder.path / ".locks/free.use"))
    (folder.path / "foreign.json").write_text("{}")
    record = tmp_path / "data/polydraft/verified/x.json"
    write_sealed(record, {})
    return folder.path, record


def test_the_list(command, kept):
    done = command("cache")
    assert done.code == 0, done.err
    assert "things made" in done.out
    assert "50.0 GiB" in done.out
    found = {cache["name"]: cache for cache in json.loads(command("cache", "--json").out)["caches"]}
    assert list(found)[:2] == ["verified", "digests"]
    assert (found["verified"]["entries"], found["verified"]["limit_bytes"]) == (1, None)
    assert (found["things"]["entries"], found["things"]["limit_bytes"]) == (2, 50 << 30)
    assert 10 << 20 < found["things"]["bytes"] < 11 << 20
    assert found["things"]["path"] == str(kept[0])


def test_clearing(command, kept):
    folder, record = kept
    (folder / ".making/left").mkdir()
    done = command("cache", "clear")
    assert done.code == 0, done.err
    assert "things: removed 1, 5.0 MiB; 1 in use or not removable" in done.out
    assert {path.name for path in folder.glob("*")} >= {"used", "used.json", "foreign.json"}
    assert not (folder / "free").exists()
    assert not (folder / ".making/left").exists()
    assert record.is_file()  # it would not come back by itself
    done = command("cache", "clear", "verified", "--json")
    (cleared,) = json.loads(done.out)["cleared"]
    assert cleared.pop("removed_bytes") > 0
    assert cleared == {"name": "verified", "removed": 1, "left": 0}
    assert not record.exists()


@pytest.mark.parametrize(
    ("words", "says"), [(("clear", "thing"), "things"), (("empty",), "clear"), (("clear", "a", "b"), "b")]
)
def test_wrong_usage(command, kept, words, says):
    done = command("cache", *words)
    assert done.code == 2
    assert says in done.err
    assert kept[1].is_file()


def test_nothing_is_kept_yet(command, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done = command("cache")
    assert done.code == 0, done.err
    assert "verified" in done.out
    assert not (tmp_path / "cache").exists()
