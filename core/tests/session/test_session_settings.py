"""Settings of a call: types, ranges, and one place for the defaults."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from polydraft._session.settings import effective_settings
from polydraft.contract import DEFAULT_SETTINGS, GenerationSettings
from polydraft.contract.requests import LONGEST_STOP
from polydraft.errors import InvalidRequestError

WRONG = {
    "max_new_tokens": [0, -1, 2.0, "5", True, math.nan, [5]],
    "min_new_tokens": [-1, 1.5, "1", True, 10**9],
    "temperature": [-0.1, math.nan, math.inf, "0.7", True, 1e-9],
    "top_p": [0, 0.0, -0.5, 1.01, math.nan, "1", True],
    "top_k": [-1, 1.5, "3", True],
    "typical_p": [0, -0.1, 1.1, math.nan, "0.5", True],
    "min_p": [-0.1, 1.1, math.nan, "0", True],
    "seed": [-1, 2**63, 1.0, "1", True, math.nan],
    "stop": ["", [""], ["a", ""], 5, [5], b"a", [b"a"], True, [None]],
    "stop_token_ids": [5, "5", [-1], [1000], [1.5], ["1"], [None], True],
    "ignore_eos": [1, "yes", 0.0],
    "logprobs": [-1, 65, 1.0, "3", True],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_wrong_settings_are_named(name, value):
    with pytest.raises(InvalidRequestError) as caught:
        effective_settings({name: value}, 1000)
    said = str(caught.value)
    assert name.replace("_", " ") in said.replace("_", " ") or "stop string" in said
    assert caught.value.hint
    assert len(said) < 400


def test_a_setting_that_does_not_exist():
    with pytest.raises(InvalidRequestError, match="no setting named tempreature"):
        effective_settings({"tempreature": 1.0}, 1000)


def test_what_is_not_given_is_the_documented_default():
    assert effective_settings({}, 1000) == DEFAULT_SETTINGS == GenerationSettings()
    assert effective_settings(dict.fromkeys(WRONG), 1000) == DEFAULT_SETTINGS


def test_right_settings_are_kept():
    given = {
        "max_new_tokens": 9,
        "min_new_tokens": 9,
        "temperature": 1,
        "top_p": 1,
        "top_k": 0,
        "min_p": 1.0,
        "typical_p": 1,
        "seed": 2**63 - 1,
        "stop": ["a", "b"],
        "stop_token_ids": range(3),
        "ignore_eos": True,
        "logprobs": 0,
    }
    found = effective_settings(given, 1000)
    assert (found.stop, found.stop_token_ids) == (("a", "b"), (0, 1, 2))
    assert {name: getattr(found, name) for name in given if "stop" not in name} == {
        name: value for name, value in given.items() if "stop" not in name
    }
    assert effective_settings({"stop": "ab"}, 1000).stop == ("ab",)


def test_stop_strings_have_a_limit():
    longest = "x" * LONGEST_STOP
    assert effective_settings({"stop": ["a", longest]}, 1000).stop == ("a", longest)
    for stop in (longest + "x", ["a", longest + "x"]):
        with pytest.raises(InvalidRequestError, match="stop string has 1025 characters") as caught:
            effective_settings({"stop": stop}, 1000)
        assert caught.value.hint


@pytest.mark.parametrize("whole", [np.int64(3), np.uint8(3), np.array(3)])
def test_numbers_of_other_libraries(whole):
    numbers = dict.fromkeys(("max_new_tokens", "min_new_tokens", "top_k", "seed", "logprobs"), whole)
    reals = {"temperature": np.float32(0.5), "top_p": Decimal("0.5"), "min_p": Fraction(1, 2), "presence_penalty": 1}
    ids = {"stop_token_ids": np.array([3]), "banned_token_ids": [whole], "logit_bias": {np.int64(3): np.float32(0.5)}}
    settings = effective_settings(
        {**numbers, **reals, **ids, "forced_token_ids": {np.int64(2): np.uint8(4)}, "ignore_eos": np.True_}, 1000
    )
    assert {type(getattr(settings, name)) for name in numbers} == {int}
    assert settings == GenerationSettings(
        **dict.fromkeys(numbers, 3),
        temperature=0.5,
        top_p=0.5,
        min_p=0.5,
        presence_penalty=1.0,
        stop_token_ids=(3,),
        banned_token_ids=(3,),
        logit_bias={3: 0.5},
        forced_token_ids={2: 4},
        ignore_eos=True,
    )
    settings.model_dump_json()


@pytest.mark.parametrize(
    "wrong",
    [
        np.True_,
        np.float32(3),
        np.array([[3]]),
        np.array(True),
        Fraction(3),
        10**400,
        -(10**5000),
        10**5000,
        "\udc80",
        1j,
    ],
    ids=lambda value: type(value).__name__,
)
def test_numbers_that_are_none(wrong):
    for name in ("max_new_tokens", "top_k", "seed", "logprobs", "stop_token_ids", "banned_token_ids", "stop"):
        for value in (wrong, [wrong]):
            with pytest.raises(InvalidRequestError, match=name.removesuffix("_token_ids").replace("stop", "[Ss]top")):
                effective_settings({name: value}, 1000)
    if not isinstance(wrong, (np.float32, Fraction)):
        for name in ("temperature", "top_p", "repetition_penalty", "frequency_penalty"):
            with pytest.raises(InvalidRequestError, match=name):
                effective_settings({name: wrong}, 1000)
