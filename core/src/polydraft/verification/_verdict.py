"""Verdicts on two outputs that should be the same: EXACT, NEAR_TIE or DIVERGED.

A verdict is said of a pair on a backend with its engine's version, dtype and hardware, never of a backend as such.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator

from polydraft.contract.records import Exactness, Record

__all__ = ["MARGIN_LIMIT", "Judgement", "Tie", "Verdict", "first_difference", "judge", "passes"]

Verdict = Literal["EXACT", "NEAR_TIE", "DIVERGED"]
"""``EXACT``: the same tokens. ``NEAR_TIE``: they differ first where two tokens lie within the numeric noise, and a
control without any drafter chooses the other one too. ``DIVERGED``: any other difference, a defect."""

MARGIN_LIMIT = 2.0
"""Largest margin of a near tie, in units of the noise: each of the two logits may have moved by the noise."""

_NOTHING = (
    "There are no numbers to measure a near tie with: the engine shows none for these settings, or its plain decoding "
    "does not repeat itself."
)


class Tie(Record):
    """What was measured at the first token that differs. Nothing in it comes from a run with a drafter."""

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
        description="Largest difference of one logit between plain decoding and the control, at other positions; "
        "None: there was no other position."
    )
    steps: float | None = Field(
        default=None,
        description="Largest difference of one raw logit between steps of one token and of k+1, at a few positions.",
    )
    rounding: float | None = Field(
        default=None,
        description="What rounding explains of ``steps``, by the dtype and by fresh prefills; None: not measured.",
    )
    cut: bool = Field(
        default=False,
        description="A filter (top_k, top_p, min_p) leaves one of the two tokens out, in plain decoding or in the "
        "control: its edge lies between them, and the margin says nothing.",
    )
    control: tuple[int, ...] = Field(
        description="What the control chose at this position: the same prefix without any drafter, in blocks of k+1 "
        "tokens, once for each place of the position in its block (whole engines: in one prefill)."
    )

    @field_validator("values", "margin", "noise", "steps", "rounding", mode="before")
    @classmethod
    def _finite(cls, value: Any) -> Any:
        """Infinities and NaN say nothing, and are no JSON."""
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

    @property
    def margin_in_noise(self) -> float | None:
        """The margin in units of the noise."""
        if self.tie is None or self.tie.margin is None or not self.tie.noise:
            return None
        return self.tie.margin / self.tie.noise


def passes(verdict: Verdict, exactness: Exactness) -> bool:
    """Whether the promise holds: no difference but near ties, and none at all where bitwise equality was asked."""
    return verdict == "EXACT" or (verdict == "NEAR_TIE" and exactness != "bitwise")


def first_difference(expected: Sequence[int], found: Sequence[int]) -> int | None:
    """Index of the first token that differs, the shorter one's end included; None if they are equal."""
    for index, (left, right) in enumerate(zip(expected, found, strict=False)):
        if left != right:
            return index
    return None if len(expected) == len(found) else min(len(expected), len(found))


def judge(expected: Sequence[int], found: Sequence[int], measure: Callable[[int], Tie | None] | None) -> Judgement:
    """Judge two outputs of one prompt.

    Args:
        expected: Plain output.
        found: The output that must equal it.
        measure: Measures at the first token that differs (an index of ``expected``); not called where the outputs are
            equal or one has ended. None, or a result of None: the engine shows nothing to measure.
    """
    position = first_difference(expected, found)
    if position is None:
        return Judgement(verdict="EXACT")
    own, other = (output[position] if position < len(output) else None for output in (expected, found))
    tokens = (own, other)
    if own is None or other is None:
        return Judgement(
            verdict="DIVERGED",
            position=position,
            tokens=tokens,
            reason=f"One output ended after {position} tokens, the other went on.",
        )
    tie = measure(position) if measure is not None else None
    fault = _fault(tie, other) if tie is not None else "No near tie was measured." if measure is None else _NOTHING
    if tie is None or fault:
        return Judgement(verdict="DIVERGED", position=position, tokens=tokens, tie=tie, reason=fault)
    apart = "A filter's edge lies between the two tokens"
    if not tie.cut:
        apart = f"The two tokens are {tie.margin:.3g} apart in {tie.source}"
    return Judgement(
        verdict="NEAR_TIE",
        position=position,
        tokens=tokens,
        tie=tie,
        reason=f"{apart}, the numeric noise measured here is {tie.noise:.3g}, and the control without a drafter "
        "chooses the other token too.",
    )


def _fault(tie: Tie, other: int) -> str:
    """Why it is no near tie; empty if it is one."""
    if tie.margin is None and tie.source == "logits":
        return "One of the two tokens has no finite logit in plain decoding."
    if tie.margin is None:
        return "The other token is not among the best ones that the engine reports, so it was far behind."
    if tie.steps is not None and tie.rounding is not None and tie.steps > tie.rounding:
        return (
            f"Logits of steps of several tokens are {tie.steps:.3g} off those of single steps, more than rounding "
            f"explains ({tie.rounding:.3g}): positions or masks within a step are wrong."
        )
    if tie.noise is None:
        return "There is no other position to measure the numeric noise at."
    if not tie.cut and abs(tie.margin) > MARGIN_LIMIT * tie.noise:
        return (
            f"The two tokens are {tie.margin:.3g} apart in {tie.source}, but the numeric noise measured here is "
            f"{tie.noise:.3g}."
        )
    if other not in tie.control:
        return (
            f"The two tokens are nearly tied ({tie.margin:.3g} apart, noise {tie.noise:.3g}), but the control without "
            "a drafter never chooses the other one."
        )
    return ""
