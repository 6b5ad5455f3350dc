"""N-gram drafting: propose the tokens that followed the latest earlier occurrence of the text's last n-gram.

Prompt lookup decoding (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding), with an index that grows
with the text instead of rescans: a round costs no more with a context of 100,000 tokens than with one of 100.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from polydraft.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["NgramDrafter"]

_TOKEN_BITS = 30  # a digit of CPython's int, so that a packed n-gram, as a dict key, takes n digits of memory
_TOKEN_LIMIT = (1 << _TOKEN_BITS) - 1


class NgramDrafter:
    """Drafts for one sequence from its own tokens.

    The index maps every n-gram of each size to the position after its latest occurrence. A token costs
    O(``max_ngram``) dictionary operations, whatever the length. Memory: at most about 100 bytes per token and size, if
    all n-grams differ (30 MB for 100,000 tokens and three sizes); less if the text repeats itself.

    Args:
        max_ngram: Longest n-gram looked up; of several lengths that occurred before, the longest decides.
        min_ngram: Shortest n-gram that may decide. 1 drafts nearly always, and is mostly wrong.

    Raises:
        InvalidRequestError: Not 1 <= min_ngram <= max_ngram.
    """

    def __init__(self, *, max_ngram: int = 4, min_ngram: int = 2) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise InvalidRequestError(
                f"min_ngram={min_ngram} is greater than max_ngram={max_ngram}, or below 1.",
                "Give 1 <= min_ngram <= max_ngram.",
            )
        self._tokens: list[int] = []
        # The newest max_ngram tokens, each plus 1, packed with the newest in the lowest bits. So an n-gram is a masked
        # suffix, and one that would start before the text contains a 0, which no real n-gram does.
        self._suffix = 0
        # (mask of the n-gram's digits, n-gram -> position after it), longest first. The n-gram that ends the text is
        # entered only once a token follows it, so looking it up finds an earlier occurrence.
        self._tables: list[tuple[int, dict[int, int]]] = [
            ((1 << _TOKEN_BITS * size) - 1, {}) for size in range(max_ngram, min_ngram - 1, -1)
        ]

    @property
    def length(self) -> int:
        """Number of tokens so far."""
        return len(self._tokens)

    def extend(self, token_ids: Iterable[int]) -> None:
        """Append committed tokens: the prompt, then what each round emitted; never drafts.

        Args:
            token_ids: Ids from 0 to 2**30 - 2.

        Raises:
            InvalidRequestError: An id is out of range; the tokens before it have been appended.
        """
        tokens, tables, suffix = self._tokens, self._tables, self._suffix
        longest = tables[0][0]
        for token_id in token_ids:
            if not 0 <= token_id < _TOKEN_LIMIT:
                raise InvalidRequestError(f"{token_id} is not a token id.", "Ids are non-negative.")
            position = len(tokens)
            for mask, table in tables:
                table[suffix & mask] = position
            suffix = self._suffix = (suffix << _TOKEN_BITS | token_id + 1) & longest
            tokens.append(token_id)

    def propose(self, k: int) -> list[int]:
        """The tokens that followed the most recent earlier occurrence of the longest suffix that has one.

        If fewer than k tokens follow that occurrence, the text is periodic, and the proposal repeats the period.

        >>> drafter = NgramDrafter()
        >>> drafter.extend([5, 6, 7, 8, 5, 6, 7])  # ends with 5 6 7, which 8 5 6 followed before
        >>> drafter.propose(3)
        [8, 5, 6]
        >>> drafter.propose(6)  # the period, 8 5 6 7, repeats
        [8, 5, 6, 7, 8, 5]

        Args:
            k: Number of tokens wanted.

        Returns:
            k token ids, or none if no suffix of ``min_ngram`` tokens or more occurred before. Nothing is changed.
        """
        for mask, table in self._tables:
            start = table.get(self._suffix & mask)
            if start is not None:
                period = len(self._tokens) - start
                return [self._tokens[start + offset % period] for offset in range(k)]
        return []
