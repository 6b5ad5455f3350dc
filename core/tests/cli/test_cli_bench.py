"""``polydraft bench``: tables, the object, exit codes."""

import errno
import json

import pytest

pytest.importorskip("polydraft_reference", reason="needs an engine: polydraft-reference")

TOY = ("bench", "--model", "builtin:toy", "-n", "4", "--repeats", "1")


@pytest.fixture(autouse=True)
def homes(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a b", "class": "law"}\n{"prompt": "c", "class": "art"}\n')
    return str(path)


def test_tables_and_progress(command, prompts):
    done = command(*TOY, "--prompts", prompts, "-k", "1,auto", "--synthetic-acceptance", "0.5")
    assert done.code == 0, done.err
    for word in ("reference plain", "mtp k=1", "mtp k=auto", "x plain", "ms of a round", "law", "art", "peak memory"):
        assert word in done.out
    assert "SYNTHETIC ACCEPTANCE 0.5" in done.out
    assert "Repeat 1 of 1, tokens/s: reference plain" in done.err


def test_the_object(command, prompts):
    done = command(*TOY, "--prompts", prompts, "-d", "none", "--json")
    assert done.code == 0, done.err
    assert done.out.isascii()
    found = json.loads(done.out)
    assert [row["method"] for row in found["rows"]] == [None]


def test_what_cannot_be_saved_is_shown(command, prompts, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="polydraft[charts]")
    from polydraft._measuring import charts

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(charts, "_draw", full)
    for name in ("bench", "tune"):
        words = (*TOY[1:], "-k", "1") if name == "bench" else (*TOY[1:5], "--seconds", "0.2", "--no-keep")
        done = command(name, *words, "-b", "reference", "--prompts", prompts, "--save", str(tmp_path))
        assert done.code == 1
        assert "the disk is full" in done.err
        assert "reference plain" in done.out


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("-k", "2,x"), 2, "-k"),
        (("-k", "2", "--sweep-k"), 2, "--sweep-k"),
        (("--against", "sglang"), 2, "--against"),
        (("--against", "upstream"), 1, "--against upstream"),
        (("--synthetic-acceptance", "2"), 2, "--synthetic-acceptance"),
        (("--repeats", "0"), 2, "--repeats"),
        (("-b", "nonsense"), 1, "nonsense"),
    ],
)
def test_what_is_refused(command, arguments, code, says):
    done = command(*TOY, *arguments)
    assert done.code == code, done.err
    assert says in done.err
    assert not done.out
