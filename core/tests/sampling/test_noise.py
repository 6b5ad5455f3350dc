"""The noise: fixed bit by bit, bounded, and Gumbel-distributed."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polydraft.sampling.noise import (
    NOISE_MAX,
    NOISE_MIN,
    exp_nonpositive,
    generic_noise_bits,
    gumbel,
    gumbel_of_bits,
    log_positive,
    row_keys,
)
from polydraft.sampling.numpy_ops import NumpyOps

OPS = NumpyOps()

RECORDED_KEYS = (2076617164, 2962232872)
RECORDED_BITS = [4915036, 1153541, 3966127, 5468023]
RECORDED_NOISE = [1059083276, -1087413005, 1049881388, 1062815354]  # the floats' bits


def keys_of(seed, stream, position):
    low, high = row_keys(seed, stream, range(position, position + 1))
    return np.array([low]), np.array([high])


def test_bits_of_old_releases():
    """A seed must give the same tokens tomorrow: these numbers may never change."""
    ids = np.array([[0, 1, 2, 262143]])
    assert row_keys(1, 0, range(5, 6)) == ([RECORDED_KEYS[0]], [RECORDED_KEYS[1]])
    assert OPS.noise_bits(ids, *keys_of(1, 0, 5)).tolist() == [RECORDED_BITS]
    assert gumbel(OPS, ids, keys_of(1, 0, 5)).view(np.int32).tolist() == [RECORDED_NOISE]


@given(
    ids=st.lists(st.integers(0, 2**21 - 1), min_size=1, max_size=50),
    seed=st.integers(0, 2**63 - 1),
    stream=st.integers(0, 2**40),
    position=st.integers(0, 2**40),
)
def test_the_fast_hash_is_the_generic_one(ids, seed, stream, position):
    keys = keys_of(seed, stream, position)
    fast = OPS.noise_bits(np.array([ids]), *keys)
    assert fast.tolist() == generic_noise_bits(OPS, np.array([ids]), *keys).tolist()
    assert 0 <= fast.min() <= fast.max() < 2**23


def test_bounds():
    ends = gumbel_of_bits(OPS, np.array([[0, 2**23 - 1]]))[0]
    assert NOISE_MIN <= ends[0] < NOISE_MIN + 1e-3
    assert NOISE_MAX - 1e-3 < ends[1] <= NOISE_MAX


def test_noise_is_standard_gumbel():
    """Kolmogorov-Smirnov over a whole vocabulary; 2.5 / sqrt(n) is exceeded by chance once in 130,000 times."""
    ids = np.arange(262_144)[None]
    for position in (0, 1, 100_000):
        found = np.sort(gumbel(OPS, ids, keys_of(12, 0, position))[0].astype(float))
        wanted = np.exp(-np.exp(-found))
        steps = np.arange(len(found) + 1) / len(found)
        assert max(np.abs(steps[1:] - wanted).max(), np.abs(steps[:-1] - wanted).max()) < 2.5 / math.sqrt(len(found))


def test_positions_and_tokens_are_uncorrelated():
    ids = np.arange(65_536)[None]
    rows = np.stack([gumbel(OPS, ids, keys_of(3, 0, position))[0] for position in range(4)]).astype(float)
    rows = np.vstack([rows, rows[:1, ::-1], np.roll(rows[:1], 1)])
    correlations = np.corrcoef(rows)[np.triu_indices(6, 1)]
    assert np.abs(correlations).max() < 5 / math.sqrt(65_536)


@pytest.mark.parametrize("low", [2.0**-120, 2.0**-24, 0.5, 0.99, 1.0, 10.0])
def test_log_to_an_ulp_or_two(low):
    values = np.geomspace(low, low * 8, 100_000).astype(np.float32)
    wanted = np.log(values.astype(float))
    found = log_positive(OPS, values)
    assert np.all(np.abs(found - wanted) <= 2 * np.spacing(np.abs(wanted).astype(np.float32)) + 1e-10)


def test_exp_to_an_ulp_or_two():
    values = -np.geomspace(1e-8, 80, 100_000).astype(np.float32)
    wanted = np.exp(values.astype(float))
    assert np.all(np.abs(exp_nonpositive(OPS, values) / wanted - 1) < 3e-7)
    assert exp_nonpositive(OPS, np.array([0.0, -math.inf, -1e30], np.float32)).tolist()[0] == 1.0
    assert 0 < exp_nonpositive(OPS, np.array([-math.inf], np.float32))[0] < 1e-34
