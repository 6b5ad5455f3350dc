"""The suite catches defective backends: each fails exactly the check that names its defect, and says what it is."""

import pytest
from defective_backends import core, engines, whole
from defective_backends.making import PluginOf, defective
from polydraft import PluginHost
from polydraft.verification._command import verify

LOW_PRECISION = {"dtype": "bfloat16", "exactness": frozenset({"standard"})}

STEPPING = {
    "verification skipped": (
        defective(engines.Unverified),
        "test_greedy_equals_plain",
        "Speculation changed the greedy output",
    ),
    "k is off by one": (defective(engines.OneDraftTooFew), "test_rounds_draft_k_tokens", "k is off"),
    "a stale row after rollback": (
        defective(engines.StaleRow),
        "test_rollback_is_exact",
        "rows are left that were rolled back",
    ),
    "KV corrupted past the window": (
        defective(engines.WindowCorrupted),
        "test_steps_equal_prefill",
        "after plain steps to a context of",
    ),
    "drafter off": (defective(engines.Silent), "test_drafts_are_made", "The drafter is silent"),
    "temperature ignored": (
        defective(engines.TemperatureIgnored),
        "test_temperature_changes_the_output",
        "The temperature is ignored",
    ),
    "seed ignored": (defective(engines.SeedIgnored), "test_seed_decides_the_output", "The seed is ignored"),
    "no draft is right": (defective(engines.AlwaysWrong), "test_drafts_are_accepted", "Acceptance is 0"),
    "it raises": (defective(engines.Raising), "test_generates", "ValueError: no more"),
    "weights perturbed while speculating": (
        defective(engines.PerturbedWhileSpeculating),
        "test_greedy_equals_plain",
        "DIVERGED",
    ),
    "weights perturbed in low precision": (
        defective(engines.LowPrecisionPerturbed, **LOW_PRECISION),
        "test_greedy_equals_plain",
        "DIVERGED",
    ),
    "other bits, bitwise claimed": (
        defective(engines.OtherBits),
        "test_bitwise_output_equals_plain",
        "`exactness='bitwise'` does not hold on cpu in float32",
    ),
    "other bits later, bitwise claimed": (
        defective(engines.OtherBitsLater),
        "test_bitwise_logits_equal_plain",
        "Bitwise exactness is broken in float32",
    ),
}
CLAIMS = {
    "seed_identical": False,
    "exposes_logits": False,
    "exactness": frozenset({"standard"}),
    "sampling": frozenset({"temperature", "seed", "logprobs"}),
}
WHOLE = {
    "verification skipped": (
        whole.WholeUnverified,
        "test_greedy_equals_plain",
        "Speculation changed the greedy output",
    ),
    "bonus token dropped": (whole.BonusDropped, "test_rounds_end_with_a_bonus_token", "The bonus token is missing"),
    "sampling biased": (whole.Biased, "test_samples_follow_the_distribution", "Sampling is biased while speculating"),
    "statistics made up": (whole.WholeStatisticsMadeUp, "test_statistics_equal_counts", "Statistics are wrong"),
    "drafter off": (whole.WholeSilent, "test_drafts_are_made", "The drafter is silent"),
}


def assert_caught(run, check, cause):
    assert run.exit_code == 1
    assert run.rows("fail") == {check}, {row.check: row.reason for row in run.report.rows if row.status == "fail"}
    reasons = [row.reason for row in run.report.rows if row.status == "fail"]
    assert all(cause in reason.splitlines()[0] for reason in reasons), reasons


@pytest.mark.parametrize("defect", STEPPING)
def test_a_stepping_engine_with_a_defect(conformance, defect):
    backend, check, cause = STEPPING[defect]
    assert_caught(conformance("--polydraft-kinds", "mtp", backend=backend), check, cause)


CORE = {
    "stop string missed inside a draft": (
        core.stop_strings_missed,
        "test_stop_string_inside_a_draft",
        "was missed inside a draft",
    ),
    "statistics made up": (core.statistics_made_up, "test_statistics_equal_counts", "Statistics are wrong"),
}


