"""The rule against its definition: noise for every token, everything sorted, nothing preselected."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polydraft.contract import GenerationSettings
from polydraft.sampling._host import choose_on_host, kept_on_host
from polydraft.sampling.noise import exp_nonpositive, gumbel, row_keys
from polydraft.sampling.numpy_ops import NumpyOps
from polydraft.sampling.rule import REACH, choose_tokens, token_weights

OPS = NumpyOps()


def scores(logits, seed, stream, position):
    """Logits plus noise of every token of one row."""
    low, high = row_keys(seed, stream, range(position, position + 1))
    ids = np.arange(len(logits), dtype=np.int64)[None]
    return logits + gumbel(OPS, ids, (OPS.column(low, ids), OPS.column(high, ids)))[0]


def by_definition(logits, settings, seed, stream, position):
    """The choice for one row, and the tokens that the filters leave."""
    row = logits.astype(np.float32)
    if settings.temperature == 0:
        return int(np.flatnonzero(row == row.max())[0]), None
    row = row * np.float32(1 / settings.temperature)
    order = np.lexsort((np.arange(len(row)), -row))  # the largest first, and of equal ones the lower id
    if settings.top_k:
        order = order[: settings.top_k]
    if settings.top_p < 1:
        shares = exp_nonpositive(OPS, row[order] - row.max())
        order = order[first_of(np.floor(shares * np.float32(2**24)), settings.top_p)]
    if settings.min_p:
        order = order[row[order] >= row.max() + np.float32(math.log(settings.min_p))]
    if settings.typical_p < 1:
        order = typical(row, order, settings.typical_p)
    noisy = scores(row, seed, stream, position)
    return int(order[noisy[order] == noisy[order].max()].min()), set(order.tolist())


def first_of(weights, share):
    """Which of the weights, in their order, come before the share is reached."""
    weights = weights.astype(np.int64)
    before = np.cumsum(weights) - weights
    return before * 2**20 < weights.sum() * math.ceil(share * 2**20)


def typical(row, order, share):
    """The tokens that locally typical sampling keeps, in fixed point as the rule's docstring defines it."""
    order = order[row[order] >= row.max() - np.float32(REACH)]
    weights = token_weights(OPS, row[order], row.max()).astype(np.int64)
    below = np.floor((row.max() - row[order]) * np.float32(2**12)).astype(np.int64)
    mean = (weights * below).sum() // weights.sum()
    nearest = np.lexsort((order, np.abs(below - mean)))
    return order[nearest][first_of(weights[nearest], share)]


def choose(logits, settings, seed=0, stream=0, position=0):
    """The choices; host and device code must agree on them."""
    found = choose_on_host(OPS.host_view(logits), settings, seed, stream, position).tolist()
    assert found == choose_tokens(OPS, logits, settings, seed, stream, position).tolist()
    return found


filters = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 1e-3, 0.3, 1.0, 2.5, 50.0])},
    optional={
        "top_k": st.sampled_from([1, 2, 7, 40, 999, 5000]),
        "top_p": st.sampled_from([1e-6, 0.3, 0.9, 0.999, 1 - 1e-9]),
        "min_p": st.sampled_from([1e-4, 0.05, 0.5, 1.0]),
        "typical_p": st.sampled_from([1e-6, 0.2, 0.9, 1 - 1e-9]),
    },
)


