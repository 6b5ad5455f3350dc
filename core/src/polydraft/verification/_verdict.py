"""Verdicts on two outputs that should be the same: EXACT, NEAR_TIE or DIVERGED.

A verdict holds for a pair on a backend with its engine's version, dtype and hardware, never for a backend as such.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from pydantic import Field, field_validator

from polydraft.contract.records import Record

__all__ = ["MARGIN_LIMIT", "VERDICTS", "Judgement", "Tie", "Verdict", "first_difference", "judge"]

Verdict = Literal["EXACT", "NEAR_TIE", "DIVERGED"]
"""``EXACT``: the same tokens. ``NEAR_TIE``: they differ first where two tokens lie within the numeric noise, and a
control without any drafter chooses the other one too. ``DIVERGED``: any other difference, a defect."""

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)

MARGIN_LIMIT = 2.0
"""Largest margin of a near tie, in units of the noise: each of the two logits may have moved by the noise."""


class Tie(Record):
    """Measurements at the first token that differs. Nothing in it comes from a run with a drafter."""

    source: Literal["logits", "logprobs"]
    values: tuple[float | None, float | None] = Field(
        description="Logits as the rule sees them (or natural-log probabilities) of the plain output's token and the "
        "other one, in plain decoding; None: not finite, or not among those that the engine reports."
    )
    margin: float | None = Field(
        description="By how much the plain output's token was ahead, in logits. Under sampling the difference of the "
        "noise terms times the temperature is in it. None: not known."
    )
    noise: float | None = Field(
        description="Largest difference of one logit between plain decoding and the control, at other positions, and "
        "from logits at least one rounding of the two tokens' own; None: there was no other position."
    )
    noise_here: float | None = Field(
        default=None, description="The same at this position, which does not widen the margin; None: not measured."
    )
    noise_alone: float | None = Field(
        default=None,
        description="The same at this position between plain decoding and other runs that give it a step of one token, "
        "after other prefills and after steps of several tokens; what a step of several tokens gets wrong at this "
        "position is not in it, so it widens the margin. None: not measured, as the noise at other positions is "
        "enough, or the target is no mixture of experts.",
    )
    steps: float | None = Field(
        default=None,
        description="Largest difference of one raw logit (before biases, penalties and processors) between plain "
        "decoding and the control, at this position and the others; None: not measured, or not finite.",
    )
    explained: float | None = Field(
        default=None,
        description="The largest difference that rounding explains, by the dtype and by the engine's noise on another "
        "context; None: not measured.",
    )
    cut: bool = Field(
        default=False,
        description="A filter (top_k, top_p, min_p, typical_p) leaves one of the two tokens out, in plain decoding or "
        "in the control: the filter's cut-off lies between them, so the margin is meaningless.",
    )
    control: tuple[int, ...] = Field(
        description="What the control chose at this position: the same prefix without any drafter, in blocks of k+1 "
        "tokens, once for each place of the position in its block (from log-probabilities: in one prefill, and, where "
        "that is not enough, decoded after other prefills and in batches of equal prompts); where they "
        "are known, also in blocks as long as the rounds of the other output; where KV was reused, also once for each "
        "of several ways to run the reused tokens in prefills of parts and in blocks; where none of these chooses the "
        "other token of a near tie, also in blocks of 2 to k tokens, and in steps of mixed lengths, "
        "some of which run tokens that are taken back."
    )

    @property
    def counted_noise(self) -> float | None:
        """The noise that the margin is measured in: at other positions, and that of single steps at this one."""
        if self.noise is None or self.noise_alone is None:
            return self.noise
        alone = self.noise_alone if self.explained is None else min(self.noise_alone, self.explained)
        return max(self.noise, alone)

    @field_validator("values", "margin", "noise", "noise_here", "noise_alone", "steps", "explained", mode="before")
    @classmethod
    def _finite(cls, value: Any) -> Any:
        """Infinities and NaN carry no information, and JSON has no form for them."""
        if isinstance(value, tuple):
            return tuple(map(cls._finite, value))
        return None if isinstance(value, float) and not math.isfinite(value) else value


class Judgement(Record):
    """A verdict with its evidence."""

    verdict: Verdict
    position: int | None = Field(default=None, description="Index of the first output token that differs.")
    tokens: tuple[int | None, int | None] | None = Field(
        default=None, description="The plain output's token there and the other one; None: that output had ended."
    )
    tie: Tie | None = None
    reason: str = Field(default="", description="Why it is not EXACT: sentences.")
    unit: Literal["token", "character"] = Field(
        default="token", description="What was compared: characters where the engine gives text, not tokens."
    )

    @property
    def passes(self) -> bool:
        """Whether speculation kept its promise."""
        return self.verdict != "DIVERGED"

    @property
    def follows(self) -> bool:
        """Whether the verdict follows from the evidence: it is judged again. A defect needs none."""
        if self.verdict == "EXACT":
            return self.position is None and self.tokens is None and self.tie is None
        if self.verdict == "NEAR_TIE":
            own, other = self.tokens or (None, None)
            return None not in (self.position, own, other) and self.tie is not None and not _fault(self.tie, other)
        return True

    @property
    def margin_in_noise(self) -> float | None:
        """The margin in units of the noise."""
        if self.tie is None or self.tie.margin is None or not self.tie.counted_noise:
            return None
        return self.tie.margin / self.tie.counted_noise


def first_difference(expected: Sequence[int], found: Sequence[int]) -> int | None:
    """Index of the first token that differs, the shorter one's end included; None if they are equal."""
    for index, (left, right) in enumerate(zip(expected, found, strict=False)):
        if left != right:
            return index
    return None if len(expected) == len(found) else min(len(expected), len(found))