@pytest.mark.parametrize("defect", CORE)
def test_a_defect_of_the_core(conformance, monkeypatch, defect):
    """What a stepping backend cannot break is checked, too."""
    put, check, cause = CORE[defect]
    put(monkeypatch)
    assert_caught(conformance("--polydraft-kinds", "mtp"), check, cause)


@pytest.mark.parametrize("defect", WHOLE)
def test_a_whole_engine_with_a_defect(conformance, defect):
    engine, check, cause = WHOLE[defect]
    claims = dict(CLAIMS)
    if check != "test_samples_follow_the_distribution":
        claims["sampling"] -= {"logprobs"}  # where they are claimed, hundreds of samples are drawn
    assert_caught(conformance("--polydraft-kinds", "mtp", backend=defective(whole=engine, **claims)), check, cause)


def test_an_honest_whole_engine_passes(conformance):
    run = conformance("--polydraft-kinds", "mtp", backend=defective(whole=whole.Whole, **CLAIMS))
    assert run.exit_code == 0, {row.check: row.reason for row in run.report.rows if row.status == "fail"}


def test_low_precision_passes_with_near_ties(conformance):
    """Rounding is not a defect: what it flips is a near tie, counted apart."""
    backend = defective(engines.LowPrecision, **LOW_PRECISION)
    run = conformance("--polydraft-kinds", "mtp", backend=backend)
    assert run.exit_code == 0, {row.check: row.reason for row in run.report.rows if row.status == "fail"}
    verdicts = run.report.verdicts()
    assert verdicts["NEAR_TIE"] > 0
    assert verdicts["DIVERGED"] == 0


def test_near_ties_that_are_sought_out(conformance):
    """Each is a near tie; their number is the defect. Only a full run sees enough tokens."""
    backend = defective(engines.TieSeeker, **LOW_PRECISION)
    run = conformance(*("--polydraft-kinds", "mtp", "-k", "near_ties"), backend=backend, quick=False)
    assert_caught(run, "test_near_ties_as_rare_as_in_control", "Near ties are too frequent")
    assert run.report.verdicts()["DIVERGED"] == 0


def test_an_engine_that_hangs(conformance):
    """It costs its own rows only."""
    run = conformance(
        *("--polydraft-kinds", "mtp", "--polydraft-time-limit", "5"),
        *("-k", "test_generates or test_drafts_are_made"),
        backend=defective(engines.Hanging),
    )
    failed = [row for row in run.report.rows if row.status == "fail"]
    assert {row.check for row in failed} == {"test_generates"}
    assert all("time limit of 5 s" in row.reason for row in failed), failed
    assert all(row.seconds < 20 for row in run.report.rows)


OUTPUT_CHANGED = {
    "verification skipped": STEPPING["verification skipped"][0],
    "a stale row after rollback": STEPPING["a stale row after rollback"][0],
    "KV corrupted past the window": STEPPING["KV corrupted past the window"][0],
    "seed ignored": STEPPING["seed ignored"][0],
    "weights perturbed while speculating": STEPPING["weights perturbed while speculating"][0],
    "weights perturbed in low precision": STEPPING["weights perturbed in low precision"][0],
    "a whole engine: verification skipped": defective(whole=whole.WholeUnverified, **CLAIMS),
    "a whole engine: bonus token dropped": defective(whole=whole.BonusDropped, **CLAIMS),
}


@pytest.mark.parametrize("defect", OUTPUT_CHANGED)
def test_polydraft_verify_gives_the_same_verdict(defect):
    """Defects that change the output are no near ties for the command line either."""
    host = PluginHost({"tested": PluginOf(OUTPUT_CHANGED[defect], name="reference")})
    found = verify("builtin:toy", backend="reference", host=host, keep=False)
    assert (found.verdict, found.passes) == ("DIVERGED", False)
    assert all(case.judgement.reason for case in found.cases if case.judgement.verdict == "DIVERGED")


def test_polydraft_verify_passes_low_precision_with_near_ties():
    backend = defective(engines.LowPrecision, **LOW_PRECISION)
    host = PluginHost({"tested": PluginOf(backend, name="reference")})
    found = verify("builtin:toy", backend="reference", host=host, keep=False)
    assert (found.verdict, found.passes, found.count("DIVERGED")) == ("NEAR_TIE", True, 0)
