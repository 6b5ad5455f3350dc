"""A suite that catches liars: each defect fails exactly the check that names it, and says what it is."""

import pytest
from conformance_liars import engines, sessions, whole
from conformance_liars.making import liar

STEPPING = {
    "verification skipped": (
        liar(engines.Unverified),
        "test_greedy_equals_plain",
        "Speculation changed the greedy output",
    ),
    "k is off by one": (liar(engines.OneDraftTooFew), "test_rounds_draft_k_tokens", "k is off"),
    "a stale row after rollback": (
        liar(engines.StaleRow),
        "test_rollback_is_exact",
        "rows are left that were rolled back",
    ),
    "KV corrupted past the window": (
        liar(engines.WindowCorrupted),
        "test_steps_equal_prefill",
        "after plain steps to a context of",
    ),
    "stop string missed inside a draft": (
        liar(session=sessions.StopStringMissed),
        "test_stop_string_inside_a_draft",
        "was missed inside a draft",
    ),
    "statistics made up": (
        liar(session=sessions.StatisticsMadeUp),
        "test_statistics_equal_counts",
        "Statistics are wrong",
    ),
    "drafter off": (liar(engines.Silent), "test_drafts_are_made", "The drafter is silent"),
    "temperature ignored": (
        liar(session=sessions.TemperatureIgnored),
        "test_temperature_changes_the_output",
        "The temperature is ignored",
    ),
    "seed ignored": (liar(session=sessions.SeedIgnored), "test_seed_decides_the_output", "The seed is ignored"),
    "no draft is right": (liar(engines.AlwaysWrong), "test_drafts_are_accepted", "Acceptance is 0"),
    "it raises": (liar(engines.Raising), "test_generates", "ValueError: no more"),
    "weights perturbed while speculating": (
        liar(engines.PerturbedWhileSpeculating),
        "test_greedy_equals_plain",
        "DIVERGED",
    ),
    "weights perturbed in low precision": (
        liar(engines.LowPrecisionPerturbed, engine=engines.LowPrecisionEngine, exactness=frozenset({"standard"})),
        "test_greedy_equals_plain",
        "DIVERGED",
    ),
    "other bits, bitwise claimed": (
        liar(engines.OtherBits),
        "test_bitwise_output_equals_plain",
        "exactness='bitwise' does not hold on cpu in float32",
    ),
    "other bits later, bitwise claimed": (
        liar(engines.OtherBitsLater),
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


@pytest.mark.parametrize("defect", WHOLE)
def test_a_whole_engine_with_a_defect(conformance, defect):
    session, check, cause = WHOLE[defect]
    claims = dict(CLAIMS)
    if check != "test_samples_follow_the_distribution":
        claims["sampling"] -= {"logprobs"}  # where they are claimed, hundreds of samples are drawn
    assert_caught(conformance("--polydraft-kinds", "mtp", backend=liar(session=session, **claims)), check, cause)


def test_an_honest_whole_engine_passes(conformance):
    run = conformance("--polydraft-kinds", "mtp", backend=liar(session=whole.Whole, **CLAIMS))
    assert run.exit_code == 0, {row.check: row.reason for row in run.report.rows if row.status == "fail"}


def test_low_precision_passes_with_near_ties(conformance):
    """Rounding is no defect: what it turns is a near tie, counted apart."""
    backend = liar(engines.LowPrecision, engine=engines.LowPrecisionEngine, exactness=frozenset({"standard"}))
    run = conformance("--polydraft-kinds", "mtp", backend=backend)
    assert run.exit_code == 0, {row.check: row.reason for row in run.report.rows if row.status == "fail"}
    verdicts = run.report.verdicts()
    assert verdicts["NEAR_TIE"] > 0
    assert verdicts["DIVERGED"] == 0


def test_near_ties_that_are_sought_out(conformance):
    """Each is a near tie; that there are so many is the defect. Only a full run sees enough tokens."""
    backend = liar(engines.TieSeeker, engine=engines.LowPrecisionEngine, exactness=frozenset({"standard"}))
    run = conformance(*("--polydraft-kinds", "mtp", "-k", "near_ties"), backend=backend, quick=False)
    assert_caught(run, "test_near_ties_as_rare_as_in_control", "Near ties are too frequent")
    assert run.report.verdicts()["DIVERGED"] == 0


def test_an_engine_that_hangs(conformance):
    """It costs its own rows only."""
    run = conformance(
        *("--polydraft-kinds", "mtp", "--polydraft-time-limit", "5"),
        *("-k", "test_generates or test_drafts_are_made"),
        backend=liar(engines.Hanging),
    )
    failed = [row for row in run.report.rows if row.status == "fail"]
    assert {row.check for row in failed} == {"test_generates"}
    assert all("time limit of 5 s" in row.reason for row in failed), failed
    assert all(row.seconds < 20 for row in run.report.rows)
