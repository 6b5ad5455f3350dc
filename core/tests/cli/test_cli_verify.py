"""``polydraft verify`` on the reference engine: the exit code, the object, the words."""

import json

import polydraft
import pytest

pytest.importorskip("polydraft_reference", reason="needs an engine: polydraft-reference")

from defects import NearlyTied, Unverified

TOY = ("verify", "--model", "builtin:toy", "--backend", "reference", "--time-limit", "2")


@pytest.fixture(autouse=True)
def data_home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "data/polydraft/verified"


def test_identical(command, data_home):
    done = command(*TOY)
    assert done.code == 0, done.err
    assert done.out.startswith("identical: yes")
    assert "mean acceptance length" in done.out
    assert "x plain" in done.out
    assert "EXACT" in done.err
    assert "greedy" in done.err
    assert "temperature=0.8 seed=" in done.err
    assert len(list(data_home.glob("*.json"))) == 1
    with polydraft.load("builtin:toy", backend="reference", verified="require") as session:
        assert session.running.verified.verdict == "EXACT"


def test_the_object(command, data_home):
    done = command(*TOY, "--json", "--no-keep", "-k", "2", "--drafter", "builtin:toy-draft")
    assert done.code == 0, done.err
    assert done.out.isascii()
    found = json.loads(done.out)
    assert (found["verdict"], found["identical"], found["passes"]) == ("EXACT", True, True)
    assert found["counts"] == {"EXACT": len(found["cases"]), "NEAR_TIE": 0, "DIVERGED": 0}
    assert found["num_tokens"] == sum(case["num_tokens"] for case in found["cases"])
    assert found["stats"]["acceptance_rate"] > 0
    assert found["speed_up"] == pytest.approx(found["speculative_tokens_per_second"] / found["plain_tokens_per_second"])
    assert found["subject"]["num_speculative_tokens"] == 2
    assert found["subject"]["drafter"] == "builtin:toy-draft"
    assert found["subject"]["dtype"] == "float32"
    assert found["subject"]["versions"]["polydraft"] == polydraft.__version__
    assert not data_home.exists()


def test_own_prompts(command, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("Once upon a time\n---\nThe end")
    done = command(*TOY, "--prompt-file", str(file), "--no-keep", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert {case["prompt"] for case in found["cases"]} == {"prompt 1", "prompt 2"}
    assert {bool(case["sampling"]) for case in found["cases"]} == {True, False}
    seeds = [case["sampling"]["seed"] for case in found["cases"] if case["sampling"]]
    assert len({*seeds}) == len(seeds)
    file.write_text("x" * 100_000)
    done = command(*TOY, "--prompt-file", str(file), "--no-keep")
    assert done.code == 2
    assert "Prompt 1 has" in done.err
    assert "--prompt-file" in command(*TOY, "--prompt-file", str(tmp_path / "none.txt")).err


def test_a_defect_is_exit_code_1_with_its_evidence(command, broken):
    broken(Unverified)
    done = command(*TOY)
    assert done.code == 1
    assert "identical: NO" in done.out
    assert "DIVERGED" in done.out
    assert "differs" in done.out
    assert "control [" in done.out
    found = json.loads(command(*TOY, "--json").out)
    assert (found["verdict"], found["identical"], found["passes"]) == ("DIVERGED", False, False)


def test_near_ties_pass_unless_strict(command, broken):
    broken(NearlyTied)
    done = command(*TOY)
    assert done.code == 0, done.out
    assert "near ties" in done.out
    assert command(*TOY, "--strict").code == 1
    found = json.loads(command(*TOY, "--json").out)
    assert (found["identical"], found["passes"]) == (False, True)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--time-limit", "0"], 2, "--time-limit"),
        (["--time-limit", "x"], 2, "--time-limit"),
        (["-k", "0"], 2, "`-k 0`"),
        (["--nonsense"], 2, "--nonsense"),
        (["--exactness", "perfect"], 2, "`--exactness perfect`"),
        (["--drafter", "none"], 3, "nothing to verify"),
        (["--drafter", "/no/such/folder"], 3, "/no/such/folder"),
        (["--device", "cuda"], 3, "cpu"),
        (["--model", "builtin:toi"], 3, "builtin:toy"),
    ],
)
def test_what_could_not_be_checked_is_neither(command, data_home, arguments, code, says):
    done = command(*TOY, *arguments)
    assert done.code == code, done.err
    assert done.out == ""
    assert says in done.err
    assert "Traceback" not in done.err
    assert not data_home.exists()
