"""Which choices an engine may make in a recorded step, and what it needs to know for them."""

import numpy as np
import pytest
from polydraft.contract import GenerationSettings, TokenRequest
from polydraft.errors import NonFiniteLogitsError
from polydraft.sampling._rejection import RejectionSampler
from polydraft.sampling._sampler import RuleSampler
from polydraft.sampling.noise import key_base, keys_at, row_keys
from polydraft.sampling.numpy_ops import NumpyOps
from polydraft.sampling.on_device import device_choice
from polydraft.sampling.rule import choose_by_numbers, choose_tokens


class DeviceOps(NumpyOps):
    """An engine's own operations."""


def sampler_of(kind=RuleSampler, ops=DeviceOps, **settings):
    request = TokenRequest(
        prompt_token_ids=(1, 2, 3),
        settings=GenerationSettings(**settings),
        seed=2**63 - 1,
        stream=5,
        speculate=True,
        num_speculative_tokens=4,
        eos_token_ids=frozenset({0}),
        max_total_tokens=100,
    )
    return kind(ops(), request)


@pytest.mark.parametrize(("seed", "stream"), [(0, 0), (2**63 - 1, 5), (77, 2**40)])
def test_keys_of_positions_in_arrays(seed, stream):
    base = np.array(key_base(seed, stream), np.uint64).astype(np.int64)
    positions = np.array([0, 1, 12345, 2**20])
    low, high = keys_at(base, positions)
    for index, position in enumerate(positions.tolist()):
        assert ([low[index]], [high[index]]) == row_keys(seed, stream, range(position, position + 1))


@pytest.mark.parametrize(
    "settings",
    [
        {"logprobs": 0},
        {"typical_p": 0.9},
        {"presence_penalty": 1.0},
        {"logit_bias": {3: 1.0}},
        {"banned_token_ids": [3]},
        {"logits_processor": lambda tokens, logits: logits},
    ],
)
def test_where_the_host_takes_part(settings):
    assert device_choice(sampler_of(temperature=1.0, **settings), 10**6) is None


def test_samplers_that_decide_in_their_own_way():
    assert device_choice(sampler_of(RejectionSampler, temperature=1.0), 4) is None
    assert device_choice(sampler_of(ops=NumpyOps, temperature=1.0), 4) is None


@pytest.mark.parametrize("settings", [{"forced_token_ids": {6: 3}}, {"min_new_tokens": 7}])
def test_from_the_position_on_at_which_nothing_is_named_any_more(settings):
    sampler = sampler_of(temperature=1.0, **settings)
    free_from = 3 + 7
    assert device_choice(sampler, free_from - 1) is None
    assert device_choice(sampler, free_from) is not None


def test_numbers_and_keys_give_the_rules_choice():
    settings = {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "min_p": 0.01}
    choice = device_choice(sampler_of(**settings), 4)
    logits = np.random.default_rng(1).normal(0, 3, (3, 500)).astype(np.float32)
    base = np.array(choice.key_base, np.uint64).astype(np.int64)
    keys = tuple(half[:, None] for half in keys_at(base, np.arange(40, 43)))
    found = choose_by_numbers(NumpyOps(), logits, choice.numbers, keys)
    wanted = choose_tokens(NumpyOps(), logits, GenerationSettings(**settings), 2**63 - 1, 5, 40)
    assert found.tolist() == wanted.tolist()
    assert device_choice(sampler_of(temperature=0.0), 4).numbers is None


def test_a_rejected_draft_whose_logits_were_not_finite_is_the_drafters():
    choice = device_choice(sampler_of(temperature=1.0), 4)
    choice.drafted(4, [1.0, float("nan")])
    with pytest.raises(NonFiniteLogitsError, match="drafter"):
        choice.chosen([7, 9, 0], 4, [5, 7, 8])
    choice.drafted(4, [1.0, float("nan")])
    assert choice.chosen([6, 9, 0], 4, [5, 7, 8]) == [6, 9, 0]  # the first draft is rejected, and that one is sound
