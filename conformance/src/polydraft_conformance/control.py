"""How often blocks alone flip a choice: the plain output scored again in blocks of k+1, without any drafter."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from polydraft.verification import GreedySampler

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polydraft.contract import SteppingEngine

__all__ = ["chance_of_at_least", "flip_shares"]


def flip_shares(engine: SteppingEngine, prompt: Sequence[int], output: Sequence[int], rows: int) -> list[float]:
    """Score an output in blocks of ``rows`` tokens, once for each place of the blocks' first cut.

    Args:
        engine: The engine.
        prompt: The prompt.
        output: Its plain greedy output.
        rows: Tokens of a block, at most ``max_draft_tokens + 1``.

    Returns:
        For each output token after the first: the share of its possible places in a block at which the blocks choose
        another token than single steps.
    """
    sampler = GreedySampler(engine)
    counts = [0] * (len(output) - 1)
    # Every phase of the blocks: each token is scored once at each of the ``rows`` places.
    for offset in range(1, rows + 1):
        with closing(engine.open_sequence()) as sequence:
            sequence.prefill(list(prompt), sampler)
            start = 0
            while start < len(output) - 1:
                end = min(offset if start == 0 else start + rows, len(output) - 1)
                chosen = sequence.verify(list(output[start:end]), sampler).token_ids
                for index, token in enumerate(chosen):
                    # Row i of a block chooses the token after output[start + i].
                    counts[start + index] += token != output[start + index + 1]
                start = end
    return [count / rows for count in counts]


def chance_of_at_least(count: int, shares: Sequence[float]) -> float:
    """Probability that at least ``count`` of the independent events with probabilities ``shares`` occur.

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
