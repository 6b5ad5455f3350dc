"""The proof on made-up tokens whose probabilities are known."""

import random
from dataclasses import replace

import numpy as np
import pytest
from polydraft.contract import GenerationSettings, TokenLogprobs
from polydraft_conformance.oracle import OnTheEdgeError, next_token
from polydraft_conformance.settings_proof import Choice, Evidence, Trial, judge_by_rule, judge_logprobs, place

TARGET = [0.652, 0.176, 0.1, 0.05, 0.022]
LOGITS = np.log(np.array(TARGET))
DRAWN = GenerationSettings(temperature=1.0)


def trial(tokens, settings=DRAWN, *, k=4, logits=LOGITS, seed=0):
    """Tokens in rounds of k+1, all drafts accepted."""
    choices = [
        Choice(token, tuple(tokens[:index]), logits, row := index % (k + 1), is_last=row == k)
        for index, token in enumerate(tokens)
    ]
    return Trial(settings, (1, 2), choices, frozenset(), 1e-4, seed)


def evidence_of(tokens, settings=DRAWN, *, length=100, **changes):
    evidence = Evidence(random.Random("inside"))
    for start in range(0, len(tokens), length):
        evidence.add(trial(tokens[start : start + length], settings, **changes))
        if evidence.problem:
            break
    return evidence


def drawn(weights, count, seed):
    return random.Random(seed).choices(range(len(weights)), weights, k=count)


@pytest.mark.parametrize("seed", range(6))
def test_honest_samples_pass(seed):
    assert not evidence_of(drawn(TARGET, 600, seed)).problem


@pytest.mark.parametrize("seed", range(2))
def test_noise_that_comes_again_in_every_round(seed):
    """That of bonus rows only, and in each output another one, so that no token is too frequent."""
    source, tokens = np.random.default_rng(seed), []
    for number in range(12):
        again = (seed + 0.9 + 0.618 * number) % 1.0
        noise = [again if index % 5 == 4 else source.random() for index in range(100)]
        tokens += [int(np.searchsorted(np.cumsum(TARGET), each)) for each in noise]
    problem = evidence_of(tokens).problem
    assert problem.startswith("the noise is the same in every round of an output")
    assert "in the bonus row" in problem.splitlines()[0]


def test_bets_that_are_won_by_chance_are_as_rare_as_promised():
    """An honest sampler gets a bet to e**3 in at most one of e**3 runs, each of its bets."""
    runs = [evidence_of(drawn(TARGET, 100, seed)).bets for seed in range(30)]
    for bet in runs[0]:
        assert sum(run[bet] >= 3 for run in runs) <= 9  # 1.5 are expected at most: a chance below 1e-4


@pytest.mark.parametrize("seed", range(2))
def test_a_bias_like_upstream_s_is_caught_soon(seed):
    """A token of probability 0.652 that comes out always in drafted rows."""
    tokens = [0 if index % 5 else token for index, token in enumerate(drawn(TARGET, 900, seed))]
    evidence = evidence_of(tokens)
    assert "the temperature is ignored: tokens are chosen greedily, in drafted rows" in evidence.problem
    assert len(evidence.judged) < 300


@pytest.mark.parametrize("shift", [0.1, -0.1])
def test_a_bias_of_a_tenth_is_caught_by_a_full_run(shift):
    best = TARGET[0] + shift
    weights = [best, *(share * (1 - best) / (1 - TARGET[0]) for share in TARGET[1:])]
    assert evidence_of(drawn(weights, 4000, 5)).problem


def test_a_dependence_between_tokens_is_caught():
    """Each token alone is right: only what follows what shows it."""
    tokens = [token for token in drawn([0.5, 0.5], 600, 3) for _ in range(2)]
    found = evidence_of(tokens, logits=np.log(np.array([0.5, 0.5]))).problem
    assert found.startswith("neighbouring tokens are not drawn independently")


def test_a_token_that_the_settings_exclude():
    settings = GenerationSettings(temperature=1.0, top_k=2)
    found = evidence_of([0, 1, 0, 3, 0, 1, 4, 0], settings).problem
    assert found.startswith("`top_k` is ignored, in drafted rows: 2 of 8 tokens are wrong")


def test_evidence_is_pooled():
    """What shows a little under each of several settings."""
    pool = Evidence(random.Random("inside"))
    problems = []
    for seed in range(12):
        settings = GenerationSettings(temperature=1.5 + seed / 10)
        evidence = Evidence(random.Random(f"inside {seed}"), pool)
        evidence.add(trial(drawn(TARGET, 60, seed), settings))
        problems.append(evidence.problem)
    assert not problems[0]
    assert problems[-1].startswith("a temperature above 1 is taken as 1")


def test_the_rule_is_calculated_again():
    from polydraft.sampling.noise import row_keys
    from polydraft.sampling.numpy_ops import NumpyOps

    def choose(position, seed=7):
        low, high = row_keys(seed, 0, range(position, position + 1))
        noise = NumpyOps().gumbel(np.arange(5)[None], np.array([low]), np.array([high]))[0]
        return int((LOGITS + noise).argmax())

    right = [choose(2 + index) for index in range(40)]
    assert judge_by_rule([trial(right, seed=7)]) == (40, "")
    late = [choose(2 + index - (index % 5 > 0)) for index in range(40)]
    assert "the noise is that of the position before, in drafted rows" in judge_by_rule([trial(late, seed=7)])[1]


def test_tokens_at_an_edge_are_not_judged():
    settings = GenerationSettings(temperature=1.0, top_p=0.652 + 1e-6)
    with pytest.raises(OnTheEdgeError):
        next_token(LOGITS, settings, (), (), slack=1e-4)
    assert np.count_nonzero(next_token(LOGITS, settings, (), ())) == 2
    assert not evidence_of([4, 4, 4], settings).judged


def test_places_fill_the_unit_interval():
    shares = np.array(TARGET)
    for token, edge in enumerate([0.0, 0.652, 0.828, 0.928, 0.978]):
        assert place(shares, token, 0.0) == pytest.approx(edge)
        assert place(shares, token, 0.999) < edge + TARGET[token]


def test_logprobs_that_are_not_raw():
    settings = GenerationSettings(temperature=0.5, logprobs=0)
    random_ = np.random.default_rng(1)
    rows = random_.standard_normal((10, 5))
    tokens = [int(row.argmax()) for row in rows]
    choices = [Choice(token, tuple(tokens[:i]), rows[i], i % 5) for i, token in enumerate(tokens)]
    made = Trial(settings, (1,), choices, frozenset(), 1e-4)

    def entries(changed):
        logprobs = changed - np.log(np.exp(changed).sum(axis=-1, keepdims=True))
        return [TokenLogprobs(token_id=t, logprob=float(row[t])) for t, row in zip(tokens, logprobs, strict=True)]

    assert not judge_logprobs(made, entries(rows), 1e-3)
    asked = replace(made, settings=GenerationSettings(temperature=0.5, logprobs=2))
    assert judge_logprobs(asked, entries(rows), 1e-3).startswith("the best tokens are not all listed: 0 instead of 2")
    assert judge_logprobs(made, entries(rows / 0.5), 1e-3).startswith("log-probabilities are taken after the temperat")
    late = judge_logprobs(made, entries(np.concatenate([rows[:1], rows[:-1]])), 1e-3)
    assert late.startswith("log-probabilities are shifted by one: they are those of the token before")
