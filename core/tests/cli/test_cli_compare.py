"""``generate --compare`` on the reference engine, sound and with defects: verdict, evidence, hint, exit code."""

import json
import shlex

import pytest

pytest.importorskip("polydraft_reference", reason="needs an engine: polydraft-reference")

from defects import NearlyTied, Unverified
from polydraft_reference.backend import ReferenceBackend
from polydraft_reference.engine import ReferenceEngine

TOY = ("generate", "--model", "builtin:toy", "--backend", "reference", "--compare")
# Greedily, ``NearlyTied`` flips a choice of this output.
TIED = (*TOY, "--prompt-token-ids", "1,40,41,42", "-n", "60", "--ignore-eos")


@pytest.fixture(autouse=True)
def data_home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture
def claims(monkeypatch):
    """Let the backend claim something else."""
    sound = ReferenceBackend.capabilities

    def put(**changes):
        monkeypatch.setattr(ReferenceBackend, "capabilities", lambda self: sound(self).model_copy(update=changes))

    return put


@pytest.fixture
def runs(monkeypatch):
    """Let the engine say that something else runs."""
    made = ReferenceEngine.__init__

    def put(**changes):
        def init(self, target, drafter, running):
            made(self, target, drafter, running.model_copy(update=changes))

        monkeypatch.setattr(ReferenceEngine, "__init__", init)

    return put


def both(command, *arguments):
    """The same once with the table and once with ``--json``: the exit code, the table and the object."""
    ran, data = command(*arguments), command(*arguments, "--json")
    assert "Traceback" not in ran.err
    assert ran.code == data.code
    return ran.code, ran.err, json.loads(data.out)["compare"]


SAMPLED = "--temperature 1 --top-k 20"


@pytest.mark.parametrize(
    "arguments",
    [
        "-p 'Once upon a time'",
        f"-p Hi --chat --system 'Be brief.' {SAMPLED}",
        f"-p 'Once upon a time' --drafter ngram {SAMPLED} --seed 3",
        f"-p 'Once upon a time' --drafter builtin:toy-draft -k 3 {SAMPLED}",
        f"-p 'Once upon a time' --stop e --stop a {SAMPLED}",
        "-p Hi -n 1",
    ],
)
def test_exact(command, arguments):
    """Seeds that are not given are drawn: the plain output must use the same one."""
    code, table, found = both(command, *TOY, "-n", "40", *shlex.split(arguments))
    assert code == 0
    assert "identical: yes   EXACT" in table
    assert (found["verdict"], found["identical"], found["passes"], found["hint"]) == ("EXACT", True, True, "")
    assert found["judgement"]["position"] is None


def test_plain_decoding_is_not_compared_with_itself(command, runs):
    ran = command(*TOY, "-p", "Hi", "--drafter", "none")
    assert (ran.code, ran.out) == (2, "")
    assert "--compare has nothing to compare" in ran.err
    runs(method=None)
    ran = command(*TOY, "-p", "Hi")
    assert (ran.code, ran.out) == (1, "")
    assert "There is nothing to compare, speculation is off" in ran.err


@pytest.mark.parametrize("drafter", ["auto", "ngram", "builtin:toy-draft"])
def test_a_near_tie_is_explained_and_no_failure(command, broken, drafter):
    broken(NearlyTied)
    code, table, found = both(command, *TIED, "--drafter", drafter, "-k", "3")
    assert code == 0
    assert "identical: up to a near tie   NEAR_TIE" in table
    judgement = found["judgement"]
    tie = judgement["tie"]
    (line,) = [line for line in table.splitlines() if "differ first at token" in line]
    for what in (f"at token {judgement['position']}.", f"{tie['margin']:.3g} apart in logits", f"{tie['noise']:.3g}"):
        assert what in line
    assert "the control without a drafter chooses the other token, too" in line
    assert found["hint"] in table
    assert "--exactness bitwise removes near ties" in found["hint"]
    assert "--dtype float32" in found["hint"]
    assert (found["verdict"], found["identical"], found["passes"]) == ("NEAR_TIE", False, True)
    assert judgement["tokens"] == [found["plain"]["token_ids"][judgement["position"]], judgement["tokens"][1]]
    assert abs(tie["margin"]) <= 2 * tie["noise"]


@pytest.mark.parametrize(
    ("exactness", "dtype", "ways"),
    [({"standard"}, "bfloat16", ["dtype"]), ({"standard", "bitwise"}, "Q4_0", ["exactness"]), ({"standard"}, "Q8", [])],
)
def test_only_what_removes_a_tie_here_is_named(command, broken, claims, runs, exactness, dtype, ways):
    broken(NearlyTied)
    runs(dtype=dtype)
    claims(exactness=frozenset(exactness))
    hint = both(command, *TIED)[2]["hint"]
    assert [way for way in ("exactness", "dtype") if f"--{way}" in hint] == ways


def test_bitwise_sessions_have_no_near_ties(command, broken, runs):
    broken(NearlyTied)
    runs(dtype="bfloat16", exactness="bitwise")
    code, _, found = both(command, *TIED)
    assert (code, found["verdict"], found["passes"]) == (1, "DIVERGED", False)
    assert "--exactness bitwise removes" not in found["hint"]
    assert "polydraft verify" in found["hint"]


def test_a_defect_is_exit_code_1_and_how_to_check_it(command, broken):
    broken(Unverified)
    code, table, found = both(command, *TIED, "-k", "3", "--drafter", "builtin:toy-draft")
    assert code == 1
    assert "identical: NO   DIVERGED" in table
    assert f"differ first at token {found['judgement']['position']}. {found['judgement']['reason']}" in table
    assert (found["verdict"], found["identical"], found["passes"]) == ("DIVERGED", False, False)
    assert found["hint"] in table
    assert "--dtype" not in found["hint"], "it is not a near tie"
    program, *check = shlex.split(found["hint"].split("`")[1])
    assert (program, check[0]) == ("polydraft", "verify")
    done = command(*check, "--time-limit", "2")
    assert done.code == 1, done.err
    assert "k=3" in done.err
    assert "builtin:toy-draft" in done.err


def test_an_engine_with_nothing_to_measure_with(command, broken, claims):
    broken(Unverified)
    sampling = ReferenceBackend().capabilities().sampling - {"logprobs"}
    claims(exposes_logits=False, sampling=sampling)
    code, table, found = both(command, *TIED)
    assert (code, found["verdict"], found["judgement"]["tie"]) == (1, "DIVERGED", None)
    assert "shows neither logits nor log-probabilities" in table
    assert "--exactness bitwise removes near ties" in found["hint"], "it may be one"
    assert "polydraft verify" in found["hint"]


@pytest.mark.parametrize(
    ("changes", "arguments", "says"),
    [
        ({"seed_identical": False}, ["--seed", "1"], "does not claim"),
        ({}, ["--seed", "1", "--acceptance", "rejection"], "--acceptance rejection"),
    ],
)
def test_samples_that_may_differ_are_not_judged(command, broken, claims, changes, arguments, says):
    broken(Unverified)
    claims(**changes)
    code, table, found = both(command, *TIED, "--temperature", "1", *arguments)
    assert code == 0
    assert "not judged" in table
    assert says in table
    assert (found["verdict"], found["identical"], found["judgement"]) == (None, False, None)
    assert says in found["hint"]


def test_an_engine_without_seeds_is_not_given_one(command, claims):
    claims(sampling=ReferenceBackend().capabilities().sampling - {"seed"})
    assert both(command, *TIED)[0] == 0
