"""Statistics: they equal what happened."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from polydraft_conformance.catalog import check
from polydraft_conformance.claims import expect

if TYPE_CHECKING:
    from polydraft.contract import GenerationStats

    from polydraft_conformance.bench import Bench

_COUNTS = ("num_target_steps", "num_drafts", "num_draft_tokens", "num_accepted_tokens")


@check(scope="case", after=("test_generates", "test_rounds_end_with_a_bonus_token"))
def test_statistics_equal_counts(polydraft_bench: Bench) -> None:
    """Steps, rounds, drafted and accepted tokens equal the counts that the suite took at the engine.

    Proves: Numbers are counted: steps, rounds, drafts and acceptance are what the suite saw at the engine.
    A failure means: A reported number is not what happened.
    Look at: `Generation.report`, and the counts given to `Generation.emit`. Drafts that were accepted but cut off by
    the end do not count.
    """
    for run in polydraft_bench.evidence.runs:
        stats, counts = run.speculative.stats, run.counts
        if counts is None:
            _add_up(stats)
            continue
        found = {name: (getattr(stats, name), getattr(counts, name)) for name in _COUNTS}
        positions, counted_positions = stats.accepted_per_position, counts.accepted_per_position or ()
        if positions is not None:  # zeros for positions that no round drafted are allowed
            longest = len(counted_positions)
            positions = (*positions[:longest], *(count for count in positions[longest:] if count))
        found["accepted_per_position"] = (positions, counted_positions)
        for name, (reported, counted) in found.items():
            expect(
                reported == counted,
                f"Statistics are wrong: stats.{name} is {reported}, but {counted} was counted at the engine "
                f"(prompt {run.prompt.place} of the window).",
            )


@check(scope="case", after=("test_generates", "test_rounds_end_with_a_bonus_token", "test_statistics_equal_counts"))
def test_statistics_add_up(polydraft_bench: Bench) -> None:
    """Counts agree with one another and with the output; plain decoding drafts nothing.

    Proves: Counts do not contradict each other or the output, and plain decoding reports no drafts.
    A failure means: A number is invented, counted twice, or belongs to another request.
    Look at: `Generation.report`: counters of the engine that are totals since its start, or that include other
    requests.
    """
    for run in polydraft_bench.evidence.runs:
        _add_up(run.speculative.stats)
        plain = run.plain.stats
        for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens"):
            expect(getattr(plain, name) in (0, None), f"Plain decoding reports {name}={getattr(plain, name)}.")
        for stats in (plain, run.speculative.stats):
            for name in ("prefill_seconds", "decode_seconds"):
                seconds = getattr(stats, name)
                expect(seconds is None or seconds >= 0, f"stats.{name} is {seconds}.")


def _add_up(stats: GenerationStats) -> None:
    """Relations that hold whatever the engine did. None means unknown and is not compared."""
    rounds, drafted, accepted = stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens
    said = f"rounds {rounds}, drafted {drafted}, accepted {accepted}, steps {stats.num_target_steps}"
    if drafted is not None and accepted is not None:
        expect(0 <= accepted <= drafted, f"Statistics are wrong: more accepted than drafted ({said}).")
    if drafted is not None and rounds is not None:
        expect(
            (drafted > 0) == (rounds > 0) and drafted >= rounds,
            f"Statistics are wrong: drafts without rounds ({said}).",
        )
    if stats.accepted_per_position is not None and accepted is not None:
        positions = stats.accepted_per_position
        expect(sum(positions) == accepted, f"Statistics are wrong: positions {positions} do not add up to {accepted}.")
        expect(
            all(left >= right for left, right in itertools.pairwise(positions)),
            f"Statistics are wrong: a later position is accepted more often than an earlier one: {positions}.",
        )
    if stats.num_target_steps is not None and accepted is not None:
        # The first token comes from prefill; each step adds its accepted drafts and one more. A limit may cut the last.
        most = 1 + stats.num_target_steps + accepted
        expect(
            most - 1 <= stats.num_tokens <= most,
            f"Statistics are wrong: {stats.num_tokens} tokens cannot come from these rounds ({said}).",
        )
