"""Statistics say what happened."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from polydraft_conformance.catalog import check
from polydraft_conformance.claims import expect

if TYPE_CHECKING:
    from polydraft.contract import GenerationStats

    from polydraft_conformance.counting import Counts
    from polydraft_conformance.evidence import Evidence


@check(scope="case", after=("test_generates", "test_rounds_end_with_a_bonus_token"))
def test_statistics_equal_counts(polydraft_case: object, polydraft_evidence: Evidence) -> None:
    """Steps, rounds, drafted and accepted tokens equal the counts that the suite took at the engine."""
    for generation in polydraft_evidence.generations:
        counts = generation.counts
        if counts is None:
            _add_up(generation.speculative.stats)
            continue
        found = _from_stats(generation.speculative.stats, counts)
        for name, (said, counted) in found.items():
            expect(
                said == counted,
                f"Statistics are wrong: stats.{name} is {said}, but {counted} was counted at the engine "
                f"(prompt {generation.prompt.place} of the window).",
            )


@check(scope="case", after=("test_generates", "test_rounds_end_with_a_bonus_token", "test_statistics_equal_counts"))
def test_statistics_add_up(polydraft_evidence: Evidence) -> None:
    """Counts agree with one another and with the output; plain decoding drafts nothing."""
    for generation in polydraft_evidence.generations:
        _add_up(generation.speculative.stats)
        plain = generation.plain.stats
        for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens"):
            expect(getattr(plain, name) in (0, None), f"Plain decoding reports {name}={getattr(plain, name)}.")
        for stats in (plain, generation.speculative.stats):
            for name in ("prefill_seconds", "decode_seconds"):
                seconds = getattr(stats, name)
                expect(seconds is None or seconds >= 0, f"stats.{name} is {seconds}.")


def _from_stats(stats: GenerationStats, counts: Counts) -> dict[str, tuple[object, object]]:
    """Name -> (what the statistics say, what was counted)."""
    positions = stats.accepted_per_position
    shown = (
        None
        if positions is None
        else tuple(positions[: counts.longest]) + tuple(value for value in positions[counts.longest :] if value)
    )
    return {
        "num_target_steps": (stats.num_target_steps, counts.steps),
        "num_drafts": (stats.num_drafts, counts.rounds),
        "num_draft_tokens": (stats.num_draft_tokens, counts.drafted),
        "num_accepted_tokens": (stats.num_accepted_tokens, counts.accepted),
        "accepted_per_position": (shown, counts.per_position),
    }


def _add_up(stats: GenerationStats) -> None:
    """Relations that hold whatever the engine did; None says nothing and is no number."""
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
