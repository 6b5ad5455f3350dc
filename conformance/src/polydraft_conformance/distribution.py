"""Statistical proof that samples follow the target's exact probabilities, for engines that cannot be compared by seed.

For every sampled token the target's probabilities at its position are known (the engine's own log-probabilities, which
``test_logprobs_equal_plain`` checks). They map the token to a number that is uniform on [0, 1) if and only if it was
drawn from them, whatever was drawn before (Rosenblatt 1952): tokens in the order of falling probability each own an
interval as long as their probability, and a fixed pseudo-random number says where in its interval a token lands. So
fixed cells have known probabilities without enumerating texts, and those of several positions are independent.

The cells, fixed in advance: three equal parts of [0, 1) at each of the output tokens 2 to k+2 (the first comes from
prefill), crossed for each two neighbouring tokens: k tables of nine cells of probability 1/9. Each is compared by a
G-test (Sokal and Rohlf); with eight degrees of freedom the chi-square tail has a closed form. One more test counts how
often the most probable token came out, over all of these positions: a drafter that is trusted too much shows there
first. Its p-value is Freedman's bound (1975, for martingales), which holds for any number of draws. Sizes and levels
come from ``scripts/sampling_power.py``, whose output is next to it.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polydraft.contract import TokenLogprobs

__all__ = [
    "ALPHA",
    "BEST",
    "DRAWS",
    "QUICK_DRAWS",
    "SUITE_FALSE_ALARM",
    "TESTS",
    "Proof",
    "Table",
    "freedman",
    "g_statistic",
    "judge_draws",
    "p_value",
    "uniform_place",
]

PARTS = 3
"""Cells of one token."""
SUITE_FALSE_ALARM = 1e-4
"""Probability that a full run of the suite fails an engine that samples correctly."""
TESTS = 125
"""The most tests in a run: 25 targets with drafters, each with four tables (k=4) and the count of best tokens."""
ALPHA = SUITE_FALSE_ALARM / TESTS / 2
"""Level of one test (Bonferroni). Halved: this far out in the tail, a G-test of 360 draws rejects up to twice as often
as the chi-square distribution predicts, as the script counts."""
DRAWS = 2000
"""Generations of a full run. A bias of 0.1 (total variation) is caught in 99 of 100 runs: in the cells of one single
token, or in the tokens' own probabilities if all drafted ones have it."""
QUICK_DRAWS = 360
"""Of a quick run: still catches a bias such as Transformers 5.22's (a token of probability 0.652 comes out always)."""
BEST = 20
"""Best tokens requested at each position, which all engines can give; the others share the interval after them."""


@dataclass(frozen=True, slots=True)
class Table:
    """Two neighbouring output tokens, crossed."""

    first: int
    """Number of the first of the two output tokens, from 1."""
    counts: tuple[int, ...]
    """Nine cells, the first token's part slowest."""
    statistic: float
    p_value: float


@dataclass(frozen=True, slots=True)
class Proof:
    """The result of a number of draws."""

    draws: int
    tables: tuple[Table, ...]
    best_token: tuple[float, float]
    """Share of tokens that were the most probable one: as found, and as the target's probabilities say."""
    best_token_p_value: float

    @property
    def worst(self) -> Table:
        """The table that fits least."""
        return min(self.tables, key=lambda table: table.p_value)

    @property
    def biased(self) -> bool:
        """Whether any test rejects."""
        return min(self.worst.p_value, self.best_token_p_value) < ALPHA

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "draws": self.draws,
            "alpha": ALPHA,
            "smallest_p_value": min(self.worst.p_value, self.best_token_p_value),
            "best_token_p_value": self.best_token_p_value,
            "best_token_found": round(self.best_token[0], 4),
            "best_token_expected": round(self.best_token[1], 4),
            "tables": [
                {"tokens": [table.first, table.first + 1], "counts": list(table.counts), "p_value": table.p_value}
                for table in self.tables
            ],
        }

    def in_words(self) -> str:
        """The finding for a message; its first line names it."""
        worst = self.worst
        found, expected = self.best_token
        return (
            f"the most probable token came out in {found:.1%} of the places, the target gives it {expected:.1%} "
            f"(p <= {self.best_token_p_value:.2g}).\n"
            f"Output tokens {worst.first} and {worst.first + 1} in nine cells that are equally probable "
            f"({self.draws / len(worst.counts):.1f} expected in each): {list(worst.counts)}; "
            f"G = {worst.statistic:.1f}, p = {worst.p_value:.2g}, level {ALPHA:.0e} ({self.draws} draws)."
        )


