"""``polydraft tune``: tables, the object, exit codes, and what is forgotten."""

import json

import polydraft
import pytest

pytest.importorskip("polydraft_reference", reason="needs an engine: polydraft-reference")

from polydraft._tune import _store

TOY = ("tune", "--model", "builtin:toy")


@pytest.fixture(autouse=True)
def data_home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "data/polydraft/tuned"


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a b", "class": "law"}\n{"prompt": "c", "class": "art"}\n')
    return str(path)


def test_measuring_using_and_forgetting(command, prompts, data_home):
    done = command(*TOY, "--seconds", "3", "--prompts", prompts, "-n", "4", "-k", "2", "-b", "reference")
    assert done.code == 0, done.err
    for word in ("reference plain", "reference mtp k=2", "tokens/s", "law", "art", "peak memory", "chosen: reference"):
        assert word in done.out
    assert "Loading reference mtp k=2" in done.err
    assert len(list(data_home.glob("*.json"))) == 1
    with polydraft.load("builtin:toy") as session:
        assert session.running.chosen_by.backend == "measured"
    found = {cache["name"]: cache for cache in json.loads(command("cache", "--json").out)["caches"]}
    assert found["tuned"]["entries"] == 1
    command("cache", "clear")
    assert _store.kept(), "it is not made again by itself"
    assert command("tune", "--forget", "--model", "builtin:tiny-none").out == "Removed: 0\n"
    assert command(*TOY, "--forget").out == "Removed: 1\n"
    assert json.loads(command("tune", "--forget", "--json").out) == {"removed": 0}
    assert not list(data_home.glob("*.json"))


def test_the_object(command, prompts):
    done = command(*TOY, "-s", "2", "--prompts", prompts, "-n", "4", "-k", "2", "-d", "ngram", "--json", "--no-keep")
    assert done.code == 0, done.err
    assert done.out.isascii()
    found = json.loads(done.out)
    assert found["choice"] == found["rows"][found["chosen"]]
    assert {row["method"] for row in found["rows"]} == {None, "ngram"}
    assert found["kept"] is False
    assert _store.kept() == []


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--seconds", "0"], 2, "`--seconds 0"),
        (["--seconds", "x"], 2, "--seconds"),
        (["--load-limit", "-1"], 2, "`--load-limit -1"),
        (["-n", "1"], 2, "`--max-new-tokens 1`"),
        (["--prompts", "/no/such/file"], 2, "--prompts"),
        (["-b", "nonsense"], 1, "nonsense"),
        (["-b", "reference,nonsense"], 1, "nonsense"),
        (["--model", "builtin:toi"], 1, "builtin:toy"),
        (["--nonsense"], 2, "--nonsense"),
    ],
)
def test_wrong_usage(command, arguments, code, says, data_home):
    done = command(*TOY, *arguments)
    assert done.code == code, done.err
    assert done.out == ""
    assert says in done.err
    assert "Traceback" not in done.err
    assert not data_home.exists()


def test_an_interruption_shows_what_was_measured(command, prompts, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("polydraft._tune._search.Search._measure_round", interrupted)
    done = command(*TOY, "-s", "10", "-n", "4", "-k", "2", "-d", "ngram", "--prompts", prompts)
    assert done.code == 130
    assert "reference plain" in done.out
    assert "It was interrupted" in done.out
    assert "(not kept)" in done.out
    assert _store.kept() == []
