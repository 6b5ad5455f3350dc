"""Where drafts come from: the engine's own drafter, or n-grams of the text so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from polydraft.loop.ngram import NgramDrafter

if TYPE_CHECKING:
    from polydraft.contract.stepping import Chooser, EngineSequence

__all__ = ["DraftSource", "EngineDrafts", "NgramDrafts"]


class DraftSource(Protocol):
    """Proposes the tokens after the newest one."""

    def settled(self, token_ids: Sequence[int]) -> None:
        """Tell it tokens that are part of the sequence for good, each once and in order."""
        ...

    def propose(self, newest: int, k: int) -> list[int]:
        """At most k tokens, k >= 1, after ``newest``."""
        ...


class EngineDrafts:
    """Drafts of the engine's drafter."""

    def __init__(self, sequence: EngineSequence, chooser: Chooser) -> None:
        self._sequence = sequence
        self._chooser = chooser

    def settled(self, token_ids: Sequence[int]) -> None:
        """The engine learns of tokens by running them."""

    def propose(self, newest: int, k: int) -> list[int]:
        """See ``EngineSequence.propose``."""
        return self._sequence.propose(newest, k, self._chooser).token_ids


class NgramDrafts:
    """Drafts looked up in the text so far."""

    def __init__(self) -> None:
        self._drafter = NgramDrafter()

    def settled(self, token_ids: Sequence[int]) -> None:
        """Add the tokens to the index."""
        self._drafter.extend(token_ids)

    def propose(self, newest: int, k: int) -> list[int]:
        """``newest`` has been settled already; its continuation is looked up."""
        return self._drafter.propose(k)