@st.composite
def rows_of_logits(draw):
    """Peaked, flat, tied, shifted and masked rows, small and large vocabularies."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    vocabulary = draw(st.sampled_from([1, 2, 50, 700, 6000]))
    logits = generator.normal(size=(draw(st.integers(1, 4)), vocabulary)) * draw(st.sampled_from([0.0, 0.5, 4.0, 30.0]))
    if draw(st.booleans()):
        logits = np.round(logits)  # ties, and -0.0
    logits += draw(st.sampled_from([0.0, -200.0, 3000.0]))
    if draw(st.booleans()):
        logits[:, generator.random(vocabulary) < 0.7] = -np.inf
        logits[:, generator.integers(vocabulary)] = 1.0
    return logits.astype(draw(st.sampled_from([np.float32, np.float16])))


@given(logits=rows_of_logits(), given=filters, seed=st.integers(0, 2**63 - 1), position=st.integers(0, 10**6))
def test_is_its_definition(logits, given, seed, position):
    settings = GenerationSettings(**given)
    wanted = [by_definition(row, settings, seed, 3, position + i)[0] for i, row in enumerate(logits)]
    assert choose(logits, settings, seed, 3, position) == wanted


@given(logits=rows_of_logits(), given=filters.filter(lambda given: given["temperature"] > 0))
def test_keeps_what_it_shall(logits, given):
    settings = GenerationSettings(**given)
    for row in logits:
        _, wanted = by_definition(row, settings, 0, 0, 0)
        values, kept = kept_on_host(OPS.host_view(row), settings)
        kept = kept.tolist()
        assert sorted(set(kept)) == kept
        assert np.array_equal(values, row[kept].astype(np.float32) * np.float32(1 / settings.temperature))
        reach = row.astype(np.float32).max() / np.float32(settings.temperature) - 19.5
        near = {i for i in wanted if row[i] > -np.inf and row[i] / np.float32(settings.temperature) > reach}
        assert near <= set(kept) <= wanted


@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0, 12.0])
@pytest.mark.parametrize(
    "given", [{}, {"top_k": 64, "top_p": 0.95}, {"top_p": 0.9}, {"min_p": 0.02}, {"typical_p": 0.9}], ids=str
)
def test_a_large_vocabulary(spread, given):
    """Most tokens are discarded before their noise is computed."""
    settings = GenerationSettings(temperature=1.0, **given)
    logits = np.random.default_rng(5).normal(size=(2, 100_003)).astype(np.float32) * np.float32(spread)
    for seed in range(3):
        wanted = [by_definition(row, settings, seed, 0, 9 + i)[0] for i, row in enumerate(logits)]
        assert choose(logits, settings, seed, 0, 9) == wanted


@given(logits=rows_of_logits(), given=filters, seed=st.integers(0, 2**63 - 1))
def test_a_row_does_not_see_its_neighbours(logits, given, seed):
    settings = GenerationSettings(**given)
    together = choose(logits, settings, seed, 0, 5)
    alone = [choose(logits[i : i + 1], settings, seed, 0, 5 + i)[0] for i in range(len(logits))]
    assert together == alone


def test_ties_go_to_the_lower_id():
    flat = np.zeros((1, 5000), np.float32)
    assert choose(flat, GenerationSettings()) == [0]
    for position in range(20):
        assert choose(flat, GenerationSettings(temperature=1.0, top_k=1), 0, 0, position) == [0]
        assert choose(flat, GenerationSettings(temperature=1.0, top_k=7), 0, 0, position)[0] < 7
        assert choose(flat, GenerationSettings(temperature=1.0, top_p=0.002), 0, 0, position)[0] < 11


def test_minus_zero_is_zero():
    logits = np.array([[-0.0, 0.0, -0.0, 0.0]], np.float32)
    assert {choose(logits, GenerationSettings(temperature=1.0, top_k=1), seed)[0] for seed in range(20)} == {0}


def test_nothing_allowed_gives_some_id():
    logits = np.full((2, 3000), -np.inf, np.float32)
    for filters in ({}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}, {"typical_p": 0.5}):
        with np.errstate(invalid="ignore"):
            chosen = choose(logits, GenerationSettings(temperature=1.0, **filters))
        assert all(0 <= token_id < 3000 for token_id in chosen)


@pytest.mark.parametrize("varied", ["seed", "stream", "position"])
def test_seed_stream_and_position_are_independent(varied):
    """Changing one of them changes the choice as often as by chance; no two are correlated."""
    logits = np.zeros((1, 64), np.float32)
    settings = GenerationSettings(temperature=1.0)
    chosen = [choose(logits, settings, **{varied: value})[0] for value in range(2000)]
    repeats = sum(a == b for a, b in itertools.pairwise(chosen))
    assert abs(repeats - 2000 / 64) < 5 * math.sqrt(2000 / 64)
    counts = np.bincount(chosen, minlength=64)
    assert ((counts - 2000 / 64) ** 2 / (2000 / 64)).sum() < 63 + 5 * math.sqrt(2 * 63)


@pytest.mark.parametrize(
    "given",
    [{"temperature": 1.0}, {"temperature": 0.6}, {"temperature": 1.5, "top_k": 6}, {"temperature": 1.0, "top_p": 0.8}],
    ids=str,
)
def test_choices_have_the_softmax_distribution(given):
    """Chi-square over 20,000 positions; its 0.99999 quantile is below the bound."""
    settings = GenerationSettings(**given)
    logits = np.random.default_rng(11).normal(size=(1, 12)).astype(np.float32) * 2
    _, kept = by_definition(logits[0], settings, 0, 0, 0)
    chances = np.exp(logits[0].astype(float) / settings.temperature)
    chances[[i for i in range(12) if i not in kept]] = 0
    chances /= chances.sum()
    rows = 20_000
    chosen = choose(np.repeat(logits, rows, axis=0), settings, seed=7)
    counts = np.bincount(chosen, minlength=12)
    assert counts[chances == 0].sum() == 0
    some = chances > 0
    statistic = ((counts - rows * chances)[some] ** 2 / (rows * chances[some])).sum()
    freedom = some.sum() - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 15
