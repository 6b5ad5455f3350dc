"""N-gram drafting, written a second time: short and slow, to compare the core's and other engines' drafts with."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["continues", "ngram_drafts", "repeats", "unseen_steps"]

_LONGEST, _SHORTEST = 4, 2
_FOUND = 5
"""Whatever n-grams an engine looks up, one of so many tokens holds them."""


def ngram_drafts(text: Sequence[int], k: int) -> list[int]:
    """What the core should draft after a text: the k tokens after the latest earlier occurrence of its last n-gram.

    The longest n-gram of 4 to 2 tokens that occurred before decides; a text that ends there repeats itself.
    """
    for size in range(min(_LONGEST, len(text) - 1), _SHORTEST - 1, -1):
        last = tuple(text[-size:])
        for start in range(len(text) - size - 1, -1, -1):
            if tuple(text[start : start + size]) == last:
                follows = list(text[start + size :])
                return [follows[index % len(follows)] for index in range(k)]
    return []


def unseen_steps(text: Sequence[int], start: int, count: int) -> int:
    """How many of the tokens ``text[start:start + count]`` never followed their predecessor earlier in the text.

    Whatever looks n-grams up in the text proposes only steps that it has seen.
    """
    seen = set(pairwise(text[:start]))
    unseen = 0
    for place in range(start, start + count):
        step = (text[place - 1], text[place])
        unseen += step not in seen
        seen.add(step)
    return unseen


def repeats(text: Sequence[int], length: int) -> bool:
    """Whether the last five of the first ``length`` tokens occurred before: every look-up in the text finds them."""
    last = tuple(text[max(0, length - _FOUND) : length])
    return any(tuple(text[start : start + _FOUND]) == last for start in range(length - _FOUND))


def continues(text: Sequence[int], length: int) -> bool:
    """Whether every look-up finds the token that comes after the first ``length``: no other one ever came there."""
    last = tuple(text[length - 2 : length])
    after = {text[start + 2] for start in range(length - 2) if tuple(text[start : start + 2]) == last}
    return repeats(text, length) and after == {text[length]}
