"""Where drafts come from: the engine's own drafter, or n-grams of the text so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from polydraft._loop.ngram import NgramDrafter

if TYPE_CHECKING:
    from polydraft.contract.stepping import EngineSequence, Sampler

__all__ = ["DraftSource", "EngineDrafts", "NgramDrafts"]


class DraftSource(Protocol):
    """Proposes the tokens after the newest one."""

    def commit(self, token_ids: Sequence[int]) -> None:
        """Add tokens that have become part of the output or are the prompt's: each once, in order."""
        ...

    def propose(self, newest: int, k: int) -> list[int]:
        """At most k tokens, k >= 1, after ``newest``."""
        ...


class EngineDrafts:
    """Drafts of the engine's drafter."""

    def __init__(self, sequence: EngineSequence, sampler: Sampler) -> None:
        self._sequence = sequence
        self._sampler = sampler

    def commit(self, token_ids: Sequence[int]) -> None:
        """Nothing to do: the engine sees committed tokens by running them."""

    def propose(self, newest: int, k: int) -> list[int]:
        """Run the engine's drafter."""
        return self._sequence.propose(newest, k, self._sampler).token_ids


class NgramDrafts:
    """Drafts looked up in the text so far."""

    def __init__(self) -> None:
        self._drafter = NgramDrafter()

    def commit(self, token_ids: Sequence[int]) -> None:
        """Add the tokens to the index."""
        self._drafter.extend(token_ids)

    def propose(self, newest: int, k: int) -> list[int]:
        """Look up the continuation of the text, which ends with ``newest``: it has been committed already."""
        return self._drafter.propose(k)
