"""Logits that are not finite: a typed error at the first bad row that plain decoding would see, never a token."""

from __future__ import annotations

import math

import numpy as np
import pytest
from polydraft.contract import GenerationSettings, TokenRequest
from polydraft.errors import NonFiniteLogitsError
from polydraft.sampling._rejection import RejectionSampler, make_sampler
from polydraft.sampling._sampler import RuleSampler
from polydraft.sampling._soundness import UNSOUND
from polydraft.sampling.numpy_ops import NumpyOps

pytestmark = [
    # numpy warns where a device's rule computes with NaN.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("error:divide by zero encountered:RuntimeWarning"),  # torch raises an error there
]

VOCAB = 600
SETTINGS = {
    "greedy": {},
    "sampled": {"temperature": 0.8},
    "filtered": {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.01},
    "typical": {"temperature": 0.8, "typical_p": 0.9},
    "penalised": {"repetition_penalty": 1.3, "banned_token_ids": (3, 7)},
    "biased": {"logit_bias": {3: -5.0, 20: 1.0}, "presence_penalty": 0.1, "repetition_penalty": 1.3},
    "forced": {"forced_token_ids": {1: 4, 2: 5}},
    "processed": {"logits_processor": lambda prefix, logits: logits},
    "logprobs": {"logprobs": 2},
    "rejection": {"temperature": 0.8, "acceptance": "rejection"},
    "rejection, processed": {
        "temperature": 0.8,
        "acceptance": "rejection",
        "logits_processor": lambda prefix, logits: logits,
    },
}
BAD = {"NaN": math.nan, "+Inf": math.inf, "no finite number": -math.inf}


class DeviceOps(NumpyOps):
    """As on a device: the rule runs in the array library, and drafts are not looked at when they are chosen."""

    def host_view(self, array):
        return None


def sampler_of(given, ops=None):
    values = GenerationSettings(**given)
    request = TokenRequest(
        prompt_token_ids=(5, 6),
        settings=values,
        seed=4,
        speculate=True,
        num_speculative_tokens=3,
        eos_token_ids=frozenset(),
        max_total_tokens=100,
    )
    return make_sampler(ops or NumpyOps(), request, "float16")


def rows_of(count):
    """Rows whose best tokens are 10, 11, 12, ... by far, so that samples are these tokens, too."""
    rows = np.random.default_rng(0).normal(size=(count, VOCAB)).astype(np.float32)
    rows[np.arange(count), 10 + np.arange(count)] = 60.0
    return rows


def spoilt(row, what):
    """In place: a single NaN or Inf, at a token that is banned in one of the settings; or nothing but -Inf."""
    row[slice(None) if BAD[what] == -math.inf else 3] = BAD[what]


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("ops", [NumpyOps(), DeviceOps()], ids=["host", "device"])
class TestTargets:
    def test_the_first_row_is_refused_with_its_position_and_dtype(self, ops, name, what):
        sampler, rows = sampler_of(SETTINGS[name], ops), rows_of(1)
        spoilt(rows[0], what)
        with pytest.raises(NonFiniteLogitsError, match=r"target.* position 2 .*float16.*bfloat16") as caught:
            sampler.choose(rows, 2, [6])
        assert what in caught.value.message

    def test_of_several_rows_the_first_is_marked(self, ops, name, what):
        sampler, rows = sampler_of(SETTINGS[name], ops), rows_of(2)
        sampler.choose(rows[:1], 2, [6])
        spoilt(rows[0], what)
        assert sampler.choose(rows, 3, [10, 11])[0][0] == UNSOUND
        # The loop runs the newest token alone.
        with pytest.raises(NonFiniteLogitsError):
            sampler.choose(rows[:1], 3, [10])

    def test_a_later_row_is_marked_and_those_before_it_are_chosen(self, ops, name, what):
        sampler, rows = sampler_of(SETTINGS[name], ops), rows_of(3)
        sampler.choose(rows[:1], 2, [6])
        spoilt(rows[2], what)
        right = [4, 5] if name == "forced" else [10, 11]
        chosen, _ = sampler.choose(rows, 3, [10, *right])
        assert chosen == [*right, UNSOUND]


@pytest.mark.parametrize("ops", [NumpyOps(), DeviceOps()], ids=["host", "device"])
@pytest.mark.parametrize("name", SETTINGS)
def test_minus_infinity_for_single_tokens_is_sound(name, ops):
    sampler, rows = sampler_of(SETTINGS[name], ops), rows_of(1)
    rows[:, 100:] = -np.inf
    assert sampler.choose(rows, 2, [6])[0] == [10]


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("name", sorted(SETTINGS.keys() - {"forced"}))  # a forced token is not chosen from logits
@pytest.mark.parametrize("ops", [NumpyOps(), DeviceOps()], ids=["host", "device"])
def test_a_rejected_draft_from_a_bad_row_is_the_drafters_fault(ops, name, what):
    sampler, rows = sampler_of(SETTINGS[name], ops), rows_of(2)
    bad = np.roll(rows_of(1), 40, axis=1)  # another best token than the target's
    spoilt(bad[0], what)
    sampler.choose(rows[:1], 2, [6])
    draft = int(sampler.choose_draft(bad, 3, [10])[0])
    assert 0 <= draft < VOCAB  # it may index an embedding on the device
    with pytest.raises(NonFiniteLogitsError, match=r"drafter's logits for position 3 .*`drafter='ngram'`"):
        sampler.choose(rows, 3, [10, draft])


def test_a_bad_row_of_the_target_is_not_blamed_on_the_drafter():
    """A drafter that reads the target's hidden states and embeddings sees its NaN first."""
    sampler, rows = sampler_of({}), rows_of(2)
    rows[0, 0] = math.nan
    draft = sampler.choose_draft(rows[:1], 3, None)
    assert sampler.choose(rows, 3, [10, int(draft[0])])[0][0] == UNSOUND
    with pytest.raises(NonFiniteLogitsError, match="target"):
        sampler.choose(rows[:1], 3, [10])


def test_a_processor_is_not_shown_a_bad_row():
    seen = []

    def processor(prefix, logits):
        seen.append(prefix)
        return logits

    sampler, rows = sampler_of({"logits_processor": processor}), rows_of(1)
    rows[0, 0] = math.nan
    with pytest.raises(NonFiniteLogitsError):
        sampler.choose(rows, 2, [6])
    assert not seen


def test_both_rules_are_tried():
    kinds = {type(sampler_of(given)) for given in SETTINGS.values()}
    assert kinds == {RuleSampler, RejectionSampler}
