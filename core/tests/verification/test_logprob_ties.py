"""Near ties of engines that show log-probabilities only: measured through ``generate``."""

import polydraft
import pytest
from polydraft.verification import judge, tie_from_logprobs
from polydraft_reference.sequence import ReferenceSequence

PROMPT = list(b"the quick brown fox jumps over the lazy dog")
SETTINGS = {"speculate": "off", "temperature": 0.0, "ignore_eos": True}


class OtherPrefill(ReferenceSequence):
    """A prefill's rows are off by a little: even tokens gain."""

    def prefill(self, token_ids, sampler, *, keep_logits=False):
        self.prefilling = True
        try:
            return super().prefill(token_ids, sampler, keep_logits=keep_logits)
        finally:
            self.prefilling = False

    def choose(self, logits, token_ids, sampler, keep_logits):
        logits = logits.copy()
        logits[:, ::2] += 0.3 * getattr(self, "prefilling", False)
        return super().choose(logits, token_ids, sampler, keep_logits)


@pytest.fixture
def session(broken):
    broken(OtherPrefill)
    with polydraft.load("builtin:toy", backend="reference") as session:
        yield session


@pytest.fixture
def plain(session):
    return list(session.generate(PROMPT, max_new_tokens=100, **SETTINGS).token_ids)


def prefilled(session, plain, index):
    return session.generate([*PROMPT, *plain[:index]], max_new_tokens=1, **SETTINGS).token_ids[0]


def verdict(session, plain, position, other):
    found = [*plain[:position], other, *plain[position + 1 :]]
    return judge(plain, found, lambda index: tie_from_logprobs(session, PROMPT, plain, found, index))


def test_what_one_prefill_flips_too_is_a_near_tie(session, plain):
    flipped = [index for index in range(20, 100) if prefilled(session, plain, index) != plain[index]]
    assert flipped, "the toy has no near tie here"
    judgement = verdict(session, plain, flipped[0], prefilled(session, plain, flipped[0]))
    assert judgement.verdict == "NEAR_TIE"
    assert judgement.tie.source == "logprobs"
    assert 0 < judgement.tie.margin <= 2 * judgement.tie.noise
    assert 0.05 < judgement.tie.noise < 0.6


def test_what_the_control_does_not_flip_is_a_defect(session, plain):
    held = next(index for index in range(20, 100) if prefilled(session, plain, index) == plain[index])
    judgement = verdict(session, plain, held, (plain[held] + 1) % 256)
    assert judgement.verdict == "DIVERGED"


def test_a_plain_output_that_does_not_repeat_cannot_be_measured(session, plain):
    other = [*plain[:10], (plain[10] + 1) % 256, *plain[11:]]
    assert "does not repeat itself" in tie_from_logprobs(session, PROMPT, other, plain, 20)
