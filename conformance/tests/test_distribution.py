"""The statistical proof on made-up draws whose distribution is known."""

import math
import random

import pytest
from polydraft.contract import TokenLogprobs
from polydraft_conformance.control import chance_of_at_least
from polydraft_conformance.distribution import (
    ALPHA,
    DRAWS,
    QUICK_DRAWS,
    SUITE_FALSE_ALARM,
    TESTS,
    freedman,
    g_statistic,
    judge_draws,
    p_value,
    uniform_place,
)

TARGET = [0.652, 0.176, 0.1, 0.05, 0.022]


def draws(count, weights, *, seed, k=4):
    """Generations whose tokens follow ``weights``, and which are said to follow TARGET."""
    source = random.Random(seed)
    top = tuple((token, math.log(share)) for token, share in enumerate(TARGET[:4]))
    made = []
    for _ in range(count):
        tokens = source.choices(range(len(TARGET)), weights, k=k + 2)
        made.append([TokenLogprobs(token_id=t, logprob=math.log(TARGET[t]), top=top) for t in tokens])
    return made


def test_level():
    assert SUITE_FALSE_ALARM <= 1e-4
    assert pytest.approx(SUITE_FALSE_ALARM) == 2 * TESTS * ALPHA
    # Tables of the chi-square distribution.
    assert p_value(15.507) == pytest.approx(0.05, rel=1e-3)
    assert p_value(26.124) == pytest.approx(0.001, rel=1e-3)
    assert p_value(7.824, degrees=4) == pytest.approx(0.0982, rel=1e-2)
    assert p_value(0.0) == 1.0
    assert g_statistic([10, 10, 10]) == 0.0
    assert g_statistic([0, 20, 10]) == pytest.approx(2 * 20 * math.log(2))


def test_places_are_uniform():
    """The intervals of the tokens fill [0, 1), the others behind the best ones included."""
    (entries,) = draws(1, [1, 0, 0, 0, 0], seed=1, k=0)
    top = entries[0].top
    edges = [0.0, 0.652, 0.828, 0.928, 0.978, 1.0]
    for token in range(5):
        entry = TokenLogprobs(token_id=token, logprob=math.log(TARGET[token]), top=top)
        assert uniform_place(entry, 0.0) == pytest.approx(edges[token])
        assert uniform_place(entry, 0.5) == pytest.approx((edges[token] + edges[token + 1]) / 2)
        assert uniform_place(entry, 0.999999) < edges[token + 1]


@pytest.mark.parametrize("seed", range(20))
def test_honest_draws_pass(seed):
    proof = judge_draws(draws(QUICK_DRAWS, TARGET, seed=seed))
    assert not proof.biased, proof.in_words()
    assert len(proof.tables) == 4
    assert all(sum(table.counts) == QUICK_DRAWS for table in proof.tables)


@pytest.mark.parametrize("seed", range(5))
def test_a_bias_like_upstream_s_is_caught_every_time(seed):
    """A token of probability 0.652 that comes out always, one of 0.176 never."""
    assert judge_draws(draws(QUICK_DRAWS, [1, 0, 0, 0, 0], seed=seed)).biased


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shift", [0.1, -0.1])
def test_a_bias_of_a_tenth_is_caught_by_a_full_run(seed, shift):
    best = TARGET[0] + shift
    weights = [best, *(share * (1 - best) / (1 - TARGET[0]) for share in TARGET[1:])]
    assert judge_draws(draws(DRAWS, weights, seed=seed)).biased


def test_a_dependence_between_tokens_is_caught():
    """Each token alone is right: only the joint distribution shows it."""
    made = draws(QUICK_DRAWS, TARGET, seed=3)
    for draw in made:
        draw[3] = draw[2]
    proof = judge_draws(made)
    assert proof.biased
    assert proof.worst.first == 3


def test_bounds():
    assert freedman(0.0, 1.0) == 1.0
    assert freedman(1000.0, 100.0) < 1e-100
    # An exact binomial tail, twice: P(|X - 500| >= 80), n = 1000, p = 0.5, is 4e-7.
    assert 4e-7 < freedman(80.0, 250.0) < 2e-5


def test_poisson_binomial():
    assert chance_of_at_least(0, []) == 1.0
    assert chance_of_at_least(1, [0.0, 0.0]) == 0.0
    assert chance_of_at_least(2, [0.5, 0.5]) == pytest.approx(0.25)
    assert chance_of_at_least(1, [0.2, 0.5, 1.0]) == pytest.approx(1.0)
    assert chance_of_at_least(2, [0.2, 0.5, 0.1]) == pytest.approx(0.2 * 0.5 + 0.2 * 0.1 + 0.5 * 0.1 - 2 * 0.01)
