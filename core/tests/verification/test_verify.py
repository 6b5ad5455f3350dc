"""The check on real sessions of the reference engine, sound and broken, and on a whole engine."""

import importlib
import sys
import time
from pathlib import Path

import numpy as np
import polydraft
import pytest
from defects import Compiling, NearlyTied, Silent, Slow, Unverified, WrongBlocks, WrongBlocksInLowPrecision
from polydraft.contract import OffReason
from polydraft.errors import EngineError, InvalidRequestError, NonFiniteLogitsError, SpeculationUnavailableError
from polydraft.verification import _run as run
from polydraft.verification import difference
from polydraft.verification._command import verify

EXAMPLE = Path(__file__).parents[3] / "examples/third_party_plugin/src"
TOY = {"backend": "reference"}


def test_a_sound_engine_is_exact_greedy_and_sampled_and_past_the_window():
    told = []
    found = verify("builtin:toy", progress=told.append, **TOY)
    assert found.verdict == "EXACT"
    assert found.passes
    assert found.cases == tuple(told)
    assert found.num_tokens == sum(case.num_tokens for case in found.cases) > 400
    prompts = {case.prompt for case in found.cases}
    assert {"a chat", "code", "past the sliding window", "across the sliding window's edge"} <= prompts
    assert {bool(case.sampling) for case in found.cases} == {True, False}
    # The window of the toy is 16 tokens.
    assert max(case.num_prompt_tokens for case in found.cases) > 32
    assert 0 < found.stats.num_accepted_tokens < found.stats.num_draft_tokens
    assert found.stats.num_accepted_tokens == sum(found.stats.accepted_per_position)
    assert found.speed_up > 0


@pytest.mark.parametrize("drafter", ["builtin:toy-draft", "ngram"])
def test_every_drafter_kind(drafter):
    assert (
        verify("builtin:toy", drafter=drafter, num_speculative_tokens=2, keep=False, time_limit=2, **TOY).verdict
        == "EXACT"
    )


def test_a_defect_is_found_and_its_evidence_kept(broken):
    broken(Unverified)
    found = verify("builtin:toy", **TOY)
    assert found.verdict == "DIVERGED"
    assert not found.passes
    judgement = next(case.judgement for case in found.cases if case.judgement.verdict == "DIVERGED")
    assert judgement.tokens[0] != judgement.tokens[1]
    assert judgement.reason
    assert found.count("DIVERGED") == 3  # enough


def test_a_tie_that_flips_without_a_drafter_too_is_a_near_tie(broken):
    broken(NearlyTied)
    found = verify("builtin:toy", keep=False, **TOY)
    assert found.verdict == "NEAR_TIE"
    assert found.passes
    tie = next(case.judgement.tie for case in found.cases if case.judgement.verdict == "NEAR_TIE")
    assert abs(tie.margin) <= 2 * tie.noise


def test_the_control_knows_the_rounds_of_the_output(monkeypatch):
    given = []

    def judged(*arguments, rounds):
        given.append((arguments[-1], rounds))
        return run_judge(*arguments, rounds=rounds)

    run_judge = run.judge_outputs
    monkeypatch.setattr(run, "judge_outputs", judged)
    verify("builtin:toy", keep=False, **TOY)
    assert all(sum(rounds) == len(found) and rounds[0] == 1 for found, rounds in given)
    assert max(max(rounds) for _, rounds in given) > 1


@pytest.mark.parametrize("defect", [WrongBlocks, WrongBlocksInLowPrecision])
def test_wrong_blocks_do_not_excuse_themselves(broken, defect):
    """The control without a drafter flips as well, and the "noise" is large: rounding does not explain it."""
    broken(defect)
    found = verify("builtin:toy", keep=False, **TOY)
    assert found.verdict == "DIVERGED"
    reasons = [case.judgement.reason for case in found.cases if case.judgement.verdict == "DIVERGED"]
    assert all("positions or masks within a step are wrong" in reason for reason in reasons)


def test_a_sound_bitwise_session():
    found = verify("builtin:toy", exactness="bitwise", time_limit=2, keep=False, **TOY)
    assert (found.verdict, found.passes) == ("EXACT", True)


@pytest.mark.filterwarnings("ignore:.*has drafted nothing")
def test_without_drafts_nothing_is_verified(broken, data_home):
    broken(Silent)
    with pytest.raises(SpeculationUnavailableError, match="No draft was made"):
        verify("builtin:toy", time_limit=1, **TOY)
    with pytest.raises(SpeculationUnavailableError, match="nothing to verify"):
        verify("builtin:toy", drafter=None, **TOY)
    assert not data_home.exists()


def test_the_time_limit_holds(broken):
    broken(Slow)
    started = time.monotonic()
    found = verify("builtin:toy", time_limit=4, keep=False, **TOY)
    assert time.monotonic() - started < 9
    assert found.seconds < 6
    assert found.cases
    assert all(case.num_tokens < 64 for case in found.cases)


def test_one_time_work_is_not_timed(broken, monkeypatch):
    """Timed, it would leave 43 tokens a second."""
    monkeypatch.setattr(run, "_NEW_TOKENS", 32)
    broken(Compiling)
    Compiling.compiled.clear()
    found = verify("builtin:toy", prompts=["def count"], keep=False, **TOY)
    assert len(Compiling.compiled) >= 31
    assert found.plain_tokens_per_second > 60
    assert found.speculative_tokens_per_second > 60


