"""``assert_conforms`` passes only where checks passed on a pair of the backend, whatever the project around it sets."""

import dataclasses
import json

import pytest
from polydraft_conformance import testing
from polydraft_conformance.running import FinishedRun
from polydraft_conformance.testing import assert_conforms, run_suite

FEW = ("--polydraft-quick", "--polydraft-kinds", "ngram", "--polydraft-seed", "5")


def row(status="pass", target="toy", reason="", check="test_generates"):
    case = (
        {"target": target, "drafter": "ngram", "kind": "ngram", "k": 4}
        if target
        else dict.fromkeys(("target", "kind", "k"))
    )
    return {"check": check, "group": "generation", "status": status, "reason": reason, **case}


def finished(*rows, code=0, usable=True, backend="mine", stderr=""):
    report = {
        "backend": {"name": backend},
        "availability": {"usable": usable, "reason": "It needs a GPU.", "remedy": "Buy one."},
        "checks": list(rows),
    }
    return FinishedRun("mine", code, "printed", stderr, report if rows else None)


UNPROVEN = {
    "nothing was collected": (finished(code=5), "No check was left to run: an option such as `-k`"),
    "only listed": (finished(), "No check ran: an option made pytest do something else"),
    "misspelt": (
        finished(code=4, stderr="ERROR: There is no backend 'mine'. Try another.\n"),
        "There is no backend 'mine'",
    ),
    "died": (finished(code=-11), "ended by signal 11"),
    "no pair": (finished(row(target=None, check="test_x")), "was run on no pair: .* load nothing .test_x."),
    "unclaimed": (finished(row("not-claimed", reason="It claims no mtp.")), "1 not-claimed. It claims no mtp"),
    "excluded": (finished(row("excluded", reason="never: no.")), "No check passed on any pair of mine: 1 excluded"),
    "unchecked": (finished(row("unchecked")), "No check passed on any pair of mine: 1 unchecked"),
    "another backend": (finished(row(), backend="other"), "ran on the backend 'other', not on 'mine'"),
    "a failure": (
        finished(row(), row("fail", reason="k is off.\nmore"), row("follows"), code=1),
        r"^1 check of mine failed, first test_generates \(toy, ngram, k=4\): k is off\. \(`polydraft-conformance exp",
    ),
    "a failure in spite of code 0": (finished(row(), row("fail", reason="k is off.")), "1 check of mine failed"),
    "interrupted": (finished(row(), code=2), "interrupted"),
    "cannot run here": (
        finished(row("cannot-install", None), usable=False),
        "mine cannot run on this machine: It needs",
    ),
}


@pytest.mark.parametrize("why", UNPROVEN)
def test_a_run_that_proves_nothing_fails_with_its_reason(monkeypatch, why):
    run, reason = UNPROVEN[why]
    monkeypatch.setattr(testing, "run_suite", lambda *_: run)
    with pytest.raises(AssertionError, match=reason) as caught:
        assert_conforms("mine")
    assert "printed" in str(caught.value)


def test_what_passes(monkeypatch):
    unusable = UNPROVEN["cannot run here"][0]
    for run, allowed in ((finished(row(), row("not-claimed")), False), (unusable, True)):
        monkeypatch.setattr(testing, "run_suite", lambda *_, run=run: run)
        assert_conforms("mine", allow_unavailable=allowed)
    failed = dataclasses.replace(unusable, returncode=1)
    monkeypatch.setattr(testing, "run_suite", lambda *_: failed)
    with pytest.raises(AssertionError):
        assert_conforms("mine", allow_unavailable=True)


def test_a_misspelt_backend_and_a_filter_that_leaves_nothing():
    assert "no backend 'refrence'" in run_suite("refrence").reason
    assert "was left to run" in run_suite("reference", *FEW, "-k", "no_such_check").reason


def test_settings_of_the_project_do_not_reach_the_suite(tmp_path, monkeypatch):
    """Among them options that are unknown here, and a conftest.py that fails."""
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\naddopts = -x --no-such-option -k nothing --collect-only\nfilterwarnings = error\n"
        "testpaths = nowhere\npolydraft_backend = other\n"
    )
    (tmp_path / "conftest.py").write_text("raise RuntimeError\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTEST_ADDOPTS", "--another-option -k nothing")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    run = run_suite("reference", *FEW, "-k", "test_generates", "--polydraft-report", "report")
    assert run.reason == "", run.stdout + run.stderr
    data = json.loads((tmp_path / "report/conformance-report.json").read_text(encoding="utf-8"))
    assert data == run.report
    assert {found["status"] for found in data["checks"]} == {"pass"}
    stale = run_suite("reference", *FEW, "-k", "no_such_check", "--polydraft-report", "report")
    assert stale.report is None, "a report of an earlier run is not this one's"
