"""Statistics against what happened: the rounds that a stream shows, and the suite's counts at a stepping engine.

A whole engine reports what it drafted, so its counts are held to what cannot be made up: a round gives its accepted
drafts and one token of the target, and totals are the sums over the rounds.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from polydraft.contract import GenerationStats

from polydraft_conformance.claims import expect
from polydraft_conformance.counting import count_log

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polydraft_conformance.counting import SequenceLog
    from polydraft_conformance.streams import SeenRound, Streamed

__all__ = ["Counted", "expect_sound_rounds", "expect_true_statistics", "seen_counts"]

_COUNTS = ("num_target_steps", "num_drafts", "num_draft_tokens", "num_accepted_tokens")
_CLOCKS_DIFFER, _SECONDS = 1.05, 0.05
"""An engine in another process has its own clock: its times may be longer than the suite's by this share and time."""
_MANY_ROUNDS = 8
_FEW_ROUNDS = 8
"""In so few rounds with drafts, all may have an accepted one."""


@dataclass(frozen=True, slots=True)
class Counted:
    """A generation whose statistics are judged."""

    where: str
    """For messages."""
    found: Streamed
    log: SequenceLog | None
    """The engine's calls; None for a whole engine."""

    @property
    def reported(self) -> GenerationStats:
        """The result's."""
        return self.found.result.stats

    @property
    def truths(self) -> list[tuple[str, GenerationStats]]:
        """The counts of the suite: who counted, and what."""
        found = []
        if self.log is not None:
            found.append(("at the engine", count_log(self.log, len(self.found.token_ids))))
        seen = seen_counts(self.found.rounds)
        if seen is not None:
            found.append(("in the stream's rounds", seen))
        return found


def seen_counts(rounds: Sequence[SeenRound]) -> GenerationStats | None:
    """The statistics of a stream's rounds; None without any, or where the engine does not report all their drafts.

    ``accepted_per_position`` is as long as the longest draft.
    """
    counts = [(one.drafted, one.accepted) for one in rounds if one.drafted is not None and one.accepted is not None]
    if not rounds or len(counts) < len(rounds):
        return None
    drafts = [(drafted, accepted) for drafted, accepted in counts if drafted]
    longest = max((drafted for drafted, _ in drafts), default=0)
    return GenerationStats(
        num_tokens=sum(one.tokens for one in rounds),
        num_target_steps=max(len(rounds) - 1, 0),
        num_drafts=len(drafts),
        num_draft_tokens=sum(drafted for drafted, _ in drafts),
        num_accepted_tokens=sum(accepted for _, accepted in drafts),
        accepted_per_position=tuple(sum(accepted > place for _, accepted in drafts) for place in range(longest)),
    )


def expect_sound_rounds(streams: Sequence[tuple[str, Streamed]]) -> None:
    """Every round that reports its counts gave its accepted drafts and one token; the last one may be cut.

    Args:
        streams: Each with its name for messages. Those of one session together show what is counted wrongly.
    """
    drafting: list[SeenRound] = []
    wrong: list[tuple[str, SeenRound]] = []
    for where, found in streams:
        last = len(found.rounds) - 1
        for one in found.rounds:
            if one.drafted is None or one.accepted is None:
                continue
            # The end of the output may cut the bonus token off.
            if one.tokens - one.accepted not in ((0, 1) if one.number == last else (1,)):
                wrong.append((where, one))
            if one.drafted and one.number < last:
                drafting.append(one)
    if not wrong:
        return
    where, first = wrong[0]
    claim = (
        f"round {first.number} gave {first.tokens} tokens and reports {first.accepted} accepted of {first.drafted} "
        f"drafts ({where})"
    )
    if all(one.tokens == one.accepted for _, one in wrong):
        # Dropped, it leaves rounds without an accepted draft as they are; counted, it leaves no such rounds, but does
        # leave rounds of k + 1 tokens.
        none, full = (
            any(one.accepted == 0 for one in drafting),
            any(one.tokens > (one.drafted or 0) for one in drafting),
        )
        if none or not (full or len(drafting) > _FEW_ROUNDS):
            raise AssertionError(
                f"The bonus token is missing: {claim}, all of them accepted drafts. The target's own token after them "
                "was computed and dropped."
            )
        raise AssertionError(
            f"The bonus token is counted as an accepted draft: {claim}. One token of each round is the target's own, "
            f"and none of the {len(drafting)} rounds with drafts reports 0 accepted ones."
        )
    if all(not one.drafted for _, one in wrong):
        raise AssertionError(
            f"Statistics are wrong: 0 is reported for drafts that were made: {claim}. Without drafts a round gives one "
            "token; what is not known is None."
        )
    raise AssertionError(
        f"Statistics are wrong: accepted drafts are not those of the round: {claim}. A round gives its accepted drafts "
        "and one token of the target."
    )


