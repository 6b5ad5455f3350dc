"""N-gram drafting against a rescan of the whole text."""

import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from polydraft._loop.ngram import NgramDrafter
from polydraft.errors import InvalidRequestError

sizes = st.tuples(st.integers(1, 4), st.integers(0, 4)).map(lambda pair: (pair[0], pair[0] + pair[1]))
# Few distinct ids, 0 among them, so that n-grams repeat.
texts = st.lists(st.integers(0, 3), max_size=60)


def rescan(tokens, k, min_ngram, max_ngram):
    """What the drafter should propose, by definition."""
    for size in range(max_ngram, min_ngram - 1, -1):
        if len(tokens) <= size:
            continue
        suffix = tokens[-size:]
        for end in range(len(tokens) - 1, size - 1, -1):  # exclusive ends, the nearest first
            if tokens[end - size : end] == suffix:
                text = list(tokens)
                for offset in range(k):
                    text.append(text[end + offset])
                return text[len(tokens) :]
    return []


@given(texts, sizes, st.integers(1, 9))
def test_proposes_what_a_rescan_finds_after_every_token(tokens, sizes, k):
    min_ngram, max_ngram = sizes
    drafter = NgramDrafter(max_ngram=max_ngram, min_ngram=min_ngram)
    for length in range(len(tokens)):
        drafter.extend(tokens[length : length + 1])
        assert drafter.propose(k) == rescan(tokens[: length + 1], k, min_ngram, max_ngram)


@given(texts, st.lists(st.integers(1, 7), max_size=60), sizes)
def test_pieces_make_no_difference(tokens, cuts, sizes):
    min_ngram, max_ngram = sizes
    whole = NgramDrafter(max_ngram=max_ngram, min_ngram=min_ngram)
    whole.extend(tokens)
    pieces = NgramDrafter(max_ngram=max_ngram, min_ngram=min_ngram)
    at = 0
    for cut in [*cuts, len(tokens)]:
        pieces.extend(iter(tokens[at : at + cut]))
        at += cut
        pieces.propose(3)
    assert pieces.length == whole.length == len(tokens)
    assert pieces.propose(5) == whole.propose(5)


@given(texts, st.integers(1, 8))
def test_a_shorter_proposal_is_a_prefix_of_a_longer_one(tokens, k):
    drafter = NgramDrafter()
    drafter.extend(tokens)
    assert drafter.propose(k) == drafter.propose(k + 3)[:k]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(1, 20))
def test_periodic_text_goes_on_past_its_end(period, k):
    drafter = NgramDrafter(max_ngram=6)
    drafter.extend(period * 8)
    assert drafter.propose(k) == (period * 21)[:k]


def test_the_most_recent_of_equally_long_matches_decides():
    drafter = NgramDrafter()
    drafter.extend([1, 2, 7, 9, 1, 2, 8, 9, 1, 2])
    assert drafter.propose(2) == [8, 9]


def test_a_longer_match_beats_a_more_recent_one():
    drafter = NgramDrafter()
    drafter.extend([5, 1, 2, 7, 6, 1, 2, 8, 5, 1, 2])
    assert drafter.propose(1) == [7]


def test_nothing_to_propose():
    drafter = NgramDrafter()
    assert drafter, "an empty drafter must not look like none"
    assert drafter.propose(4) == []
    drafter.extend([0])
    assert drafter.propose(4) == []
    drafter.extend([0])
    # [0, 0] has not occurred before: positions before the text do not count as zeros.
    assert drafter.propose(4) == []
    drafter.extend([0])
    assert drafter.propose(4) == [0, 0, 0, 0]
    assert drafter.propose(0) == []


@pytest.mark.parametrize(("min_ngram", "max_ngram"), [(0, 3), (3, 2), (-1, -1), (1, 0)])
def test_bad_sizes(min_ngram, max_ngram):
    with pytest.raises(InvalidRequestError, match="min_ngram"):
        NgramDrafter(min_ngram=min_ngram, max_ngram=max_ngram)


@pytest.mark.parametrize("token_id", [-1, 2**30 - 1])
def test_bad_ids_leave_what_was_before_them(token_id):
    drafter = NgramDrafter()
    with pytest.raises(InvalidRequestError, match="token id"):
        drafter.extend([1, 2, 3, 1, 2, token_id])
    assert drafter.length == 5
    assert drafter.propose(1) == [3]


def test_large_ids_do_not_mix():
    big = 2**30 - 2
    drafter = NgramDrafter()
    drafter.extend([big, 0, 5, 0, big, 6, big, 0])
    assert drafter.propose(1) == [5]


def test_a_long_context_costs_a_step_no_more_than_a_short_one():
    """A text 100 times as long must not be slower; generous, since machines are busy."""

    def seconds_per_step(length):
        drafter = NgramDrafter()
        drafter.extend((index * index + index // 7) % 1000 for index in range(length))
        best = float("inf")
        for _ in range(5):
            started = time.perf_counter()
            for step in range(200):
                drafter.propose(5)
                drafter.extend([step % 1000])
            best = min(best, time.perf_counter() - started)
        return best

    assert seconds_per_step(100_000) < 10 * seconds_per_step(1_000)


def test_memory_of_a_long_context_of_different_ngrams():
    drafter = NgramDrafter()
    drafter.extend((index * 2654435761 >> 7) % 262_144 for index in range(100_000))
    tables = [table for _, table in drafter._tables]
    keys = sum(sys.getsizeof(key) for table in tables for key in table)
    positions = sum(sys.getsizeof(position) for position in range(100_000))
    assert sum(map(sys.getsizeof, tables)) + keys + positions < 40e6
