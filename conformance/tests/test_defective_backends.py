"""The suite catches every defective backend of its catalogue, by the check that names it, with its cause."""

import pytest
from polydraft import PluginHost
from polydraft.verification._command import verify
from polydraft_conformance.defects import honest, stepping
from polydraft_conformance.defects.catalogue import catalogue
from polydraft_conformance.defects.making import PluginOf, defective
from polydraft_conformance.defects.running import missed, options_for
from polydraft_conformance.defects.stepping_places import in_sixteen_bits

DEFECTS = {defect.name: defect for defect in catalogue()}


def failed(run):
    return {row.check: row.reason for row in run.report.rows if row.status == "fail"}


def assert_caught(conformance, name, *, full, all_checks):
    """The first failure ends the run: of a defect's consequences, that is the one that is named."""
    defect = DEFECTS[name]
    if not full and not defect.quick:
        pytest.skip("the catalogue says that only a full run catches it")
    with defect.in_place() as backend:
        options = options_for(defect, full=full, all_checks=all_checks)
        run = conformance(*options, backend=backend, quick=False)
    assert missed(run, defect) == ""


@pytest.mark.parametrize("mode", ["quick", pytest.param("full", marks=pytest.mark.slow("the same defects again"))])
@pytest.mark.parametrize("name", DEFECTS)
def test_it_is_caught(conformance, name, mode):
    assert_caught(conformance, name, full=mode == "full", all_checks=False)


@pytest.mark.slow("the same defects again, with all checks that come before the one that names them")
@pytest.mark.parametrize("name", DEFECTS)
def test_it_is_caught_by_its_check_first(conformance, name):
    assert_caught(conformance, name, full=False, all_checks=True)


HONEST = {
    "a whole engine": defective(whole=honest.Whole, **honest.CLAIMS),
    "a whole engine with few claims": defective(whole=honest.Whole, **honest.FEW_CLAIMS),
    "a whole engine without seeds": defective(
        whole=honest.Whole, **{**honest.FEW_CLAIMS, "sampling": frozenset({"temperature"})}
    ),
    "an engine with bfloat16": in_sixteen_bits(stepping.LowPrecision),
}


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_engine_passes(conformance, name):
    run = conformance("--polydraft-kinds", "mtp", backend=HONEST[name])
    assert run.exit_code == 0, failed(run)


def test_low_precision_passes_with_near_ties(conformance):
    """Rounding is not a defect: what it flips is a near tie, counted apart."""
    backend = defective(stepping.LowPrecision, **stepping.LOW_PRECISION)
    run = conformance("--polydraft-kinds", "mtp", backend=backend)
    assert run.exit_code == 0, failed(run)
    verdicts = run.report.verdicts()
    assert verdicts["NEAR_TIE"] > 0
    assert verdicts["DIVERGED"] == 0


def test_an_engine_that_hangs(conformance):
    """It costs its own rows only."""
    run = conformance(
        *("--polydraft-kinds", "mtp", "--polydraft-time-limit", "5"),
        *("-k", "test_generates or test_drafts_are_made"),
        backend=defective(stepping.Hanging),
    )
    rows = [row for row in run.report.rows if row.status == "fail"]
    assert {row.check for row in rows} == {"test_generates"}
    assert all("time limit of 5 s" in row.reason for row in rows), rows
    assert all(row.seconds < 20 for row in run.report.rows)


OUTPUT_CHANGED = (
    "verification skipped",
    "a stale row after rollback",
    "KV corrupted past the window",
    "seed ignored",
    "weights perturbed while speculating",
    "weights perturbed in low precision",
    "whole: verification skipped",
    "whole: bonus token dropped",
)


@pytest.mark.parametrize("name", OUTPUT_CHANGED)
def test_polydraft_verify_gives_the_same_verdict(name):
    """Defects that change the output are no near ties for the command line either."""
    host = PluginHost({"tested": PluginOf(DEFECTS[name].backend(), name="reference")})
    found = verify("builtin:toy", backend="reference", host=host, keep=False)
    assert (found.verdict, found.passes) == ("DIVERGED", False)
    assert all(case.judgement.reason for case in found.cases if case.judgement.verdict == "DIVERGED")


def test_polydraft_verify_passes_low_precision_with_near_ties():
    backend = defective(stepping.LowPrecision, **stepping.LOW_PRECISION)
    host = PluginHost({"tested": PluginOf(backend, name="reference")})
    found = verify("builtin:toy", backend="reference", host=host, keep=False)
    assert (found.verdict, found.passes, found.count("DIVERGED")) == ("NEAR_TIE", True, 0)
