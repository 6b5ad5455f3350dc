"""The stop matcher against a search of the whole text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polydraft.text._stops import StopMatcher

short = st.text(alphabet="ab", min_size=1, max_size=4)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(stops=st.lists(short, max_size=3), texts=st.lists(st.text(alphabet="abc", max_size=6), max_size=8))
def test_matches_and_what_is_held(stops, texts):
    matcher, whole = StopMatcher(stops), ""
    for text in texts:
        found = matcher.feed(text)
        before, whole = len(whole), whole + text
        ends = [
            (end, -len(stop), stop)
            for stop in stops
            for end in range(before + 1, len(whole) + 1)
            if whole[:end].endswith(stop)
        ]
        if ends:
            end, _, stop = min(ends)
            assert found == (len(whole) - end + len(stop), stop)
        else:
            assert found is None
        wanted = [
            length
            for stop in stops
            for length in range(1, max(len(other) for other in stops))
            if length <= len(whole) and stop.startswith(whole[len(whole) - length :])
        ]
        assert matcher.held() == max(wanted, default=0)


def test_without_stops_nothing_is_held():
    matcher = StopMatcher([])
    assert matcher.feed("END") is None
    assert matcher.held() == 0


@pytest.mark.parametrize("length", [1, 1000])
def test_the_cost_of_a_character_does_not_grow_with_the_text(length):
    matcher = StopMatcher(["<end>"])
    matcher.feed("x" * length * 100)
    assert len(matcher._tail) <= 5
