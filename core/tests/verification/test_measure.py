"""How a near tie is measured is chosen by what the backend claims and by the settings."""

import polydraft
import pytest
from polydraft.verification._measure import measure
from polydraft_reference.backend import ReferenceBackend

PROMPT = list(b"the quick brown fox jumps over the lazy dog")
CLAIMS = ReferenceBackend().capabilities()
WHOLE = CLAIMS.model_copy(update={"exposes_logits": False})


@pytest.fixture
def session():
    with polydraft.load("builtin:toy", backend="reference", num_speculative_tokens=4) as session:
        yield session


def measured(session, capabilities, **settings):
    plain = session.generate(PROMPT, **{"max_new_tokens": 40, "ignore_eos": True, **settings}, speculate="off")
    expected = plain.token_ids
    found = [*expected[:9], (expected[9] + 1) % 256, *expected[10:]]
    return expected[9], measure(session, capabilities, plain, expected, found, 9)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}, {"temperature": 0.8}])
def test_with_logits_where_they_can_be_read(session, settings):
    token, tie = measured(session, CLAIMS, **settings)
    assert tie.source == "logits"
    assert set(tie.control) == {token}


def test_what_ends_the_output_is_forbidden_in_the_control_too(session):
    """Without ``ignore_eos`` the replay has to know the EOS ids, or it chooses one that ``min_new_tokens`` forbids."""
    eos = min(session.tokenizer.eos_token_ids)
    token, tie = measured(session, CLAIMS, ignore_eos=False, min_new_tokens=40, logit_bias={eos: 100.0})
    assert set(tie.control) == {token}
    assert token != eos


@pytest.mark.parametrize("settings", [{}, {"ignore_eos": False}, {"stop": "nowhere"}, {"seed": 3, "top_k": 5}])
def test_with_log_probabilities_else(session, settings):
    token, tie = measured(session, WHOLE, **settings)
    assert tie.source == "logprobs"
    assert tie.control == (token,)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.8, "seed": 3},
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"logit_bias": {101: 1.5}},
        {"banned_token_ids": (32,)},
        {"forced_token_ids": {4: 65}},
        {"min_new_tokens": 10},
    ],
)
def test_not_at_all_where_the_choice_is_made_by_other_numbers(session, settings):
    assert measured(session, WHOLE, **settings)[1] is None


def test_not_at_all_where_nothing_is_shown(session):
    silent = WHOLE.model_copy(update={"sampling": WHOLE.sampling - {"logprobs"}})
    assert measured(session, silent)[1] is None