def expect_true_statistics(runs: Sequence[Counted]) -> int:
    """Statistics equal the suite's counts, where there are any, and agree with one another elsewhere.

    Args:
        runs: Generations of one session, in their order.

    Returns:
        How many of them could be compared with counts of the suite.

    Raises:
        AssertionError: One is wrong; the message names the likely cause.
    """
    compared = 0
    # Without drafts there are no rounds: a server's answers may hold several tokens.
    speculative = [run for run in runs if run.found.result.speculation_off is None]
    expect_sound_rounds([(run.where, run.found) for run in speculative])
    for index, run in enumerate(runs):
        _expect_possible_times(run)
        tokens = len(run.found.token_ids)
        expect(
            run.reported.num_tokens == tokens == len(run.found.result.token_ids),
            f"Statistics are wrong: stats.num_tokens is {run.reported.num_tokens}, the stream gave {tokens} tokens "
            f"({run.where}).",
        )
        if run not in speculative:
            _expect_no_drafts(run)
            continue
        if not run.truths:
            if run.found.result.finish_reason != "cancelled":  # its last step may have been dropped
                expect_agreement(run.reported, run.where)
            continue
        compared += 1
        for source, truth in run.truths:
            for name, reported, counted in _differences(run.reported, truth):
                raise AssertionError(
                    f"Statistics are wrong: {_cause(runs, index, truth)}stats.{name} is {reported}, but {counted} was "
                    f"counted {source} ({run.where})."
                )
    return compared


def expect_agreement(stats: GenerationStats, where: str) -> None:
    """Relations that hold whatever the engine did. None means unknown and is not compared."""
    rounds, drafted, accepted = stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens
    said = f"rounds {rounds}, drafted {drafted}, accepted {accepted}, steps {stats.num_target_steps}; {where}"
    if drafted is not None and accepted is not None:
        expect(0 <= accepted <= drafted, f"Statistics are wrong: more accepted than drafted ({said}).")
    if drafted is not None and rounds is not None:
        expect(
            (drafted > 0) == (rounds > 0) and drafted >= rounds,
            f"Statistics are wrong: drafts without rounds ({said}).",
        )
    if stats.accepted_per_position is not None and accepted is not None:
        positions = stats.accepted_per_position
        expect(
            sum(positions) == accepted,
            f"Statistics are wrong: positions {positions} do not add up to {accepted} ({said}).",
        )
        expect(
            all(left >= right for left, right in itertools.pairwise(positions)),
            f"Statistics are wrong: a later position is accepted more often than an earlier one: {positions}.",
        )
        expect(
            rounds is None or not positions or positions[0] <= rounds,
            f"Statistics are wrong: the first draft was accepted more often than there were rounds: {positions} "
            f"({said}).",
        )
    if rounds is not None and stats.num_target_steps is not None:
        expect(
            rounds <= stats.num_target_steps,
            f"Statistics are wrong: more rounds than steps of the target ({said}).",
        )
    if stats.num_target_steps is not None and accepted is not None and stats.num_tokens:
        # The first token comes from prefill; each step adds its accepted drafts and one more. The end may cut the last.
        most = 1 + stats.num_target_steps + accepted
        expect(
            most - 1 <= stats.num_tokens <= most,
            f"Statistics are wrong: {stats.num_tokens} tokens cannot come from these rounds ({said}).",
        )


def _differences(stats: GenerationStats, truth: GenerationStats) -> list[tuple[str, object, object]]:
    """(name, reported, counted) of every count that is not true; a count that is not reported is one."""
    found = [
        (name, getattr(stats, name), getattr(truth, name))
        for name in _COUNTS
        if getattr(stats, name) != getattr(truth, name)
    ]
    positions, counted = stats.accepted_per_position, truth.accepted_per_position or ()
    if positions is not None:  # zeros for positions that no round drafted are allowed
        positions = (*positions[: len(counted)], *(count for count in positions[len(counted) :] if count))
    if positions != counted:
        found.append(("accepted_per_position", stats.accepted_per_position, counted))
    return found


