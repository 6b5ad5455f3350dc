"""Level and power of the statistical proof (``polydraft_conformance.distribution``): why so many draws.

``python conformance/scripts/sampling_power.py > conformance/scripts/sampling_power.txt`` (some minutes).

Draws are simulated as cells: under the null hypothesis nine cells of 1/9 each, whatever the model. A bias is written as
a change of one token's distribution over its three cells, or as a change of the best token's probability, which the
cells then follow; its total variation is half the sum of the absolute changes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from polydraft_conformance.distribution import (
    ALPHA,
    DRAWS,
    QUICK_DRAWS,
    SUITE_FALSE_ALARM,
    TESTS,
    freedman,
    g_statistic,
    p_value,
)

CHUNK = 200_000
Floats = npt.NDArray[np.float64]

BIASES = {
    "0.1 in the cells of one token, most of it from one cell": [1 / 3 + 0.1, 1 / 3 - 0.05, 1 / 3 - 0.05],
    "0.1 in the cells of one token, to and from one cell each": [1 / 3 + 0.1, 1 / 3, 1 / 3 - 0.1],
}


def critical_value() -> float:
    """The G that a table must pass to be rejected."""
    return _limit(ALPHA)


def statistics(rng: np.random.Generator, draws: int, cells: Floats, runs: int) -> Floats:
    """G of ``runs`` simulated tables."""
    counts = rng.multinomial(draws, cells, size=runs).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = counts * np.log(counts * (cells.size / draws))
    found: Floats = 2.0 * np.where(counts > 0, terms, 0.0).sum(axis=1)
    return found


def false_alarms(rng: np.random.Generator, draws: int, runs: int) -> list[tuple[float, float]]:
    """(chi-square level, share of simulated tables beyond it)."""
    levels = (1e-2, 1e-3, 1e-4, 1e-5, ALPHA)
    cells = np.full(9, 1 / 9)
    beyond = np.zeros(len(levels))
    limits = np.array([_limit(level) for level in levels])
    for _ in range(runs // CHUNK):
        found = statistics(rng, draws, cells, CHUNK)
        beyond += (found[:, None] > limits[None, :]).sum(axis=0)
    return [(level, count / runs) for level, count in zip(levels, beyond, strict=True)]


def _limit(level: float) -> float:
    low, high = 0.0, 200.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(middle) > level else (low, middle)
    return high


def caught(rng: np.random.Generator, draws: int, cells: Floats, limit: float, runs: int = 20_000) -> float:
    """Share of runs in which a table with these cells is rejected."""
    return float((statistics(rng, draws, cells, runs) > limit).mean())


def counted(rng: np.random.Generator, draws: int, best: float, shift: float, runs: int = 20_000) -> float:
    """Share of runs in which the count of best tokens is rejected, if its probability is off at every place."""
    places = 5 * draws
    found = rng.binomial(places, best + shift, size=runs)
    variance = places * best * (1 - best)
    return float(np.mean([freedman(abs(count - places * best), variance) < ALPHA for count in found]))


def shifted_cells(best: float, becomes: float) -> Floats:
    """The cells of a token whose best one has probability ``best``, but comes out with probability ``becomes``."""
    edges = np.linspace(0.0, 1.0, 4)
    below = np.clip(np.minimum(edges[1:], best) - edges[:-1], 0.0, None)
    above = 1 / 3 - below
    rest = (1.0 - becomes) / (1.0 - best)
    cells: Floats = below * (becomes / best) + above * rest
    return cells


def main() -> None:
    """Print everything."""
    assert abs(g_statistic([10, 20, 30]) - 2 * (10 * np.log(0.5) + 30 * np.log(1.5))) < 1e-9
    rng = np.random.default_rng(20260101)
    limit = critical_value()
    print(f"level of the suite at most {SUITE_FALSE_ALARM:g}, of one of {TESTS} tests {ALPHA:g}: G > {limit:.2f}")
    print(f"draws: {DRAWS} in a full run, {QUICK_DRAWS} in a quick one\n")
    runs = 20_000_000
    for draws in (DRAWS, QUICK_DRAWS):
        print(f"False alarms of one table, {draws} draws, {runs:.0e} simulated tables:")
        shares = false_alarms(rng, draws, runs)
        for level, share in shares:
            print(f"  level {level:.0e}: {share:.2e}")
        tables = TESTS * 4 // 5
        print(f"  {tables} tables and {TESTS - tables} counts: {tables * shares[-1][1] + (TESTS - tables) * ALPHA:.2e}")
    third = np.full(3, 1 / 3)
    print("\nCaught (one biased token, in one table):")
    for name, parts in BIASES.items():
        cells = np.outer(parts, third).ravel()
        for draws in (QUICK_DRAWS, 1000, 1500, 1800, DRAWS):
            print(f"  {name}; {draws} draws: {caught(rng, draws, cells, limit):.4f}")
    print("\nCaught (the best token's own probability is off by 0.1 at every token, the others' in proportion):")
    for best in (0.3, 0.5, 0.652, 0.8, 0.9):
        for shift in (0.1, -0.1):
            changed = shifted_cells(best, min(best + shift, 1.0))
            cells = np.outer(changed, changed).ravel()
            shares = ", ".join(f"{draws} draws {caught(rng, draws, cells, limit):.4f}" for draws in (1000, DRAWS))
            print(f"  {best} becomes {min(best + shift, 1.0):.3f}: {shares} (in each of the tables)")
    print("\nCaught by the count of best tokens (five places a draw; Freedman's bound, which never alarms too often):")
    for best in (0.3, 0.5, 0.652, 0.8, 0.9):
        for shift in (0.05, 0.1):
            shares = ", ".join(
                f"{draws} draws {counted(rng, draws, best, shift):.4f}" for draws in (QUICK_DRAWS, DRAWS)
            )
            print(f"  {best} becomes {best + shift:.3f}: {shares}")
    print("\nCaught (a token of probability 0.652 always comes out, at one token only):")
    cells = np.outer(shifted_cells(0.652, 1.0), third).ravel()
    for draws in (120, 200, QUICK_DRAWS, DRAWS):
        print(f"  {draws} draws: {caught(rng, draws, cells, limit):.4f}")


if __name__ == "__main__":
    main()
