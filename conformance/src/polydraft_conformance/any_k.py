"""Rounds of any k on a session whose k is fixed: what a schedule could pick, drawn at random."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from polydraft.contract import EngineSequence, Proposal, Sampler

from polydraft_conformance.counting import WrappedSequence, wrapped_sequences

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

    from polydraft.contract import SteppingEngine

__all__ = ["any_k"]


class _AnyKSequence(WrappedSequence):
    """Asks the engine for fewer drafts than the loop does, or for none; to the engine that is a round of that k."""

    def __init__(self, inner: EngineSequence, random: Random) -> None:
        super().__init__(inner)
        self.random = random
        self.drawn: list[int] = []
        """k of the rounds to come."""

    def propose(self, newest: int, k: int, sampler: Sampler, *, keep_logits: bool = False) -> Proposal:
        if not self.drawn:
            # Stretches without drafts, some longer than a step; then rounds that draft, each another number.
            self.drawn = [0] * self.random.choice((1, 2, k + 3)) + [
                self.random.randint(1, k) for _ in range(self.random.randint(1, 3))
            ]
        wanted = min(k, self.drawn.pop(0))
        # A plain round does not call the drafter at all.
        return super().propose(newest, wanted, sampler, keep_logits=keep_logits) if wanted else Proposal([])


@contextmanager
def any_k(engine: SteppingEngine, random: Random) -> Iterator[None]:
    """Inside the ``with`` block, every round of every sequence drafts a random number of tokens, or none."""
    with wrapped_sequences(engine, lambda inner: _AnyKSequence(inner, random)):
        yield
