"""Which lengths of prompts are tried, and what failures at some of them are called."""

from random import Random

import pytest
from polydraft_conformance.lengths import CHUNKS, critical_lengths, pattern_of


@pytest.mark.parametrize("quick", [True, False])
def test_every_chunk_size_is_tried_from_both_sides(quick):
    lengths = critical_lengths(Random(1), 1000, quick=quick)
    assert {chunk + offset for chunk in CHUNKS for offset in (-1, 0, 1)} <= set(lengths)
    assert lengths == sorted(set(lengths))


def test_no_length_is_beyond_the_context():
    assert max(critical_lengths(Random(1), 130, quick=False)) <= 130


def test_another_seed_tries_others():
    assert critical_lengths(Random(1), 1000, quick=True) != critical_lengths(Random(2), 1000, quick=True)


@pytest.mark.parametrize(
    ("failed", "passed", "words"),
    [
        ({256, 512}, {1, 255, 257, 64, 128, 511}, "at multiples of 256"),
        ({65, 129}, {1, 2, 64, 66, 128}, "at one token past multiples of 64"),
        ({301, 512}, {1, 64, 257}, "from a length of 301 on (right up to 257)"),
        ({1}, {2, 3, 64}, "up to a length of 1"),
        ({3, 90}, {2, 64, 100}, "at the lengths 3, 90"),
        ({3, 90}, (), "at every length tried"),
    ],
)
def test_a_pattern_is_named(failed, passed, words):
    assert pattern_of(failed, passed).startswith(words)