def _cause(runs: Sequence[Counted], index: int, truth: GenerationStats) -> str:
    """What the first wrong statistics look like, from all runs: a clause for the message, or nothing."""
    stats = runs[index].reported
    drafted, accepted, rounds = stats.num_draft_tokens, stats.num_accepted_tokens, stats.num_drafts
    names = {name for name, _, _ in _differences(stats, truth)}
    if None in (drafted, accepted, rounds):
        return "a count is None though its rounds report it: "
    assert drafted is not None
    assert accepted is not None
    assert rounds is not None
    true_drafted, true_accepted = truth.num_draft_tokens or 0, truth.num_accepted_tokens or 0
    true_rounds = truth.num_drafts or 0
    if drafted != accepted and (drafted, accepted) == (true_accepted, true_drafted):
        return "drafted and accepted are swapped: "
    earlier = [known[0][1] for run in runs[:index] if (known := run.truths)]
    sums = [
        (drafted - true_drafted, [one.num_draft_tokens or 0 for one in earlier]),
        (accepted - true_accepted, [one.num_accepted_tokens or 0 for one in earlier]),
    ]
    if any(more > 0 and before and more in (before[-1], sum(before)) for more, before in sums) or all(
        more > 0 and before and more >= sum(before) > 0 for more, before in sums
    ):
        return "counts of earlier requests are added: "
    known_runs = [
        (run.reported, known[0][1]) for run in runs if (known := run.truths) and run.reported.num_draft_tokens
    ]
    made_up = len(known_runs) > 2 and _constant([claimed for claimed, _ in known_runs])
    if made_up and not _constant([counted for _, counted in known_runs]):
        return f"the acceptance rate is made up, about {stats.acceptance_rate:.2f} in each of {len(runs)} outputs: "
    if drafted == true_drafted and all(
        (claimed.num_accepted_tokens or 0) - (counted.num_accepted_tokens or 0) == counted.num_drafts
        for claimed, counted in known_runs
    ):
        return "the bonus tokens are counted as accepted drafts: "
    if accepted > true_accepted and names <= {"num_accepted_tokens", "accepted_per_position"}:
        last = runs[index].found.rounds[-1]
        if accepted - true_accepted <= (last.drafted or 0):
            return (
                f"accepted drafts after the end of the output ({runs[index].found.result.finish_reason}) are counted: "
            )
        return "more drafts are counted as accepted than came out: "
    if names == {"accepted_per_position"}:
        return "acceptance by position is not what was accepted: "
    if abs(rounds - true_rounds) == 1 or abs((stats.num_target_steps or 0) - (truth.num_target_steps or 0)) == 1:
        more = rounds > true_rounds or (stats.num_target_steps or 0) > (truth.num_target_steps or 0)
        return f"one round too {'many' if more else 'few'} is counted: "
    if 0 in (drafted, accepted, rounds):
        return "0 is reported for what happened: "
    return ""


def _expect_no_drafts(run: Counted) -> None:
    """Where a result says that it was decoded plainly, nothing was drafted."""
    for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens"):
        reported = getattr(run.reported, name)
        expect(reported in (0, None), f"Statistics are wrong: plain decoding reports {name}={reported} ({run.where}).")


def _constant(runs: Sequence[GenerationStats]) -> bool:
    """Whether one acceptance rate explains all counts, rounded to tokens."""
    pairs = [(one.num_accepted_tokens or 0, one.num_draft_tokens or 1) for one in runs]
    return max((accepted - 1) / drafted for accepted, drafted in pairs) <= min(
        (accepted + 1) / drafted for accepted, drafted in pairs
    )


def _expect_possible_times(run: Counted) -> None:
    """Times are not negative, not longer than the suite waited, and not zero for many rounds."""
    stats = run.reported
    for name in ("prefill_seconds", "decode_seconds"):
        seconds = getattr(stats, name)
        expect(seconds is None or seconds >= 0, f"stats.{name} is {seconds} ({run.where}).")
    if stats.decode_seconds is None:
        return
    claimed = stats.decode_seconds + (stats.prefill_seconds or 0.0)
    expect(
        claimed <= _CLOCKS_DIFFER * run.found.seconds + _SECONDS,
        f"Times are wrong: stats say that prefill and decoding took {claimed:.3f} s, but the caller waited "
        f"{run.found.seconds:.3f} s only ({run.where}).",
    )
    expect(
        stats.decode_seconds > 0 or len(run.found.rounds) < _MANY_ROUNDS,
        f"Times are wrong: 0 seconds are reported for {len(run.found.rounds)} rounds; what is not measured is None "
        f"({run.where}).",
    )
