"""A cache folder: whole files or none, made again where damaged, bounded, nothing in use removed."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from polydraft import caches
from polydraft.caches import CacheFolder, CacheWarning, entries_of
from polydraft.errors import InvalidRequestError, PolydraftError

VARIABLE = "POLYDRAFT_TEST_CACHE"
CONTENT = b"weights" * 100


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache-home"))
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(caches, "_temporary", {})
    monkeypatch.setattr(caches, "_used", used := {})
    yield CacheFolder("things", VARIABLE)
    for descriptor in used.values():
        os.close(descriptor)


def forget():
    """As in a process of its own: nothing is in use."""
    while caches._used:
        os.close(caches._used.popitem()[1])


class Maker:
    def __init__(self, content=CONTENT):
        self.content, self.count = content, 0

    def __call__(self, path):
        self.count += 1
        path.write_bytes(self.content)


def test_a_file_is_made_once(folder, monkeypatch):
    make = Maker()
    path = folder.file("a.bin", make)
    assert folder.file("a.bin", make) == path == folder.path / "a.bin"
    assert path.read_bytes() == CONTENT
    assert make.count == 1
    (entry,) = entries_of(folder.path)
    assert (entry.file, entry.bytes > len(CONTENT)) == (path, True)
    assert not list((folder.path / ".making").iterdir())
    monkeypatch.delenv(VARIABLE)
    assert CacheFolder("things", VARIABLE).path.parts[-2:] == ("polydraft", "things")


def cut(path, description):
    path.write_bytes(CONTENT[:-1])


def flip(path, description):
    before = path.stat()
    path.write_bytes(b"W" + CONTENT[1:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def halve_description(path, description):
    description.write_text(description.read_text()[:20])


def not_complete(path, description):
    description.write_text(json.dumps({"polydraft_cache": 1}))


def link(path, description):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def lose_file(path, description):
    path.unlink()


def lose_description(path, description):
    description.unlink()


@pytest.mark.parametrize("damage", [cut, flip, halve_description, not_complete, link, lose_file, lose_description])
def test_a_damaged_entry_is_made_again(folder, damage):
    make = Maker()
    path = folder.file("a.bin", make)
    damage(path, folder.path / "a.bin.json")
    assert folder.file("a.bin", make) == path
    assert path.read_bytes() == CONTENT
    assert not path.is_symlink()
    assert make.count == 2


def test_what_fails_leaves_nothing(folder):
    def broken(path):
        path.write_bytes(b"half")
        raise ValueError("no such layer")

    with pytest.raises(ValueError, match="no such layer"):
        folder.file("a.bin", broken)
    assert entries_of(folder.path) == []
    assert not list((folder.path / ".making").iterdir())


@pytest.mark.parametrize(
    ("error", "free", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), None, "disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), None, "quota is used up"),
        (OSError("1024 requested and 512 written"), 0, "disk is full"),  # numpy's tofile
        (OSError(errno.EIO, "Input/output error"), None, "could not be written"),
    ],
)
def test_a_full_disk_is_said(folder, monkeypatch, error, free, said):
    def fail(path):
        raise error

    if free is not None:
        monkeypatch.setattr(caches.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free}))
    with pytest.raises(PolydraftError, match=said) as raised:
        folder.file("a.bin", fail)
    assert VARIABLE in raised.value.hint
    assert entries_of(folder.path) == []


def test_a_folder_that_cannot_be_written_is_replaced_for_this_process_with_a_warning(folder):
    folder.path.write_text("a file where the folder should be")
    make = Maker()
    with pytest.warns(CacheWarning, match=VARIABLE):
        path = folder.file("a.bin", make)
    assert path.read_bytes() == CONTENT
    assert folder.file("a.bin", make) == path  # without a second warning
    assert make.count == 1


def test_what_was_used_longest_ago_goes_first_and_what_is_used_stays(folder, monkeypatch):
    monkeypatch.setenv("POLYDRAFT_CACHE_LIMIT", str(3.5 * len(CONTENT) / 2**30))
    make = Maker()
    for number, name in enumerate(("a", "b", "c")):
        folder.file(name, make)
        os.utime(folder.path / f"{name}.json", (number, number))
    forget()
    (folder.path / "mine.gguf").write_bytes(CONTENT * 10)  # the user's own: neither counted nor removed
    (folder.path / "config.json").write_text("{}")
    folder.file("a", make)  # used again
    folder.file("d", make)
    kept = {entry.file.name for entry in entries_of(folder.path)}
    assert "b" not in kept
    assert kept >= {"a", "d"}
    monkeypatch.setenv("POLYDRAFT_CACHE_LIMIT", "0")
    folder.file("e", make)
    assert {entry.file.name for entry in entries_of(folder.path)} == {"a", "d", "e"}
    assert {path.name for path in folder.path.iterdir()} >= {"mine.gguf", "config.json"}


@pytest.mark.parametrize("limit", ["many", "-1", "inf", "nan"])
def test_a_limit_that_is_no_size_is_refused(folder, monkeypatch, limit):
    monkeypatch.setenv("POLYDRAFT_CACHE_LIMIT", limit)
    with pytest.raises(InvalidRequestError, match="POLYDRAFT_CACHE_LIMIT"):
        folder.file("a", Maker())


def test_of_several_threads_one_makes_it(folder):
    def slow(path):
        time.sleep(0.1)
        make(path)

    make, found = Maker(), []
    threads = [threading.Thread(target=lambda: found.append(folder.file("a", slow))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [folder.path / "a"] * 4
    assert make.count == 1


def run(script):
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)


@pytest.mark.skipif(sys.platform == "win32", reason="needs flock")
def test_what_a_killed_process_was_making_is_removed_and_what_a_living_one_makes_is_not(folder):
    script = f"""
        import sys, time
        from polydraft.caches import CacheFolder

        def make(path):
            path.write_bytes(b"half")
            print("making", flush=True)
            time.sleep(60)

        CacheFolder("things", "{VARIABLE}").file("killed", make)
        """
    child = run(script)
    assert child.stdout.readline() == "making\n"
    partial = folder.path / ".making/killed"
    folder.file("a", Maker())
    assert partial.is_dir()
    child.send_signal(signal.SIGKILL)
    child.communicate()
    folder.file("b", Maker())
    assert not partial.exists()
    make = Maker()
    assert folder.file("killed", make).read_bytes() == CONTENT
    assert make.count == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs flock")
def test_what_another_process_uses_is_not_removed(folder, monkeypatch):
    make = Maker()
    folder.file("a", make)
    forget()
    script = f"""
        import time
        from polydraft.caches import CacheFolder
        CacheFolder("things", "{VARIABLE}").file("a", None)
        print("using", flush=True)
        time.sleep(60)
        """
    child = run(script)
    assert child.stdout.readline() == "using\n"
    (entry,) = entries_of(folder.path)
    assert not caches.remove(entry)
    child.kill()
    child.communicate()
    assert caches.remove(entry)
    assert entries_of(folder.path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs flock")
def test_temporary_folders_end_with_their_process(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    folder.path.write_text("a file where the folder should be")
    script = f"""
        import os, signal, warnings
        from polydraft.caches import CacheFolder
        warnings.simplefilter("ignore")
        path = CacheFolder("things", "{VARIABLE}").file("a", lambda path: path.write_bytes(b"x"))
        assert path.is_file()
        """
    assert run(script + "os.kill(os.getpid(), signal.SIGKILL)\n").wait() != 0
    assert len(list(tmp_path.glob("polydraft-cache-*"))) == 1
    assert run(script).wait() == 0
    assert list(tmp_path.glob("polydraft-cache-*")) == []