def judge(
    expected: Sequence[int],
    found: Sequence[int],
    measure: Callable[[int], Tie | str],
    *,
    unit: Literal["token", "character"] = "token",
) -> Judgement:
    """Judge two outputs of one prompt.

    Args:
        expected: Plain output.
        found: The output that must equal it.
        measure: Measures at the first token that differs (an index of ``expected``), or says in a sentence why nothing
            can be measured, which makes the difference a defect. Not called where the outputs are equal or one has
            ended.
        unit: What the ids stand for.
    """
    position = first_difference(expected, found)
    if position is None:
        return Judgement(verdict="EXACT", unit=unit)
    own, other = (output[position] if position < len(output) else None for output in (expected, found))
    difference: dict[str, Any] = {"position": position, "tokens": (own, other), "unit": unit}

    def diverged(reason: str, tie: Tie | None = None) -> Judgement:
        return Judgement(verdict="DIVERGED", tie=tie, reason=reason, **difference)

    if own is None or other is None:
        return diverged(f"One output ended after {position} {unit}s, the other went on.")
    tie = measure(position)
    if isinstance(tie, str):
        return diverged(tie)
    if fault := _fault(tie, other):
        return diverged(fault, tie)
    apart = "A filter's edge lies between the two tokens"
    if not tie.cut:
        apart = f"The two tokens are {tie.margin:.3g} apart in {tie.source}"
    reason = (
        f"{apart}, the numeric noise measured around them is {tie.counted_noise:.3g}, and the control without a "
        "drafter chooses the other token, too."
    )
    return Judgement(verdict="NEAR_TIE", tie=tie, reason=reason, **difference)


def _fault(tie: Tie, other: int | None) -> str:
    """Why it is not a near tie; empty if it is one."""
    if tie.margin is None and tie.source == "logits":
        return "One of the two tokens has no finite logit in plain decoding."
    if tie.margin is None:
        return "The other token is not among the best ones that the engine reports, so nothing shows that it was near."
    # What is not finite has become None: it is measured wherever ``explained`` is.
    largest = math.inf if tie.steps is None else tie.steps
    # Whatever the margin: an engine whose steps are wrong would otherwise set its own tolerance.
    if tie.explained is not None and largest > tie.explained:
        return (
            f"Logits of steps of several tokens are {largest:.3g} off those of single steps, more than rounding "
            f"explains ({tie.explained:.3g}): positions or masks within a step are wrong."
        )
    if tie.noise is None:
        return "There is no other position to measure the numeric noise at."
    # The control's noise at the position itself is left out on purpose. Where the control flips, the two logits have
    # together moved by at least the margin, so the margin would always lie within twice that noise: the rule would
    # decide nothing, and a defect at this one place (the window's edge, the ring's end) would hide itself: its own
    # error would widen the tolerance. What steps of one token differ by there does count: such a defect is not in it.
    # It shows where only here the routing of a mixture of experts flips (1 of 480 bfloat16 outputs of tiny-26b): on a
    # CPU in all 14 large differences of 1,904 rows.
    if not tie.cut and abs(tie.margin) > MARGIN_LIMIT * (tie.counted_noise or 0.0):
        here = "" if tie.noise_here is None else f" ({tie.noise_here:.3g} at this position, which does not count)"
        alone = "" if tie.noise_alone is None else f", and that of single steps at this position {tie.noise_alone:.3g}"
        return (
            f"The two tokens are {tie.margin:.3g} apart in {tie.source}, but the numeric noise measured around them is "
            f"{tie.noise:.3g}{here}{alone}."
        )
    # A small margin is not enough: rounding must be seen to flip this choice without a drafter.
    if other not in tie.control:
        return (
            f"The two tokens are nearly tied ({tie.margin:.3g} apart, noise {tie.noise:.3g}), but the control without "
            "a drafter never chooses the other one."
        )
    return ""
