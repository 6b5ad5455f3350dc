"""Match stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopMatcher"]


class StopMatcher:
    """Finds the stop string that is completed first.

    Keeps only the tail that may still become a match: the cost of a character is bounded by the stop strings' lengths,
    not by the text's.

    Args:
        stops: Stop strings, none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max((len(stop) for stop in stops), default=0)
        self._tail = ""

    def feed(self, text: str) -> tuple[int, str] | None:
        """Append text.

        Returns:
            None, or (characters from the start of the match to the end of all text fed so far, the stop string) of the
            match in this text that ends first; of several that end there, the longest.
        """
        if not self._stops:
            return None
        match: tuple[int, str] | None = None
        for index, character in enumerate(text):
            self._tail = (self._tail + character)[-self._longest :]
            # After a match only the tail is kept up to date: before ``min_new_tokens`` the output continues.
            found = [] if match else [stop for stop in self._stops if self._tail.endswith(stop)]
            if found:
                stop = max(found, key=len)
                match = len(stop) + len(text) - index - 1, stop
        return match

    def held(self) -> int:
        """How many trailing characters may be the start of a match."""
        tail = self._tail
        # A whole stop string has matched already: at most all but its last character is held.
        longest = min(len(tail), self._longest - 1) if self._stops else 0
        for length in range(longest, 0, -1):
            end = tail[len(tail) - length :]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
