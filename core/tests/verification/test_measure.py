"""What the backend claims and the settings decide how a near tie is measured."""

import polydraft
import pytest
from polydraft.verification import judge_outputs
from polydraft_reference.backend import ReferenceBackend

PROMPT = list(b"the quick brown fox jumps over the lazy dog")
CLAIMS = ReferenceBackend().capabilities()
WHOLE = CLAIMS.model_copy(update={"exposes_logits": False})


@pytest.fixture
def session():
    with polydraft.load("builtin:toy", backend="reference", num_speculative_tokens=4) as session:
        yield session


def judged(session, capabilities, **settings):
    """The plain token at which another output differs, and the judgement on it."""
    plain = session.generate(PROMPT, **{"max_new_tokens": 40, "ignore_eos": True, **settings}, speculate="off")
    expected = plain.token_ids
    found = [*expected[:9], (expected[9] + 1) % 256, *expected[10:]]
    judgement = judge_outputs(session, capabilities, plain.prompt_token_ids, plain.settings, expected, found)
    assert (judgement.verdict, judgement.position) == ("DIVERGED", 9)
    return expected[9], judgement


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}, {"temperature": 0.8}])
def test_with_logits_where_they_can_be_read(session, settings):
    token, judgement = judged(session, CLAIMS, **settings)
    assert judgement.tie.source == "logits"
    assert set(judgement.tie.control) == {token}


def test_what_ends_the_output_is_forbidden_in_the_control_too(session):
    """Without ``ignore_eos`` the replay has to know the EOS ids, or it chooses one that ``min_new_tokens`` forbids."""
    eos = min(session.tokenizer.eos_token_ids)
    token, judgement = judged(session, CLAIMS, ignore_eos=False, min_new_tokens=40, logit_bias={eos: 100.0})
    assert set(judgement.tie.control) == {token}
    assert token != eos


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ignore_eos": False},
        {"stop": "nowhere"},
        {"seed": 3, "top_k": 5},
        {"banned_token_ids": (32,)},
        {"min_new_tokens": 10},
        {"ignore_eos": False, "min_new_tokens": 30},
    ],
)
def test_with_log_probabilities_else(session, settings):
    token, judgement = judged(session, WHOLE, **settings)
    assert judgement.tie.source == "logprobs"
    assert judgement.tie.control == (token,)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.8, "seed": 3},
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"logit_bias": {101: 1.5}},
        {"forced_token_ids": {4: 65}},
    ],
)
def test_not_at_all_where_the_choice_is_made_by_other_numbers(session, settings):
    judgement = judged(session, WHOLE, **settings)[1]
    assert judgement.tie is None
    assert "not chosen by the log-probabilities" in judgement.reason


def test_not_at_all_where_nothing_is_shown(session):
    silent = WHOLE.model_copy(update={"sampling": WHOLE.sampling - {"logprobs"}})
    assert "shows neither logits nor log-probabilities" in judged(session, silent)[1].reason


def test_not_at_all_where_equal_bits_are_promised():
    with polydraft.load("builtin:toy", backend="reference", exactness="bitwise") as session:
        judgement = judged(session, CLAIMS)[1]
    assert judgement.tie is None
    assert "near ties do not count" in judgement.reason
