"""A draft model as a second sequence: the same drafts, whatever ran before, and no token run twice."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polydraft.contract import EngineSequence, GenerationSettings, PrefillCancelled, Step, TokenRequest
from polydraft.engine_parts.draft_model import DraftModelSequence
from polydraft.sampling._sampler import RuleSampler
from polydraft.sampling.numpy_ops import NumpyOps

VOCABULARY = 12
STEP_ROWS = 5  # k = 4
PROMPT = [3, 1, 4, 1, 5]


class Logits:
    def __init__(self, rows):
        self.rows = rows

    def numpy(self):
        return self.rows.astype(np.float32)


class HashedSequence(EngineSequence):
    """A model whose logits depend on every token before them: a wrong or missing token changes them."""

    def __init__(self, name):
        self.name = name
        self.tokens = []
        self.ran = []  # the tokens of each forward
        self.closed = 0

    @property
    def length(self):
        return len(self.tokens)

    def logits_after(self, tokens):
        digest = hashlib.sha256(f"{self.name}{tokens}".encode()).digest()
        return np.frombuffer(digest[:VOCABULARY], np.uint8).astype(np.float32) / 32

    def run(self, token_ids, sampler, keep_logits, rows):
        self.ran.append(list(token_ids))
        self.tokens += token_ids
        ends = range(len(self.tokens) - rows + 1, len(self.tokens) + 1)
        logits = np.stack([self.logits_after(self.tokens[:end]) for end in ends])
        chosen, logprobs = sampler.choose(logits, ends[0], list(token_ids)[-rows:])
        return Step(chosen, Logits(logits) if keep_logits else None, logprobs)

    def prefill(self, token_ids, sampler, *, keep_logits=False):
        assert not self.tokens
        self.check_cancelled()
        return self.run(token_ids, sampler, keep_logits, 1)

    def verify(self, token_ids, sampler, *, keep_logits=False):
        assert self.tokens
        assert 1 <= len(token_ids) <= STEP_ROWS
        return self.run(token_ids, sampler, keep_logits, len(token_ids))

    def rollback(self, length):
        assert length <= self.length
        del self.tokens[length:]

    def close(self):
        self.closed += 1


def opened(draft="draft"):
    return DraftModelSequence(HashedSequence("target"), HashedSequence(draft), STEP_ROWS)


def sampler_of(prompt=PROMPT, **chosen_by):
    request = TokenRequest(
        prompt_token_ids=tuple(prompt),
        settings=GenerationSettings(**chosen_by),
        seed=7,
        speculate=True,
        num_speculative_tokens=4,
        eos_token_ids=frozenset(),
        max_total_tokens=1000,
    )
    return RuleSampler(NumpyOps(), request)


def rounds(sequence, sampler, count, k=4):
    """Run rounds as the loop does: the output, and the accepted drafts of each round."""
    output = sequence.prefill(PROMPT, sampler).token_ids
    accepted = []
    for _ in range(count):
        base = sequence.length
        drafts = sequence.propose(output[-1], k, sampler).token_ids
        assert len(drafts) == k
        chosen = sequence.verify([output[-1], *drafts], sampler).token_ids
        right = next((i for i, draft in enumerate(drafts) if draft != chosen[i]), k)
        sequence.rollback(base + 1 + right)
        output += chosen[: right + 1]
        accepted.append(right)
    return output, accepted


@pytest.mark.parametrize(
    "chosen_by",
    [{}, {"temperature": 1.0}, {"temperature": 1.0, "repetition_penalty": 1.5, "frequency_penalty": 0.5}],
    ids=["greedy", "sampled", "penalised"],
)
def test_a_draft_model_equal_to_the_target_is_always_right(chosen_by):
    """Which takes the target's noise, and its penalties, for each draft."""
    output, accepted = rounds(opened(draft="target"), sampler_of(**chosen_by), 6)
    assert accepted == [4] * 6
    plain, sampler = HashedSequence("target"), sampler_of(**chosen_by)
    wanted = plain.prefill(PROMPT, sampler).token_ids
    while len(wanted) < len(output):
        wanted += plain.verify(wanted[-1:], sampler).token_ids
    assert output == wanted


@pytest.mark.parametrize("draft", ["draft", "target"])
def test_each_token_is_run_once_but_for_rejected_drafts(draft):
    sequence = opened(draft)
    output, accepted = rounds(sequence, sampler_of(), 12)
    ran = sequence.draft.ran
    assert ran[0] == [*PROMPT, output[0]]
    starts = ran[4::4]  # the first step of each later round
    assert starts
    for before, first in zip(accepted, starts, strict=False):
        assert len(first) == (2 if before == 4 else 1)
    assert all(len(step) == 1 for index, step in enumerate(ran) if index % 4)


@settings(deadline=None, derandomize=True)
@given(st.data())
def test_drafts_depend_on_the_tokens_only(data):
    """After any steps, rejected or not, drafted or not, they are those of a fresh sequence."""
    sequence, sampler = opened(), sampler_of()
    sequence.prefill(PROMPT, sampler)
    tokens = list(PROMPT)
    for _ in range(data.draw(st.integers(1, 6))):
        newest = data.draw(st.integers(0, VOCABULARY - 1))
        drafts = []
        if data.draw(st.booleans()):
            drafts = sequence.propose(newest, data.draw(st.integers(1, 4)), sampler).token_ids
        # What is verified need not be what was drafted, nor what is kept a prefix of it.
        run = [newest] + [
            data.draw(st.sampled_from([draft, (draft + 1) % VOCABULARY])) for draft in drafts or [1, 2, 3]
        ]
        sequence.verify(run, sampler)
        kept = data.draw(st.integers(0, len(run)))
        sequence.rollback(len(tokens) + kept)
        tokens += run[:kept]
    fresh = opened()
    fresh.prefill(tokens, sampler_of(tokens))
    found = sequence.propose(9, 4, sampler, keep_logits=True)
    wanted = fresh.propose(9, 4, sampler_of(tokens), keep_logits=True)
    assert found.token_ids == wanted.token_ids
    assert found.logits.numpy().shape == (4, VOCABULARY)
    assert np.array_equal(found.logits.numpy(), wanted.logits.numpy())
    assert found.logits.numpy().argmax(axis=-1).tolist() == found.token_ids


def test_after_many_plain_steps_the_draft_model_catches_up_in_steps():
    sequence, sampler = opened(), sampler_of()
    newest = sequence.prefill(PROMPT, sampler).token_ids
    sequence.propose(newest[0], 1, sampler)
    stored = list(PROMPT)
    for _ in range(13):
        stored += newest
        newest = sequence.verify(newest, sampler).token_ids
    sequence.draft.ran.clear()
    drafts = sequence.propose(newest[0], 2, sampler).token_ids
    assert [len(step) for step in sequence.draft.ran] == [5, 5, 3, 1]
    assert sequence.draft.tokens == [*stored, newest[0], drafts[0]]


def test_nothing_is_drafted_where_nothing_is_wanted():
    sequence, sampler = opened(), sampler_of()
    sequence.prefill(PROMPT, sampler)
    assert sequence.propose(1, 0, sampler).token_ids == []
    assert sequence.draft.ran == []
    assert sequence.length == len(PROMPT)


def test_a_cancel_reaches_the_prompt():
    sequence = opened()
    sequence.cancelled = lambda: True
    with pytest.raises(PrefillCancelled):
        sequence.prefill(PROMPT, sampler_of())


def test_both_sequences_are_closed():
    sequence = opened()
    sequence.close()
    assert (sequence.target.closed, sequence.draft.closed) == (1, 1)
