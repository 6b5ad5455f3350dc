"""What the backend claims and the settings decide how a near tie is measured."""

import polydraft
import pytest
from polydraft.contract import TokenRequest
from polydraft.verification import judge, judge_outputs, measure_tie
from polydraft_reference.backend import ReferenceBackend
from polydraft_reference.sequence import ReferenceSequence

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


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "seed": 3}, {"guided": {"regex": "[a-z ]{50}"}}])
def test_an_engine_in_a_worker_is_measured_there_by_its_logits(session, settings):
    """By log-probabilities honest engines were called DIVERGED: no sample could be a near tie, nor could what only
    steps of several tokens flip."""
    given = {"ignore_eos": "guided" not in settings, **settings}
    with polydraft.load("builtin:toy", backend="reference", num_speculative_tokens=4, isolation="process") as worker:
        (token, here), (_, there) = (judged(one, CLAIMS, **given) for one in (session, worker))
        outputs = [one.generate(PROMPT, max_new_tokens=9).token_ids for one in (session, worker)]
        assert outputs[0] == outputs[1]
    assert there == here
    assert there.tie.source == "logits"
    assert set(there.tie.control) == {token}


class OtherHere(ReferenceSequence):
    """In steps of several tokens one token's logit is off at one position, by less than one rounding in bfloat16."""

    at, token, gain = 0, 0, 0.0

    def choose(self, logits, token_ids, sampler, keep_logits):
        row = self.at - (self.length - len(token_ids) + 1)
        if len(token_ids) > 1 and 0 <= row < len(logits) == len(token_ids):
            logits = logits.copy()
            logits[row, self.token] += self.gain
        return super().choose(logits, token_ids, sampler, keep_logits)


@pytest.mark.parametrize(
    ("precision", "verdict"), [("bfloat16", "NEAR_TIE"), ("float32", "DIVERGED"), ("", "DIVERGED")]
)
def test_two_logits_less_than_a_rounding_apart_are_near_where_other_rows_agree_bit_by_bit(precision, verdict, broken):
    """The noise around a difference can be exactly 0 in 16 bits."""
    broken(OtherHere)
    with polydraft.load("builtin:toy", backend="reference", num_speculative_tokens=4) as session:
        plain = session.generate(PROMPT, max_new_tokens=100, ignore_eos=True, speculate="off", logprobs=2)
        ranked = [sorted((value, token) for token, value in entry.top) for entry in plain.logprobs]
        margins = {index: best[0] - second[0] for index, (second, best) in enumerate(ranked) if 2 < index < 90}
        position = min(margins, key=lambda index: margins[index])
        margin, other = margins[position], ranked[position][0][1]
        OtherHere.at, OtherHere.token, OtherHere.gain = len(PROMPT) + position, other, 1.5 * margin
        found = [*plain.token_ids[:position], other]
        request = TokenRequest(
            prompt_token_ids=tuple(PROMPT),
            settings=plain.settings,
            seed=0,
            speculate=False,
            num_speculative_tokens=0,
            eos_token_ids=frozenset(),
            max_total_tokens=session.running.context_length,
        )
        judgement = judge(
            plain.token_ids,
            found,
            lambda at: measure_tie(session.engine, request, plain.token_ids, found, at, 4, precision=precision),
        )
    largest = max(map(abs, judgement.tie.values))
    assert 2 * 2**-23 * largest < judgement.tie.margin < 2**-7 * largest
    assert other in judgement.tie.control
    assert (judgement.verdict, judgement.tie.noise < 1e-5) == (verdict, precision != "bfloat16"), judgement.reason
