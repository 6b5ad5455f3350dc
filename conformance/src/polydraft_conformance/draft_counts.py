"""Is k drafted in every round that has room for it? And if not: where drafting stops, in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polydraft_conformance.counting import SequenceLog
    from polydraft_conformance.streams import Streamed

__all__ = ["DraftCount", "draft_counts", "expect_full_drafts", "short_drafts"]


@dataclass(frozen=True, slots=True)
class DraftCount:
    """One round: how many tokens were drafted, and how many there was room for."""

    before: int
    """Output tokens before it."""
    context: int
    """Tokens of prompt and output before it."""
    drafted: int
    room: int | None
    """min(k, what the limit leaves); None near the end of a whole engine's output, where engines differ."""
    rejected: bool
    """Whether the round before rejected a draft."""


def draft_counts(found: Streamed, log: SequenceLog | None, k: int) -> list[DraftCount] | None:
    """All rounds after the prefill; None where the engine reports no drafts by round.

    Args:
        found: An output that only its length limit ended.
        log: The engine's calls, which are counted where there are any; else the stream's rounds are.
        k: Tokens to draft.
    """
    rounds = found.rounds
    prompt, total = len(found.result.prompt_token_ids), len(found.token_ids)
    counts: list[DraftCount] = []
    for index, one in enumerate(rounds[1:]):
        if one.drafted is None or one.accepted is None:
            return None
        drafted = one.drafted
        if log is not None and index < len(log.steps):
            drafted = len(log.steps[index][0]) - 1
        # The bonus token always fits.
        left = total - one.before - 1
        room = min(k, left) if log is not None or left > 2 * k else None
        before = rounds[index]
        rejected = bool(before.drafted) and (before.accepted or 0) < (before.drafted or 0)
        counts.append(DraftCount(one.before, prompt + one.before, drafted, room, rejected))
    return counts


def expect_full_drafts(counts: Sequence[DraftCount], k: int, where: str, *, by_context: bool = False) -> None:
    """Fail unless every round drafts as many tokens as there is room for.

    Args:
        counts: All rounds of an output.
        k: Tokens to draft.
        where: Which output, for messages.
        by_context: Whether a long prompt alone is known to stop drafting.

    Raises:
        AssertionError: Some do not; the message says when drafting stops.
    """
    if cause := short_drafts(counts, k, by_context=by_context):
        raise AssertionError(f"{cause} ({where}, k={k}).")


def short_drafts(counts: Sequence[DraftCount], k: int, *, by_context: bool = False) -> str:
    """What is wrong with the numbers of drafts: a sentence without its full stop; empty if nothing is."""
    most = max((one.drafted for one in counts), default=0)
    if most > k:
        return f"k is off: {most} tokens were drafted in one round, but k={k}"
    judged = [one for one in counts if one.room]
    short = [one for one in judged if one.drafted < (one.room or 0)]
    if not short:
        return ""
    first, shortest = short[0], max(one.drafted for one in short)
    full = [one for one in judged if one not in short]
    if not any(one.room == k for one in full):
        most = max(one.drafted for one in judged)  # elsewhere there may have been drafts: of a short output
        if not most:
            return f"The drafter is silent: none of {len(judged)} rounds drafts anything"
        return f"k is off: at most {most} tokens were drafted in a round, but k={k}"
    said = "Drafting stops" if shortest == 0 else f"Fewer tokens are drafted, {shortest} and not {k},"
    tail = [one for one in judged if one.before >= first.before]
    if len(tail) == len(short) and len(short) > 2:
        here = f"after {first.before} output tokens, at a context of {first.context} tokens"
        if by_context:
            here = f"above a context of {first.context} tokens, here after {first.before} output tokens"
        return (
            f"{said} {here}: all {len(judged) - len(short)} rounds before draft {k}, none of the {len(short)} rounds "
            "from there on does"
        )
    share = f"in {len(short)} of {len(judged)} rounds"
    example = f"the first one after {first.before} output tokens drafts {first.drafted} and not {first.room}"
    roomy = [one for one in judged if one.room == k]
    after = [one for one in roomy if one.rejected]
    if all(one.rejected for one in short) and 2 * len(short) > len(after) and any(not one.rejected for one in roomy):
        return f"Fewer tokens are drafted after a rejected draft, {share}: {example}"
    if all(not one.rejected for one in short) and all(one.rejected for one in full):
        return f"Fewer tokens are drafted after a round without rejection, {share}: {example}"
    return f"k is used only sometimes: fewer tokens are drafted {share}: {example}"