def uniform_place(entry: TokenLogprobs, inside: float) -> float:
    """Where a sampled token lies on [0, 1): uniform if it was drawn from the probabilities given.

    Args:
        entry: The sampled token with its log-probability and the best ones.
        inside: A number in [0, 1) that has nothing to do with the token.
    """
    before = 0.0
    for token, logprob in sorted(entry.top, key=lambda pair: (-pair[1], pair[0])):
        probability = math.exp(logprob)
        if token == entry.token_id:
            # Below 1: rounding must not lead to a part after the last.
            return min(before + inside * probability, 1.0 - 1e-12)
        before += probability
    return min(before + inside * max(0.0, 1.0 - before), 1.0 - 1e-12)


def judge_draws(draws: Sequence[Sequence[TokenLogprobs]]) -> Proof:
    """Compare draws with the probabilities they should follow.

    Args:
        draws: For each generation the entries of its output tokens 1 to k+2, in order; all of one length, at least 3.
    """
    length = len(draws[0])
    parts: list[list[int]] = []
    found = expected = variance = 0.0
    for number, draw in enumerate(draws):
        places = []
        for index, entry in enumerate(draw[1:], start=1):
            # Python promises that a string seeds the same numbers everywhere.
            inside = random.Random(f"polydraft {number} {index}").random()
            places.append(int(uniform_place(entry, inside) * PARTS))
            # Ties go to the smaller id, as in ``uniform_place``.
            best = max(entry.top, key=lambda pair: (pair[1], -pair[0]))
            found += entry.token_id == best[0]
            share = math.exp(best[1])
            expected += share
            # Of one 0-1 draw, given the tokens before it.
            variance += share * (1.0 - share)
        parts.append(places)
    tables = []
    for index in range(length - 2):
        counts = [0] * PARTS**2
        for places in parts:
            # places[0] belongs to output token 2, the first that can be drafted.
            counts[PARTS * places[index] + places[index + 1]] += 1
        statistic = g_statistic(counts)
        tables.append(Table(index + 2, tuple(counts), statistic, p_value(statistic)))
    total = len(draws) * (length - 1)
    bound = freedman(abs(found - expected), variance)
    return Proof(len(draws), tuple(tables), (found / total, expected / total), bound)


def g_statistic(counts: Sequence[int]) -> float:
    """``2 * sum(O * ln(O / E))`` for cells of equal probability."""
    # Empty cells add nothing: x * ln(x) tends to 0.
    expected = sum(counts) / len(counts)
    return 2.0 * sum(count * math.log(count / expected) for count in counts if count)


def freedman(distance: float, variance: float) -> float:
    """Bound of the chance that a sum of centred 0-1 draws is so far from 0, up or down, whatever their order.

    Args:
        distance: Of the sum from 0.
        variance: Sum of the draws' variances, each given the draws before it.
    """
    return min(1.0, 2.0 * math.exp(-(distance**2) / (2.0 * (variance + distance / 3.0)))) if distance else 1.0


def p_value(statistic: float, degrees: int = PARTS**2 - 1) -> float:
    """Upper tail of the chi-square distribution, for an even number of degrees of freedom.

    ``exp(-x/2) * sum((x/2)**j / j!, j < degrees/2)`` (Abramowitz and Stegun 26.4.5).
    """
    half = statistic / 2.0
    term = total = 1.0
    for j in range(1, degrees // 2):
        term *= half / j
        total += term
    return math.exp(-half) * total
