"""Lengths at which engines go wrong: very short prompts, and those around the sizes of chunks and blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection
    from random import Random

__all__ = ["CHUNKS", "SHORT", "critical_lengths", "pattern_of"]

SHORT = (1, 2, 3)
CHUNKS = (64, 128, 256, 512)
"""Sizes of prefill chunks, KV blocks and batches in use. One token too many or too few shows at their multiples."""
_MANY = 6
"""Lengths that a message lists."""


def critical_lengths(random: Random, longest: int, *, quick: bool) -> list[int]:
    """Lengths around the chunk sizes, at some of their multiples and at drawn ones, in order.

    Args:
        random: Draws multiples and lengths.
        longest: None is longer.
        quick: One further multiple of 64; otherwise all up to 512, and one beyond.
    """
    multiples = [length for length in range(64, 513, 64) if length not in CHUNKS]
    centres = {*CHUNKS, *([random.choice(multiples)] if quick else multiples)}
    if not quick:
        centres.add(64 * random.randint(9, 16))
    lengths = {centre + offset for centre in centres for offset in (-1, 0, 1)}
    lengths |= {random.randint(8, max(9, min(longest, 520))) for _ in range(2)}
    return sorted(length for length in lengths if 8 <= length <= longest)


def pattern_of(failed: Collection[int], passed: Collection[int]) -> str:
    """What lengths that failed have in common that the others do not have: words for the end of a sentence."""
    worst = sorted(failed)
    if not passed:
        return f"at every length tried, {_listed(worst)}"
    for chunk in sorted(CHUNKS, reverse=True):
        for offset, name in ((0, f"multiples of {chunk}"), (1, f"one token past multiples of {chunk}")):
            alike = all(n >= chunk and n % chunk == offset for n in worst)
            if alike and not any(n % chunk == offset for n in passed if n >= chunk):
                return f"at {name} ({_listed(worst)}; {_listed(sorted(passed))} are right)"
    if worst[0] > max(passed):
        return f"from a length of {worst[0]} on (right up to {max(passed)})"
    if worst[-1] < min(passed):
        return f"up to a length of {worst[-1]} (right from {min(passed)} on)"
    return f"at the lengths {_listed(worst)} ({_listed(sorted(passed))} are right)"


def _listed(lengths: list[int]) -> str:
    more = len(lengths) - _MANY
    return ", ".join(map(str, lengths[:_MANY])) + (f" and {more} more" if more > 0 else "")