def test_more_time_means_more_prompts(monkeypatch):
    monkeypatch.setattr(run, "_NEW_TOKENS", 12)
    found = verify("builtin:toy", time_limit=4, keep=False, **TOY)
    assert len(found.cases) > 12
    assert len({(case.prompt, *case.sampling.values()) for case in found.cases}) > 12


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), 1e99])
def test_a_time_limit_that_is_no_time(seconds):
    with pytest.raises(InvalidRequestError, match="time_limit"):
        verify("builtin:toy", time_limit=seconds, **TOY)


def test_too_short_a_time_is_an_error(broken):
    broken(Slow)
    with pytest.raises(InvalidRequestError, match="too few"):
        verify("builtin:toy", time_limit=0.05, **TOY)


@pytest.fixture
def example(monkeypatch):
    """The plugins of this environment's toys and of the example, which is a whole engine too."""
    if not EXAMPLE.is_dir():
        pytest.skip("the example is in the repository, not in the distribution")
    monkeypatch.syspath_prepend(str(EXAMPLE))
    for name in [name for name in sys.modules if name.startswith("polydraft_markov")]:
        monkeypatch.delitem(sys.modules, name)
    return polydraft.PluginHost({"markov": importlib.import_module("polydraft_markov.plugin")})


def test_a_whole_engine(example):
    found = verify("builtin:markov", backend="markov-whole", host=example, keep=False)
    assert found.verdict == "EXACT"
    assert any(case.sampling for case in found.cases)


def test_a_whole_engine_without_log_probabilities_has_no_near_ties(example, monkeypatch):
    whole = importlib.import_module("polydraft_markov.whole")
    sound = whole.generate

    def broken(target, drafter, prompt, k, limit, choose):
        for output in sound(target, drafter, prompt, k, limit, choose):
            if output.drafted:
                output.tokens[-1] = 65
            yield output

    monkeypatch.setattr(whole, "generate", broken)
    found = verify("builtin:markov", backend="markov-whole", host=example, keep=False)
    assert found.verdict == "DIVERGED"
    assert "neither logits nor log-probabilities" in next(
        case.judgement.reason for case in found.cases if case.judgement.reason
    )


def test_a_whole_engine_whose_log_probabilities_are_nan_is_not_verified(example, monkeypatch, data_home):
    """They are asked for as evidence; the same tokens come out both ways."""
    from polydraft.contract import TokenLogprobs

    backend = importlib.import_module("polydraft_markov.whole")
    [whole] = [one for one in vars(backend).values() if isinstance(one, type) and "capabilities" in vars(one)]
    claimed = whole.capabilities

    def capabilities(self):
        own = claimed(self)
        return own.model_copy(update={"sampling": own.sampling | {"logprobs"}})

    def rounds(self, generation):
        while generation.finish_reason is None and not generation.cancelled():
            entry = TokenLogprobs(token_id=0, logprob=float("nan"))
            yield generation.emit([0], num_draft_tokens=0, num_accepted_tokens=0, logprobs=[entry])

    monkeypatch.setattr(whole, "capabilities", capabilities)
    monkeypatch.setattr(backend.MarkovLoop, "rounds", rounds)
    with pytest.raises(NonFiniteLogitsError, match="not finite"):
        verify("builtin:markov", backend="markov-whole", host=example)
    assert not data_home.exists()


def test_an_engine_that_does_not_draft_with_log_probabilities_is_verified_without(example, monkeypatch):
    backend = importlib.import_module("polydraft_markov.whole")
    [whole] = [one for one in vars(backend).values() if isinstance(one, type) and "capabilities" in vars(one)]
    claimed = whole.capabilities

    def capabilities(self):
        own = claimed(self)
        return own.model_copy(update={"sampling": own.sampling | {"logprobs"}})

    def conflict(self, settings):
        return None if settings.logprobs is None else OffReason(code="settings", message="Not both.")

    monkeypatch.setattr(whole, "capabilities", capabilities)
    monkeypatch.setattr(backend.MarkovLoop, "speculation_conflict", conflict)
    found = verify("builtin:markov", backend="markov-whole", host=example, keep=False)
    assert found.verdict == "EXACT"
    assert not any("log-probability was asked for" in note for note in found.notes)


def test_one_token_over_and_over_is_no_evidence(example, monkeypatch, data_home):
    def rounds(self, generation):
        while generation.finish_reason is None and not generation.cancelled():
            yield generation.emit([0], num_draft_tokens=1, num_accepted_tokens=0)

    monkeypatch.setattr(importlib.import_module("polydraft_markov.whole").MarkovLoop, "rounds", rounds)
    with pytest.raises(EngineError, match="token 0 over and over"):
        verify("builtin:markov", backend="markov-whole", host=example)
    assert not data_home.exists()


def test_nan_differs_from_everything():
    row = np.array([1.0, np.nan], np.float32)
    assert difference(row, row) == np.inf
    assert difference(np.array([1.0, -np.inf]), np.array([1.0, -np.inf])) == 0.0
