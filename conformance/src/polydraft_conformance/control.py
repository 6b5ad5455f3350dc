"""How often blocks alone turn a choice: the plain output scored again in blocks of k+1, without any drafter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from polydraft_conformance.primitives import greedy, open_sequence

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polydraft.contract import SteppingEngine

__all__ = ["Turns", "chance_of_at_least", "turns"]


@dataclass(frozen=True, slots=True)
class Turns:
    """At which output tokens blocks choose otherwise than single steps."""

    shares: tuple[float, ...]
    """For each output token after the first: in what share of the places it can have in a block the choice turns."""

    @property
    def expected(self) -> float:
        """How many tokens turn in one run, on average."""
        return sum(self.shares)


def turns(engine: SteppingEngine, prompt: Sequence[int], output: Sequence[int], rows: int) -> Turns:
    """Score an output in blocks of ``rows`` tokens, once for each place of the blocks' first cut.

    Args:
        engine: The engine.
        prompt: The prompt.
        output: Its plain greedy output.
        rows: Tokens of a block, at most ``max_draft_tokens + 1``.
    """
    sampler = greedy(engine)
    counts = [0] * (len(output) - 1)
    for offset in range(1, rows + 1):
        with open_sequence(engine) as sequence:
            sequence.prefill(list(prompt), sampler)
            start = 0
            while start < len(output) - 1:
                end = min(offset if start == 0 else start + rows, len(output) - 1)
                chosen = sequence.verify(list(output[start:end]), sampler).token_ids
                for index, token in enumerate(chosen):
                    counts[start + index] += token != output[start + index + 1]
                start = end
    return Turns(tuple(count / rows for count in counts))


def chance_of_at_least(count: int, shares: Sequence[float]) -> float:
    """Probability that at least ``count`` of independent events happen, whose probabilities are ``shares``.

    The Poisson-binomial distribution, by its exact recursion.
    """
    distribution = [1.0]
    for share in shares:
        if share == 0.0:
            continue
        shifted = [0.0, *distribution]
        distribution = [
            stay * (1 - share) + come * share for stay, come in zip([*distribution, 0.0], shifted, strict=True)
        ]
    return min(1.0, sum(distribution[count:]))
