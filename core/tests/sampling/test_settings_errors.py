"""Invalid sampling settings: a typed error with a hint, before any work."""

import math

import numpy as np
import pytest
from polydraft._session.settings import check_supported, effective_settings
from polydraft.contract import Capabilities, GenerationSettings
from polydraft.errors import InvalidRequestError, UnsupportedError

VOCABULARY = 279

BAD = [
    {"temperature": -0.1},
    {"temperature": 1e-9},
    {"temperature": 1e9},
    {"temperature": math.nan},
    {"repetition_penalty": 0.0},
    {"repetition_penalty": -1.0},
    {"repetition_penalty": math.nan},
    {"repetition_penalty": math.inf},
    {"repetition_penalty": "1.2"},
    {"repetition_penalty": True},
    {"presence_penalty": 2.1},
    {"presence_penalty": -2.1},
    {"presence_penalty": math.nan},
    {"frequency_penalty": 5},
    {"frequency_penalty": [1.0]},
    {"logit_bias": [1, 2]},
    {"logit_bias": {"5": 1.0}},
    {"logit_bias": {5: "1"}},
    {"logit_bias": {5: True}},
    {"logit_bias": {True: 1.0}},
    {"logit_bias": {-1: 1.0}},
    {"logit_bias": {VOCABULARY: 1.0}},
    {"logit_bias": {5: 100.5}},
    {"logit_bias": {5: math.nan}},
    {"logit_bias": {5: -math.inf}},
    {"banned_token_ids": 5},
    {"banned_token_ids": "5"},
    {"banned_token_ids": [-1]},
    {"banned_token_ids": [VOCABULARY]},
    {"banned_token_ids": [1.5]},
    {"forced_token_ids": [5]},
    {"forced_token_ids": {0: VOCABULARY}},
    {"forced_token_ids": {-1: 5}},
    {"forced_token_ids": {0: -5}},
    {"forced_token_ids": {512: 5}},
    {"forced_token_ids": {4: 5}, "max_new_tokens": 4},
    {"forced_token_ids": {4: 5}, "banned_token_ids": [5]},
    {"forced_token_ids": {0.5: 5}},
    {"acceptance": "always"},
    {"acceptance": 1},
    {"logits_processor": 3},
]


@pytest.mark.parametrize("given", BAD, ids=str)
def test_refused(given):
    with pytest.raises(InvalidRequestError) as raised:
        effective_settings(given, VOCABULARY)
    assert raised.value.hint
    assert any(name in raised.value.message for name in given) or "banned" in raised.value.message


@pytest.mark.parametrize(
    "given",
    [
        {"repetition_penalty": 1.3, "presence_penalty": -2, "frequency_penalty": 2.0},
        {
            "logit_bias": {0: -100, VOCABULARY - 1: 100.0},
            "banned_token_ids": [0, 5],
            "forced_token_ids": {0: 1, 511: 2},
        },
        {"logit_bias": {}, "banned_token_ids": (), "forced_token_ids": {}},
        {"banned_token_ids": np.array([1, 2]).tolist(), "acceptance": "rejection", "temperature": 1e-6},
    ],
    ids=str,
)
def test_taken(given):
    settings = effective_settings(given, VOCABULARY)
    for name, value in given.items():
        found = getattr(settings, name)
        assert found == (tuple(value) if isinstance(found, tuple) else value)


def test_without_a_model_only_signs_are_checked():
    assert effective_settings({"banned_token_ids": [10**9]}, None).banned_token_ids == (10**9,)
    with pytest.raises(InvalidRequestError, match="banned_token_ids"):
        effective_settings({"banned_token_ids": [-1]}, None)


@pytest.mark.parametrize(
    "given",
    [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 1.0},
        {"frequency_penalty": 1.0},
        {"logit_bias": {1: 1.0}},
        {"banned_token_ids": [1]},
        {"forced_token_ids": {1: 1}},
        {"logits_processor": lambda prefix, logits: logits},
        {"acceptance": "rejection"},
    ],
    ids=lambda given: next(iter(given)),
)
def test_a_backend_that_claims_none_refuses(given):
    capabilities = Capabilities(drafter_kinds=frozenset(), sampling=frozenset({"temperature"}))
    check_supported(effective_settings({}, VOCABULARY), capabilities, "some-engine")
    with pytest.raises(UnsupportedError, match=next(iter(given))):
        check_supported(effective_settings(given, VOCABULARY), capabilities, "some-engine")


def test_some_token_must_be_left(toys):
    session = toys.session("mtp", 4, 0.7)
    everything = list(range(VOCABULARY))
    with pytest.raises(InvalidRequestError, match="leaves none"):
        session.stream([97], banned_token_ids=everything)
    eos = sorted(session.tokenizer.eos_token_ids)
    rest = [token_id for token_id in everything if token_id not in eos]
    with pytest.raises(InvalidRequestError, match="leaves none"):
        session.stream([97], banned_token_ids=rest, min_new_tokens=1)
    assert session.generate([97], banned_token_ids=rest).token_ids[0] in eos


def test_defaults_do_nothing():
    defaults = GenerationSettings()
    assert effective_settings({"logit_bias": {}, "banned_token_ids": [], "seed": None}, VOCABULARY) == defaults
