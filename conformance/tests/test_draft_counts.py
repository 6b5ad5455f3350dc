"""What numbers of drafts look like, in words; and the second implementation of n-gram drafting."""

import random

import pytest
from polydraft._loop.ngram import NgramDrafter
from polydraft_conformance.draft_counts import DraftCount, short_drafts
from polydraft_conformance.ngram_rule import ngram_drafts, unseen_steps


def counts(drafted, rejected=()):
    """Rounds of two tokens after a prompt of ten, with room for four drafts each."""
    return [DraftCount(2 * at, 10 + 2 * at, found, 4, at in rejected) for at, found in enumerate(drafted)]


@pytest.mark.parametrize(
    ("rounds", "cause"),
    [
        (counts([4] * 9), ""),
        (counts([4, 5, 4]), "k is off: 5 tokens were drafted in one round, but k=4"),
        (counts([3] * 9), "k is off: at most 3"),
        (counts([0] * 9), "The drafter is silent"),
        (counts([4] * 5 + [0] * 5), "Drafting stops after 10 output tokens, at a context of 20 tokens"),
        (counts([4, 4, 2, 4, 2, 4], rejected={2, 4}), "Fewer tokens are drafted after a rejected draft, in 2 of 6"),
        (counts([4, 3, 4, 4, 3, 4], rejected={2, 3}), "k is used only sometimes"),
    ],
)
def test_the_cause_is_named(rounds, cause):
    assert short_drafts(rounds, 4).startswith(cause)
    assert bool(short_drafts(rounds, 4)) == bool(cause)


def test_ngram_drafts_are_the_cores():
    draw = random.Random(1)
    text = [draw.randrange(4) for _ in range(200)]
    drafter, drafted = NgramDrafter(), 0
    for length, token in enumerate(text):
        assert ngram_drafts(text[:length], 4) == drafter.propose(4)
        drafted += bool(drafter.propose(4))
        drafter.extend([token])
    assert drafted > 100


def test_steps_that_no_look_up_can_find():
    assert unseen_steps([1, 2, 3, 1, 2, 3, 1], 4, 3) == 0
    assert unseen_steps([1, 2, 3, 1, 3, 2], 4, 2) == 2
