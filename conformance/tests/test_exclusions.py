"""Exclusions: what is declared must be there, must fail, and must still be true."""

import pytest
from polydraft.contract import Exclusion
from polydraft_conformance.defects import stepping
from polydraft_conformance.defects.making import defective


def probe_true():
    return True


def probe_false():
    return False


def probe_raises():
    raise RuntimeError("probe is broken")


@pytest.fixture
def excluding(conformance):
    """Runs two quick checks on a reference backend whose mtp drafter is silent, with these exclusions."""

    def run(*exclusions, silent=True, select="test_drafts_are_made or test_exclusions"):
        made = [Exclusion(**{"reason": "a reason for it", **exclusion}) for exclusion in exclusions]
        base = defective(stepping.Silent if silent else None)
        backend = type("Excluding", (base,), {"conformance_exclusions": lambda self: made})
        return conformance("-k", select, "--polydraft-kinds", "mtp,ngram", backend=backend)

    return run


def statuses(run, check="test_drafts_are_made"):
    return {(row.kind, row.status) for row in run.report.rows if row.check == check}


def test_without_exclusion_it_fails(excluding):
    run = excluding()
    assert run.exit_code == 1
    assert statuses(run) == {("mtp", "fail"), ("ngram", "pass")}


def test_an_excluded_check_is_run_and_may_fail(excluding):
    run = excluding({"check": "test_drafts_are_made", "status": "notimpl", "drafter_kind": "mtp"})
    assert run.exit_code == 0
    assert statuses(run) == {("mtp", "excluded"), ("ngram", "pass")}
    (reason, *_) = {row.reason for row in run.report.rows if row.status == "excluded"}
    assert reason.startswith("notimpl: a reason for it\nThe drafter is silent")


def test_an_unexpected_pass_fails(excluding):
    run = excluding({"check": "test_drafts_are_*", "status": "never"})
    assert run.exit_code == 1
    assert statuses(run) == {("mtp", "excluded"), ("ngram", "fail")}
    failed = [row.reason for row in run.report.rows if row.status == "fail"]
    assert all(reason.startswith("Unexpected pass") and "a reason for it" in reason for reason in failed)


def test_a_fault_that_the_probe_sees_may_not_show(excluding):
    """Prompts are drawn."""
    probe = f"{__name__}:probe_true"
    run = excluding({"check": "test_drafts_are_made", "status": "notyet", "probe": probe}, silent=False)
    assert run.exit_code == 0
    assert statuses(run) == {("mtp", "excluded"), ("ngram", "excluded")}
    assert any("It holds for the prompts of this run." in row.reason for row in run.report.rows)


def test_exclusions_are_of_one_target(excluding):
    run = excluding({"check": "test_drafts_are_made", "status": "never", "drafter_kind": "mtp", "pair": "another"})
    assert statuses(run) == {("mtp", "fail"), ("ngram", "pass")}
    run = excluding({"check": "test_drafts_are_made", "status": "never", "drafter_kind": "mtp", "pair": "to?"})
    assert statuses(run) == {("mtp", "excluded"), ("ngram", "pass")}


def test_an_exclusion_that_must_not_be_run(excluding):
    run = excluding({"check": "test_drafts_are_made", "status": "never", "run": False})
    assert statuses(run) == {("mtp", "excluded"), ("ngram", "excluded")}


def test_a_probe_that_sees_the_fault(excluding):
    probe = f"{__name__}:probe_true"
    run = excluding({"check": "test_drafts_are_made", "status": "notyet", "drafter_kind": "mtp", "probe": probe})
    assert statuses(run) == {("mtp", "excluded"), ("ngram", "pass")}
    assert run.exit_code == 0


@pytest.mark.parametrize(
    ("probe", "reason"),
    [
        ("probe_false", "says that the fault is gone"),
        ("probe_raises", "RuntimeError: probe is broken"),
        ("no_such_probe", "AttributeError"),
    ],
)
def test_a_probe_that_fails(excluding, probe, reason):
    probe = f"{__name__}:{probe}"
    run = excluding({"check": "test_drafts_are_made", "status": "notyet", "drafter_kind": "mtp", "probe": probe})
    assert run.exit_code == 1
    assert statuses(run) == {("mtp", "fail"), ("ngram", "pass")}
    assert all(reason in row.reason for row in run.report.rows if row.status == "fail")


@pytest.mark.parametrize(
    ("exclusion", "reason"),
    [
        ({"check": "test_no_such_check", "status": "never"}, "names no check"),
        ({"check": "test_drafts_are_made", "status": "notyet", "drafter_kind": "mtp"}, "has no probe"),
        ({"check": "test_drafts_are_made", "status": "notimpl", "drafter_kind": "mtp", "probe": "m:f"}, "has a probe"),
    ],
)
def test_declarations_that_are_wrong(excluding, exclusion, reason):
    run = excluding(exclusion)
    assert run.exit_code == 1
    (row,) = [row for row in run.report.rows if row.check == "test_exclusions_are_well_formed"]
    assert row.status == "fail"
    assert reason in row.reason
